import numpy as np
from numpy.typing import NDArray

MAX_USES: int

def find_places(op: NDArray[np.uint8], addr: NDArray[np.uint64], access: NDArray[np.uint8], gpa: NDArray[np.uint64]
                ) -> tuple[NDArray[np.uint32], NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint8], NDArray[np.uint8]]: ...
def addresses_of(place: NDArray[np.uint32], page: NDArray[np.uint64], frame: NDArray[np.uint64],
                 addr: NDArray[np.uint64], gpa: NDArray[np.uint64]) -> None: ...

class PlacedRows:
    all_known: bool
    has_events: bool
    legal: bool
    def __init__(self, place: NDArray[np.uint32], page: NDArray[np.uint64], frame: NDArray[np.uint64],
                 page_op: NDArray[np.uint8], page_access: NDArray[np.uint8]) -> None: ...
    def __len__(self) -> int: ...
    def events(self) -> tuple[NDArray[np.uint32], NDArray[np.uint8], NDArray[np.uint64]]: ...
    def put(self, op: NDArray[np.uint8], addr: NDArray[np.uint64], access: NDArray[np.uint8],
            gpa: NDArray[np.uint64]) -> None: ...
