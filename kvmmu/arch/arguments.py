"""Checks of what callers pass: each returns the argument as the plain value that it stands for, or refuses it by its name.

What is of another kind is a TypeError, what is out of range a ValueError. NumPy integers of any width, members of enums and
objects with `__index__` are integers; bools, floats and strings are not.
"""

import operator
import sys
from collections.abc import Iterable
from os import PathLike, fspath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmmu.arch._bits import GPA_LIMIT, PAGE_SIZE

__all__ = ["check_bool", "check_bools", "check_bytes", "check_choice", "check_gpa", "check_int", "check_integers",
           "check_length", "check_name", "check_pages", "check_path", "check_threads", "check_word", "check_words", "is_masked",
           "refuse_masked"]

MAX_THREADS = 1024                      # far beyond what makes a batch faster; each is made when it is wanted
_TEXT_MAX = 80
_DECIMAL_BELOW = 1_000                 # larger numbers are addresses or masks


def check_int(name: str, value: Any, low: int, high: int) -> int:
    """Return value as an int if it is an integer from low to high."""
    number: int = value if type(value) is int else _index(name, value)
    if not low <= number <= high:
        raise ValueError(f"{name}: want {_text(low)} to {_text(high)}, got {_text(number)}")
    return number


def check_word(name: str, value: Any, bits: int = 64) -> int:
    """Return value as an int if it is an unsigned integer of so many bits."""
    return check_int(name, value, 0, (1 << bits) - 1)


def check_gpa(name: str, value: Any) -> int:
    """Return value as an int if it is a guest-physical address, which has 52 bits."""
    return check_int(name, value, 0, GPA_LIMIT - 1)


def check_pages(name: str, value: Any, low: int = 0, high: int = GPA_LIMIT) -> int:
    """Return value as an int if it is a whole number of pages, in bytes, from low to high."""
    size = check_int(name, value, low, high)
    if size % PAGE_SIZE:
        raise ValueError(f"{name}: {size:#x} is not a multiple of {PAGE_SIZE:#x}")
    return size


def check_length(name: str, value: Any, gpa: int) -> int:
    """Return value as an int if it is a number of bytes that guest-physical memory has at gpa; a hole has them too."""
    size = check_int(name, value, 0, GPA_LIMIT)
    if gpa + size > GPA_LIMIT:
        raise ValueError(f"{name}: {size:#x} bytes at gpa {gpa:#x} end beyond 52 bits ({GPA_LIMIT:#x})")
    return size


def check_threads(name: str, value: Any) -> int:
    """Return value as an int if it is a number of threads."""
    return check_int(name, value, 1, MAX_THREADS)


def check_choice(name: str, value: Any, choices: tuple[int, ...]) -> int:
    """Return value as an int if it is one of some integers."""
    number: int = value if type(value) is int else _index(name, value)
    if number not in choices:
        raise ValueError(f"{name}: want {', '.join(map(str, choices[:-1]))} or {choices[-1]}, got {_text(number)}")
    return number


def check_name(name: str, value: Any, names: Iterable[str | None]) -> Any:
    """Return value if it is one of some strings, or None where that is among them."""
    names = tuple(names)
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name}: want {_either(names)}, got {_shown(value)}")
    if value not in names:
        raise ValueError(f"{name}: want {_either(names)}, got {value!r}")
    return value


def check_bool(name: str, value: Any) -> bool:
    """Return value as a bool if it is one, or the integer 0 or 1."""
    if value is True or value is False:
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    try:
        number = _index(name, value)
    except TypeError:
        raise TypeError(f"{name}: want True or False, got {_shown(value)}") from None
    if number not in (0, 1):
        raise ValueError(f"{name}: want True or False, got {_text(number)}")
    return number == 1


def check_path(name: str, value: Any, what: str) -> Any:
    """Return value if it is a path as text, and no empty one, which Path() takes for the current folder. IN what: it names."""
    if not isinstance(value, (str, PathLike)) or not isinstance(fspath(value), str):
        raise TypeError(f"{name}: want a path as str or path-like, got {type(value).__name__}; "
                        "os.fsdecode() makes a str of bytes")
    if not fspath(value):
        raise FileNotFoundError(f"{name}: no name of {what} is given")
    return value


