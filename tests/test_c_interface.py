"""The Cython interface: an extension outside the tree cimports kvmmu.walker and gets the answers that Python gets."""

import gc
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
from batch_machines import random_machine
from machines import ACCESSES
from nested_guests import eptp as eptp_of
from nested_guests import guest

import kvmmu
from kvmmu import Access, CpuModel, Ept, GuestMemory, Status, Translation, Vcpu, Walker
from kvmmu.walk.results import COLUMNS

SETUP = """
from Cython.Build import cythonize
from setuptools import Extension, setup

import kvmmu

setup(name="cinterface", ext_modules=cythonize(
    [Extension("cinterface", ["cinterface.pyx"], include_dirs=[kvmmu.get_include()], extra_compile_args={flags})],
    compiler_directives={{"language_level": 3, "boundscheck": False, "wraparound": False}}))
"""
FEW = ("gpa", "status", "error_code", "level")
FLAGS = [] if sys.platform == "win32" else ["-Wall", "-Werror", "-Wno-unused-function"]


@pytest.fixture(scope="module")
def extension(tmp_path_factory):
    """The module `cinterface`, built in a directory of its own against the package that is installed."""
    pytest.importorskip("Cython", reason="Cython is not installed")
    pytest.importorskip("setuptools", reason="setuptools is not installed")
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[0]
    if shutil.which(compiler) is None:
        pytest.skip(f"the C compiler {compiler} is missing")
    folder = tmp_path_factory.mktemp("cinterface")
    shutil.copy(Path(__file__).with_name("cinterface.pyx"), folder)
    (folder / "setup.py").write_text(SETUP.format(flags=FLAGS))
    package = str(Path(kvmmu.__file__).parents[1])
    done = subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=folder, capture_output=True, text=True,
                          check=False, env={**os.environ, "PYTHONPATH": package})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "performance hint" not in done.stdout + done.stderr
    built = next(path for path in folder.glob("cinterface*") if path.suffix in (".so", ".pyd"))
    spec = importlib.util.spec_from_file_location("cinterface", built)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def in_c(extension, walker, gva, access, set_ad=True):
    """All columns of a translation, row by row from C."""
    columns = {name: np.empty(gva.size, dtype) for name, dtype in COLUMNS.items()}
    extension.translate_rows(walker, gva, access, set_ad, columns)
    return Translation(**columns)


def in_c_few(extension, walker, gva, access, set_ad=True):
    """The columns that translate() of the `.pxd` has."""
    columns = {name: np.empty(gva.size, COLUMNS[name]) for name in FEW}
    extension.translate_few(walker, gva, access, set_ad, columns)
    return Translation(**columns)


def assert_equal(expected, actual, names=tuple(COLUMNS)):
    for name in names:
        np.testing.assert_array_equal(getattr(expected, name), getattr(actual, name), err_msg=name)


def in_order(walk, gva, access):
    """The columns of one batch per row: A/D bits take effect in order."""
    rows = [walk.translate(gva[i:i + 1], access[i:i + 1], fields=tuple(COLUMNS)) for i in range(gva.size)]
    return Translation(**{name: np.concatenate([getattr(row, name) for row in rows]) for name in COLUMNS})


@pytest.mark.parametrize("mode", ["32", "pae", "pae npt", "4l", "5l"])
@pytest.mark.parametrize("seed", range(3))
def test_answers_are_those_of_python(extension, mode, seed):
    """Every field of every row, and the accessed and dirty bits left in memory, on adversarial tables."""
    (ours, gva, access), (few, _, _), (theirs, _, _) = (random_machine(seed, mode) for _ in range(3))
    expected = theirs.gva_walk.translate(gva, access, fields=tuple(COLUMNS), set_ad=False)
    assert_equal(expected, in_c(extension, Walker(ours.gva_walk), gva, access, set_ad=False))
    assert_equal(expected, in_c_few(extension, Walker(few.gva_walk), gva, access, set_ad=False), FEW)
    assert len(set(expected.status.tolist())) > 1
    for machine in (ours, few, theirs):
        assert machine.mem.read(0x100000, 0x10000) == random_machine(seed, mode)[0].mem.read(0x100000, 0x10000)
    for _ in range(2):                                  # the second time, A and D bits are there already
        expected = in_order(theirs.gva_walk, gva, access)
        assert_equal(expected, in_c(extension, Walker(ours.gva_walk), gva, access))
        assert_equal(expected, in_c_few(extension, Walker(few.gva_walk), gva, access), FEW)
        assert theirs.mem.read(0x100000, 0x10000) == ours.mem.read(0x100000, 0x10000)
        assert theirs.mem.read(0x100000, 0x10000) == few.mem.read(0x100000, 0x10000)


