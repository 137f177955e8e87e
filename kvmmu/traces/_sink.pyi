from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

ROWS: int
MODIFY: int

class Sink:
    def __new__(cls, *, vcpu: bool = ..., gpa: bool = ..., size: bool = ..., value: bool = ..., rows: int = ...) -> Self: ...
    def __len__(self) -> int: ...
    def take(self) -> dict[str, NDArray[Any]]: ...

class PageSet:
    def __len__(self) -> int: ...
    def add(self, op: NDArray[np.uint8], addr: NDArray[np.uint64], size: NDArray[np.uint8] | None = ...) -> None: ...

def add_rows(sink: Sink, op: NDArray[np.uint8], addr: NDArray[np.uint64], start: int, *, access: NDArray[np.uint8] | None = ...,
             size: NDArray[np.uint32] | None = ..., ip: NDArray[np.uint64] | None = ..., vcpu: NDArray[np.uint16] | None = ...,
             gpa: NDArray[np.uint64] | None = ...) -> int: ...
