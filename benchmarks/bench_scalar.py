"""One address at a time: from Python against an empty Cython method, from C against a plain walker in C."""

import numpy as np
import pytest
from cases import BIG, NAMES, SMALL
from compiled import Missing, plain_walk, scalar_loops
from conftest import QUICK
from tables import Guest, Mix

from kvmmu import Access, Walker

ACCESS = Access.USER
MAPPED = Mix(absent=0, large=0.05, cold=0.05)
PAGES = {512: "512 pages", SMALL: NAMES[SMALL]}


@pytest.fixture
def loops(skipped, request):
    try:
        return scalar_loops()
    except Missing as missing:
        skipped("Scalar", request.node.name, "compiled code", str(missing))


@pytest.mark.parametrize("pages", PAGES)
def bench_from_python(race, rng, loops, pages):
    """gva_to_gpa(gva, access) in a loop, the call itself included on both sides."""
    tables, empty = Guest(pages, mix=MAPPED), loops.Empty()
    walk, rows = tables.vcpu.gva_walk, 20_000 if QUICK else 100_000

    def ours(gvas):
        for gva in gvas:
            walk.gva_to_gpa(gva, ACCESS)

    def theirs(gvas):
        for gva in gvas:
            empty.gva_to_gpa(gva, ACCESS)

    race("Scalar", f"from Python, {PAGES[pages]}", "an empty Cython method", ours, theirs,
         lambda: (tables.addresses(rng, rows).tolist(),), rows=rows, between=tables.chill, bars=[("at most", 2.0)],
         rounds=15 if QUICK else 45)


@pytest.mark.parametrize("pages", [*PAGES, BIG])
@pytest.mark.parametrize("order", ["rows", "chain"])
def bench_from_c(race, rng, loops, order, pages):
    """An extension outside the tree that cimports kvmmu.walker; in a chain each address waits for the result before it."""
    tables = Guest(pages, mix=MAPPED)
    walker, rows = Walker(tables.vcpu.gva_walk), 100_000 if QUICK else 500_000
    columns = [(np.empty(rows, np.uint64), np.empty(rows, np.uint8), np.empty(rows, np.uint32)) for _ in range(2)]
    plain, loop = getattr(plain_walk(), f"plain_walk_{order}"), getattr(loops, f"walk_{order}")
    memory, size, root = tables.memory.ctypes.data, tables.memory.nbytes, tables.root

    def ours(gva):
        loop(walker, gva, int(ACCESS), *columns[0])

    def theirs(gva):
        plain(memory, size, root, gva.ctypes.data, rows, *(column.ctypes.data for column in columns[1]))

    def check(gva):
        for mine, other in zip(*columns, strict=True):
            np.testing.assert_array_equal(other, mine)
        assert (columns[0][1] == 0).all()

    what = "each after the one before" if order == "chain" else "independent"
    race("Scalar", f"from C, {what}, {(PAGES | NAMES)[pages]}", "the plain C walker", ours, theirs,
         lambda: (tables.addresses(rng, rows),), rows=rows, between=tables.chill, check=check, bars=[("at most", 1.5)],
         rounds=15 if QUICK else 45)