@pytest.mark.parametrize("mode", ["32", "pae", "pae npt", "4l", "5l"])
def test_the_short_cut_answers_what_it_can(extension, mode):
    """It takes each walk that succeeds and changes nothing, and no other; the scalar calls of Python agree."""
    taken = 0
    for seed in range(3):
        vcpu, gva, access = random_machine(seed, mode)
        walk, walker = vcpu.gva_walk, Walker(vcpu.gva_walk)
        access &= ~np.uint8(Access.IMPLICIT)
        before = vcpu.mem.read(0x100000, 0x10000)
        for address, how in zip(gva[:1000].tolist(), access.tolist(), strict=False):
            expected = walk.translate(np.array([address], np.uint64), np.array([how], np.uint8), fields=("status", "gpa"))
            after = vcpu.mem.read(0x100000, 0x10000)
            possible = expected.status[0] == Status.OK and after == before
            before = after
            if possible:
                assert (True, True) == extension.short_cut(walker, address, how)
                assert int(expected.gpa[0]) == walk.gva_to_gpa(address, how)
                taken += 1
            elif expected.status[0] != Status.OK:
                assert (False, False) == extension.short_cut(walker, address, how)
    assert taken > 100


@pytest.mark.parametrize(("cr0", "cr4", "efer"), [
    (cr0, 0x20 | cr4, efer) for cr0 in (0x80000001, 0x80010001) for cr4 in (0, 0x100000, 0x200000, 0x700000)
    for efer in (0x500, 0xD00)], ids=hex)
def test_the_short_cut_judges_every_right(extension, cr0, cr4, efer):
    """Each access by each set of rights, with and without WP, SMEP, SMAP, PKE and NX: it takes what is allowed, no more."""
    vcpu, leaf, upper = identity(), 0x12000 + 8 * 5, 0x11000
    vcpu.set_regs(cr0=cr0, cr4=cr4, efer=efer, pkru=0xC)                # PKRU denies key 1
    walk, walker = vcpu.gva_walk, Walker(vcpu.gva_walk)
    for table in (0x1000, 0x10000):
        vcpu.mem.write_u64(table, vcpu.mem.read_u64(table) | 0x20)
    counts = {True: 0, False: 0}
    for rights, key, where in product(range(32), (0, 1), (leaf, upper)):
        bits = (rights & 7) | (rights & 8) << 60 | (rights & 16) << 2 | 0x20       # P W U, NX, D
        vcpu.mem.write_u64(upper, 0x12027)
        vcpu.mem.write_u64(leaf, 0x5067 | key << 59)
        vcpu.mem.write_u64(where, vcpu.mem.read_u64(where) & ~0x67 | bits)
        before = vcpu.mem.read(0x10000, 0x3000)
        for access in range(0, 64, 2):
            row = np.array([0x5008], np.uint64), np.array([access], np.uint8)
            taken = extension.short_cut(walker, 0x5008, access)
            expected = walk.translate(*row, fields=tuple(COLUMNS))
            untouched = vcpu.mem.read(0x10000, 0x3000) == before
            vcpu.mem.write(0x10000, before)
            possible = bool(expected.status[0] == Status.OK and untouched)
            assert (possible, possible) == taken, (rights, key, where, access)
            assert_equal(expected, in_c_few(extension, walker, *row), FEW)
            vcpu.mem.write(0x10000, before)
            counts[possible] += 1
    assert min(counts.values()) > 100