def check_words(name: str, values: Any, count: int, bits: int = 64) -> tuple[int, ...]:
    """Return values as a tuple if they are so many unsigned integers of so many bits."""
    want = f"{name}: want {count} integers of {bits} bits"
    refuse_masked(name, values)
    if isinstance(values, (str, bytes, bytearray, memoryview)) or not isinstance(values, Iterable):
        raise TypeError(f"{want}, got {_shown(values)}")
    words = tuple(check_word(f"{name}[{i}]", value, bits) for i, value in enumerate(values))
    if len(words) != count:
        raise ValueError(f"{want}, got {len(words)}")
    return words


def check_integers(name: str, values: Any, low: int, high: int, dtype: type[np.unsignedinteger[Any]] = np.uint64, *,
                   copy: bool = True) -> NDArray[Any]:
    """Return an integer or an array_like of integers from low to high as an array of a dtype, of the same shape.

    An ndarray of another kind is a ValueError: its dtype is wrong. copy: False: an array that needs no change is returned itself.
    """
    refuse_masked(name, values)
    if isinstance(values, (np.ndarray, np.integer)):
        array = np.asarray(values)
        if array.dtype.kind not in "ui":
            raise ValueError(f"{name}: want integers, got dtype {array.dtype}")
    elif isinstance(values, (list, tuple)):
        array = np.asarray(values)
        if array.dtype.kind not in "ui":            # too wide ones, and what are none
            items = np.asarray(values, object)
            numbers = [check_int(name, value, low, high) for value in items.flat]
            array = np.array(numbers, dtype).reshape(items.shape)
    else:
        return np.array(check_int(name, values, low, high), dtype)
    limits = np.iinfo(array.dtype)
    if array.size and low > limits.min and int(array.min()) < low:
        raise ValueError(f"{name}: want {_text(low)} to {_text(high)}, got {_text(int(array.min()))}")
    if array.size and high < limits.max and int(array.max()) > high:
        raise ValueError(f"{name}: want {_text(low)} to {_text(high)}, got {_text(int(array.max()))}")
    return array.astype(dtype, copy=copy)


def check_bools(name: str, values: Any) -> NDArray[np.bool_]:
    """Return a bool or an array_like of bools (or of the integers 0 and 1) as an array of the same shape."""
    refuse_masked(name, values)
    array = np.asarray(values)
    if array.dtype.kind == "b":
        return array
    if array.ndim == 0 and not isinstance(values, np.ndarray):
        return np.array(check_bool(name, values))
    return check_integers(name, values, 0, 1, np.uint8).astype(bool)


def check_bytes(name: str, data: Any) -> NDArray[np.uint8]:
    """Return the bytes of an object with the buffer protocol, without a copy; integers are none, although NumPy's are buffers."""
    refuse_masked(name, data)
    try:
        view = memoryview(data) if not isinstance(data, np.generic) else None
    except (TypeError, ValueError, BufferError):
        view = None
    if view is None:
        raise TypeError(f"{name}: want bytes or another object with the buffer protocol, got {_shown(data)}")
    if not view.c_contiguous:
        raise ValueError(f"{name}: want a C-contiguous buffer; numpy.ascontiguousarray() makes a copy that is")
    return np.frombuffer(view, np.uint8) if view.nbytes else np.empty(0, np.uint8)


def is_masked(value: object) -> bool:
    """True if value is an array of numpy.ma, whose masked rows hold anything."""
    masked = sys.modules.get("numpy.ma")            # NumPy loads it at its first use
    return masked is not None and isinstance(value, masked.MaskedArray)


def refuse_masked(name: str, value: object) -> None:
    """Raise ValueError if value is an array of numpy.ma."""
    if is_masked(value):
        raise ValueError(f"{name}: want an array without a mask; numpy.ma.filled() makes one of a masked array")


def _index(name: str, value: Any) -> int:
    """Return value as an int if it is an integer of any kind."""
    if not isinstance(value, bool) and not is_masked(value):
        try:
            return int(operator.index(value))
        except TypeError:
            pass
    raise TypeError(f"{name}: want an integer, got {_shown(value)}")


def _text(number: int) -> str:
    return str(number) if abs(number) < _DECIMAL_BELOW else hex(number)


def _shown(value: object) -> str:
    """Return a value in words; of what may be long only the type."""
    long = isinstance(value, (bytes, bytearray, memoryview, np.ndarray, list, tuple)) or (
        isinstance(value, str) and len(value) > _TEXT_MAX)
    return type(value).__name__ if long else repr(value)


def _either(names: tuple[str | None, ...]) -> str:
    texts = [repr(name) for name in names]
    return " or ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)
