"""Rows of pages that a caller names: addresses, sizes and flags, as scalars or arrays, checked."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvmmu.arch._bits import GPA_BITS, PT64_PKEY_SHIFT
from kvmmu.arch.arguments import check_bools, check_integers
from kvmmu.tables.modes import FORMAT_32, ModeShape

__all__ = ["Flag", "Rows", "as_words", "either_mask", "entry_mask", "gpa_bits", "key_bits"]

Flag = bool | NDArray[np.bool_]
KEYS = 16


class Rows:
    """Pages that a caller names: aligned addresses and levels."""

    def __init__(self, shape: ModeShape, gva: int | ArrayLike, size: int | ArrayLike) -> None:
        self.gva = as_words("gva", gva)
        sizes = as_words("size", size)
        if sizes.size != 1 and sizes.size != self.gva.size:
            raise ValueError(f"size: {sizes.size} rows, gva has {self.gva.size}")
        self.level = np.zeros(sizes.size, np.uint8)
        for bytes_, level in shape.sizes.items():
            self.level[sizes == bytes_] = level
        if not self.level.all():
            raise ValueError(f"size: {int(sizes[np.argmin(self.level)]):#x} is no page size of this mode; allowed are "
                             f"{', '.join(map(hex, shape.sizes))}")
        self.offset_mask = sizes - np.uint64(1)
        self._refuse("gva", self.gva, self.gva & self.offset_mask != 0, "a multiple of the page size")
        if shape.signed:
            unused = np.int64(64 - shape.addr_bits)
            bad = (self.gva.view(np.int64) << unused >> unused).view(np.uint64) != self.gva
            self._refuse("gva", self.gva, bad, f"a canonical address of {shape.addr_bits} bits")
        else:
            self._refuse("gva", self.gva, self.gva >> np.uint64(shape.addr_bits) != 0, f"an address of {shape.addr_bits} bits")

    def addresses(self, name: str, value: int | ArrayLike, bits: int) -> NDArray[np.uint64]:
        """Physical addresses of the pages, one per row."""
        words = as_words(name, value)
        if words.size == 1 and self.gva.size != 1:
            words = np.full(self.gva.size, words[0], np.uint64)
        if words.size != self.gva.size:
            raise ValueError(f"{name}: {words.size} rows, gva has {self.gva.size}")
        self._refuse(name, words, words & self.offset_mask != 0, "a multiple of the page size")
        self._refuse(name, words, words >> np.uint64(bits) != 0, f"an address of {bits} bits")
        return words

    @staticmethod
    def _refuse(name: str, words: NDArray[np.uint64], bad: NDArray[np.bool_], allowed: str) -> None:
        if bad.any():
            row = int(np.argmax(bad))
            raise ValueError(f"{name}: {int(words[row]):#x} (row {row}) is not {allowed}")


def as_words(name: str, value: int | ArrayLike) -> NDArray[np.uint64]:
    """Unsigned 64-bit words, one-dimensional and contiguous, of an integer or an array of integers."""
    words = check_integers(name, value, 0, (1 << 64) - 1)
    if words.ndim > 1:
        raise ValueError(f"{name}: want a scalar or a one-dimensional array, got shape {words.shape}")
    return np.ascontiguousarray(np.atleast_1d(words))


def gpa_bits(shape: ModeShape, rows: Rows) -> int:
    """Width of the physical addresses in entries: PSE-36 has 40 bits, for 4M pages alone."""
    if shape.format != FORMAT_32:
        return GPA_BITS
    return 40 if (rows.level == 2).all() else 32


def either_mask(rows: Rows, name: str, flag: Flag, if_true: int, if_false: int) -> NDArray[np.uint64]:
    """One of two masks for a flag, or per row for an array of flags."""
    flags = check_bools(name, flag)
    if flags.ndim and flags.shape != rows.gva.shape:
        raise ValueError(f"{name}: shape {flags.shape}, gva has {rows.gva.shape}")
    return np.where(np.atleast_1d(flags), np.uint64(if_true), np.uint64(if_false))


def key_bits(rows: Rows | None, pkey: int | ArrayLike) -> NDArray[np.uint64]:
    """Protection keys in their place in an entry."""
    keys = np.atleast_1d(check_integers("pkey", pkey, 0, KEYS - 1))
    if rows is not None and keys.size not in (1, rows.gva.size):
        raise ValueError(f"pkey: {keys.size} rows, gva has {rows.gva.size}")
    return keys << np.uint64(PT64_PKEY_SHIFT)


def entry_mask(shape: ModeShape) -> int:
    """All bits of an entry."""
    return (1 << (32 if shape.format == FORMAT_32 else 64)) - 1
