import numpy as np
from numpy.typing import NDArray

MAX_PAIRS: int

def find_places(addr: NDArray[np.uint64],
                gpa: NDArray[np.uint64]) -> tuple[NDArray[np.uint32], NDArray[np.uint64], NDArray[np.uint64]]: ...
def addresses_of(place: NDArray[np.uint32], page: NDArray[np.uint64], frame: NDArray[np.uint64],
                 addr: NDArray[np.uint64], gpa: NDArray[np.uint64]) -> None: ...
