from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmmu.memory._memory import GuestMemory

class CallbackMemory(GuestMemory):
    def __init__(
        self,
        read: Callable[[NDArray[np.uint64]], Any],
        write: Callable[[NDArray[np.uint64], NDArray[np.uint8]], object] | None = None,
        *,
        size: int | None = None,
        cache_pages: int = ...,
    ) -> None: ...
    def drop_cached(self) -> None: ...
    def flush(self) -> None: ...
    def fetch(self, gfns: NDArray[np.uint64]) -> None: ...
    def pages_of(self, first: int, count: int) -> NDArray[np.uint8]: ...