def test_the_short_cut_leaves_the_rest(extension):
    """A fault, a cold A bit, a write to a clean page, a table outside the largest slot, paging off, two stages."""
    vcpu = identity()
    leaf = 0x12000 + 8 * 5
    walker = Walker(vcpu.gva_walk)
    assert (False, False) == extension.short_cut(walker, 0x5000, 0)                 # A clear on every level
    assert (Status.OK, 0x5000) == extension.one(walker, 0x5000)
    assert (True, True) == extension.short_cut(walker, 0x5000, 0)
    assert (False, False) == extension.short_cut(walker, 0x5000, int(Access.WRITE))
    assert (Status.OK, 0x5000) == extension.one(walker, 0x5000, int(Access.WRITE))
    assert (True, True) == extension.short_cut(walker, 0x5000, int(Access.WRITE))
    for gva, entry in ((0x5000, 0x5060), (0x5000, 0x5067 | 1 << 51), (0x5000 | 1 << 47, 0x5067), (0x6000, 0x5067)):
        vcpu.mem.write_u64(leaf, entry)                                             # absent, reserved, not canonical, absent
        assert (False, False) == extension.short_cut(walker, gva, 0)
        assert extension.one(walker, gva)[0] != Status.OK
    vcpu.mem.write_u64(leaf, 0x5063)
    assert (False, False) == extension.short_cut(walker, 0x5000, int(Access.USER))
    assert (True, True) == extension.short_cut(walker, 0x5000, 0)
    table = np.zeros(512, np.uint64)
    table[5] = 0x5067
    vcpu.mem.add_slot(1 << 30, table)
    vcpu.mem.write_u64(0x11000, 1 << 30 | 0x27)
    walker.refresh()
    assert (False, False) == extension.short_cut(walker, 0x5000, 0)
    assert (Status.OK, 0x5000) == extension.one(walker, 0x5000)
    vcpu.set_regs(cr0=0x11, efer=0)
    walker.refresh()
    assert (False, False) == extension.short_cut(walker, 0x5000, 0)
    assert (Status.OK, 0x5000) == extension.one(walker, 0x5000)
    for name, address in (("gva_walk", 0x7000_1000), ("ngpa_walk", 0x40_0000)):
        walker = Walker(getattr(nested_machine(), name))
        assert Status.OK == extension.one(walker, address, int(Access.USER))[0]
        assert (False, False) == extension.short_cut(walker, address, int(Access.USER))


def nested_machine():
    mem, regs = guest()
    vcpu = Vcpu(mem, cpu=CpuModel(maxphyaddr=48))
    vcpu.set_regs(cr0=0x80010033, cr3=0x10_0000, cr4=0x20, efer=0xD00)
    vcpu.enter_nested(Ept(eptp_of()), **regs)
    return vcpu


@pytest.mark.parametrize("walk", ["gva_walk", "ngpa_walk"])
def test_both_walks_of_a_nested_guest(extension, walk):
    """Two stages, and the second one alone."""
    vcpu = nested_machine()
    rng = np.random.default_rng(7)
    gva = np.concatenate([np.full(200, 0x7000_1000, np.uint64), rng.integers(0, 1 << 26, 800, np.uint64)])
    gva += rng.integers(0, 1 << 12, gva.size, np.uint64)
    access = rng.choice(np.array(ACCESSES, np.uint8), gva.size)
    expected = getattr(vcpu, walk).translate(gva, access, fields=tuple(COLUMNS), set_ad=False)
    assert_equal(expected, in_c(extension, Walker(getattr(vcpu, walk)), gva, access, set_ad=False))
    assert_equal(expected, in_c_few(extension, Walker(getattr(vcpu, walk)), gva, access, set_ad=False), FEW)
    assert {Status.OK} < set(expected.status.tolist())


def identity(gpas=(0x1000,), size=1 << 20):
    """4-level tables, one for each root, that map address 0x5000 + n * 0x1000 of root n to itself."""
    mem = GuestMemory(size)
    free = 0x10000
    for number, root in enumerate(gpas):
        path = [root, free, free + 0x1000, free + 0x2000]
        free += 0x3000
        for table, following in pairwise(path):
            mem.write_u64(table, following | 7)
        page = 0x5000 + number * 0x1000
        mem.write_u64(path[-1] + 8 * (page >> 12), page | 7)
    vcpu = Vcpu(mem)
    vcpu.set_regs(cr0=0x80010001, cr3=gpas[0], cr4=0x20, efer=0xD00)
    return vcpu


def test_a_handle_is_of_its_moment_until_refreshed(extension):
    """CR3, slots and nested exits count from the next refresh(); the bytes of memory at once."""
    vcpu = identity((0x1000, 0x2000))
    walker = Walker(vcpu.gva_walk)
    place = extension.place(walker)
    assert (Status.OK, 0x5123) == extension.one(walker, 0x5123)
    vcpu.set_regs(cr3=0x2000)
    assert (Status.OK, 0x5123) == extension.one(walker, 0x5123)
    walker.refresh()
    assert (Status.PAGE_FAULT, kvmmu.INVALID_GPA) == extension.one(walker, 0x5123)
    assert (Status.OK, 0x6123) == extension.one(walker, 0x6123)
    vcpu.mem.write_u64(0x15000 + 8 * 6, 0)                              # no copy
    assert Status.PAGE_FAULT == extension.one(walker, 0x6123)[0]
    vcpu.mem.write_u64(0x15000 + 8 * 7, 0x7007)
    assert (Status.OK, 0x7000) == extension.one(walker, 0x7000)

    table = np.zeros(512, np.uint64)
    table[8] = 0x8007
    vcpu.mem.write_u64(0x14000, 0x100000 | 7)                           # the leaf table is a slot that comes later
    vcpu.mem.add_slot(0x100000, table)
    assert Status.PAGE_FAULT == extension.one(walker, 0x8000)[0]
    walker.refresh()
    assert (Status.OK, 0x8000) == extension.one(walker, 0x8000)
    assert place == extension.place(walker)


