from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from kvmmu.tlb._hierarchy import TlbLevels

def save_levels(levels: TlbLevels) -> dict[str, NDArray[Any]]: ...
def restore_levels(levels: TlbLevels, state: Mapping[str, NDArray[Any]]) -> None: ...
