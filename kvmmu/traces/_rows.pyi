import numpy as np
from numpy.typing import NDArray

def scan(op: NDArray[np.uint8], access: NDArray[np.uint8], gpa: NDArray[np.uint64] | None) -> tuple[bool, bool, bool, bool]: ...
