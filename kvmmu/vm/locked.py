"""The lock of a machine's objects, which cannot be copied."""

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

from kvmmu.arch.arguments import check_bytes
from kvmmu.memory._lock import MachineLock

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Buffer

__all__ = ["PartOfMachine", "as_bytes", "locked"]


_F = TypeVar("_F", bound=Callable[..., Any])


def locked(method: _F) -> _F:
    """Return the method, which holds `self._lock` while it runs."""
    @wraps(method)
    def held(self: "PartOfMachine", /, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            return method(self, *args, **kwargs)
    return cast(_F, held)


class PartOfMachine:
    """An object that has the lock of its machine, and refuses to be copied."""

    _lock: MachineLock

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(f"a {type(self).__name__} cannot be copied or pickled: page tables and TLBs that "
                        f"others see hang on it; its method clone() makes another one, with a machine of its own")


def as_bytes(data: "Buffer | NDArray[Any]") -> bytes:
    """Return the bytes of a buffer; TypeError for anything else, an int above all, of which `bytes()` makes zeros."""
    if type(data) is bytes:
        return data
    try:
        view = memoryview(data)
    except TypeError:
        view = None
    return check_bytes("data", data).tobytes() if view is None or view.c_contiguous else view.tobytes()