def test_a_walker_keeps_alive_what_it_needs(extension):
    """The vCPU and the memory may go, slots may be added."""
    vcpu = nested_machine()
    walker = Walker(vcpu.gva_walk)
    expected = extension.one(walker, 0x7000_1000, int(Access.USER))
    assert expected[0] == Status.OK
    vcpu.mem.add_slot(1 << 30, 1 << 20)
    vcpu.gva_walk.translate(np.zeros(1, np.uint64))
    vcpu.leave_nested()
    del vcpu
    gc.collect()
    [np.full(1 << 16, 0xFF, np.uint8) for _ in range(100)]
    assert expected == extension.one(walker, 0x7000_1000, int(Access.USER))


def test_a_handle_outlives_its_slots(extension):
    """The slots that a handle was made over may go, and their buffers with them as far as Python can tell: it walks them on."""
    mem = GuestMemory(0x4000000)                                        # large enough to be unmapped when it is freed
    for gpa, entry in ((0x1000, 0x2007), (0x2000, 0x3007), (0x3000, 0x4007), (0x4000, 0x5067)):
        mem.write_u64(gpa, entry)
    mem.add_slot(1 << 32, 0x1000)
    vcpu = Vcpu(mem)
    vcpu.set_regs(cr0=0x80010001, cr3=0x1000, cr4=0x20, efer=0xD00)
    walker = Walker(vcpu.gva_walk)
    mem.remove_slot(0)
    gc.collect()
    assert (0, 0x5000) == extension.one(walker, 0)
    walker.refresh()
    assert 1 == extension.one(walker, 0)[0]


def test_a_handle_without_a_walk(extension):
    """Of a Walker whose __init__() did not run: every address faults."""
    class Forgetful(Walker):
        def __init__(self):
            pass

    for walker in (Walker.__new__(Walker), Forgetful()):
        for gva in (0, 0x123456789000, 2**64 - 1):
            assert (Status.PAGE_FAULT, 2**64 - 1) == extension.one(walker, gva)
        gvas = np.arange(300, dtype=np.uint64) << np.uint64(30)
        assert {1} == set(in_c(extension, walker, gvas, np.zeros(300, np.uint8)).status.tolist())
        with pytest.raises(RuntimeError, match=r"super\(\).__init__\(\)"):
            walker.refresh()
        assert "Walker" in repr(walker)


def test_threads_share_a_handle(extension):
    """Rows translated from several threads at once, A/D bits set: the answers of one thread."""
    vcpu = identity(tuple(0x1000 * n for n in range(1, 5)))
    gva = np.tile(np.array([0x5000, 0x5FFF, 0x6000], np.uint64), 20_000)
    access = np.full(gva.size, Access.WRITE, np.uint8)
    expected = vcpu.gva_walk.translate(gva, access, fields=tuple(COLUMNS), set_ad=False)
    walker = Walker(vcpu.gva_walk)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: in_c(extension, walker, gva, access), range(4)))
    for t in found:
        for name in set(COLUMNS) - {"pte"}:
            np.testing.assert_array_equal(getattr(expected, name), getattr(t, name), err_msg=name)
    assert 0x5067 == vcpu.mem.read_u64(0x12000 + 8 * 5)


def test_a_walk_that_is_not_in_use_has_no_handle(extension):
    """An error at once, and on refresh() the handle stays as it was."""
    vcpu = nested_machine()
    with pytest.raises(TypeError):
        Walker(None)
    walker = Walker(vcpu.ngpa_walk)
    expected = extension.one(walker, 0x40_0000, int(Access.USER))
    vcpu.leave_nested()
    with pytest.raises(RuntimeError, match="not in use"):
        walker.refresh()
    with pytest.raises(RuntimeError, match="not in use"):
        Walker(vcpu.ngpa_walk)
    assert expected == extension.one(walker, 0x40_0000, int(Access.USER))


def test_bits_that_are_no_access_are_ignored(extension):
    """A caller in C cannot reach beyond the permission table."""
    walker = Walker(identity().gva_walk)
    assert extension.one(walker, 0x5000) == extension.one(walker, 0x5000, 0xFFFFFF01)


def test_numbers(extension):
    """The constants that the public file passes on."""
    assert (Status.OK, Status.PAGE_FAULT, Access.WRITE, Access.USER, kvmmu.INVALID_GPA) == extension.numbers()
