"""The batches that several benchmarks share."""

import functools

import numpy as np
from tables import MIX, Guest, accesses

from kvmmu import Status, Translation

FIELDS = ("gpa", "status", "error_code")
SMALL, MIDDLE, BIG = 32_768, 900_000, 8 << 20
NAMES = {SMALL: "32,768 pages", MIDDLE: "900,000 pages", BIG: "8,388,608 pages"}


@functools.lru_cache(maxsize=4)
def guest(pages, mode="4-level", mix=MIX, **options):
    """A Guest, kept for the next benchmark."""
    return Guest(pages, mode, mix, **options)


class Batch:
    """Random addresses of a guest, translated into columns that are used again and again."""

    def __init__(self, tables, rng, rows, *, fields=FIELDS, threads=1):
        self.tables, self.rng, self.rows = tables, rng, rows
        self.fields, self.threads = fields, threads
        self.walk = tables.vcpu.gva_walk
        self.out = Translation.empty(rows, fields)
        self.taken = np.empty(rows, tables.dtype)

    def fresh(self):
        """(addresses, accesses, indices of the leaf entries) of one round."""
        gva = self.tables.addresses(self.rng, self.rows)
        return gva, accesses(self.rng, self.rows), self.tables.leaf_index(gva)

    def translate(self, gva, access, *_):
        self.walk.translate(gva, access, fields=self.fields, threads=self.threads, out=self.out)

    def take(self, _gva, _access, index):
        self.tables.words.take(index, out=self.taken, mode="clip")

    def check(self, gva, access, index):
        """The columns say what the leaf entries say."""
        self.take(gva, access, index)
        self.translate(gva, access)
        expected = self.tables.expected(gva, self.taken)
        np.testing.assert_array_equal(expected, self.out.gpa)
        np.testing.assert_array_equal(expected == ~np.uint64(0), self.out.status == Status.PAGE_FAULT)
