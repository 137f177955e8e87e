"""Translations of programs outside the tree, in C by the function table and in Cython, against the loop inside the package."""

import ctypes

import numpy as np
import pytest
from cases import BIG, NAMES, SMALL
from compiled import Missing, scalar_loops, table_loops
from conftest import QUICK
from tables import Guest, Mix

import kvmmu.embed.c_api
from kvmmu import Access, Walker

GROUP = "Embedding"
ACCESS = Access.USER
MAPPED = Mix(absent=0, large=0.05, cold=0.05)
PAGES = {512: "512 pages", **{pages: NAMES[pages] for pages in (SMALL, BIG)}}
RESULT = np.dtype([("gpa", np.uint64), ("error_code", np.uint32), ("status", np.uint8), ("level", np.uint8),
                   ("reserved", np.uint16)])


@pytest.fixture
def loops(skipped, request):
    try:
        return table_loops(), scalar_loops()
    except Missing as missing:
        skipped(GROUP, request.node.name, "compiled code", str(missing))


@pytest.mark.parametrize("pages", PAGES)
@pytest.mark.parametrize("language", ["C", "Cython"])
def bench_out_of_tree(race, rng, loops, pages, language):
    """A call for each address, against one call whose loop is in the package."""
    library, extension = loops
    tables, memory, vcpu = Guest(pages, mix=MAPPED), ctypes.c_uint64(), ctypes.c_uint64()
    regs, walker = tables.vcpu.regs, Walker(tables.vcpu.gva_walk)
    assert library.open_guest(kvmmu.embed.c_api.address, tables.memory.ctypes.data, tables.memory.nbytes, regs.cr0, regs.cr3,
                              regs.cr4, regs.efer, ctypes.byref(memory), ctypes.byref(vcpu)) == 0
    rows = 100_000 if QUICK else 500_000
    out, other = np.zeros(rows, RESULT), np.zeros(rows, RESULT)
    columns = np.empty(rows, np.uint64), np.empty(rows, np.uint8), np.empty(rows, np.uint32)

    def ours(gva):
        if language == "C":
            library.walk_rows(vcpu, gva.ctypes.data, rows, int(ACCESS), out.ctypes.data)
        else:
            extension.walk_rows(walker, gva, int(ACCESS), *columns)

    def theirs(gva):
        library.walk_many(vcpu, gva.ctypes.data, rows, int(ACCESS), other.ctypes.data)

    def check(_):
        mine = (out["gpa"], out["status"]) if language == "C" else columns[:2]
        np.testing.assert_array_equal(other["gpa"], mine[0])
        np.testing.assert_array_equal(other["status"], mine[1])
        assert (mine[1] == 0).all()

    race(GROUP, f"{language}, {PAGES[pages]}", "the loop in the package", ours, theirs, lambda: (tables.addresses(rng, rows),),
         rows=rows, between=tables.chill, check=check, bars=[("at most", 1.3)], rounds=15 if QUICK else 45)
