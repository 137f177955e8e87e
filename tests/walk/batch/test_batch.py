# SPDX-License-Identifier: Apache-2.0
"""translate() over arrays: its arguments, and that a row's answer depends on nothing but the row."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from batch_machines import random_machine
from builders import PageTables, random_tables, words_to_pages
from machines import ACCESSES, ALL_FIELDS, NXE, PKE, SMAP, SMEP, WP, A, D, assert_same_columns, columns, snapshot, vcpu_over

from kvmmu import INVALID_GPA, Access, Contexts, CpuModel, GeneralProtection, GuestMemory, Regs, Status, Translation, Vcpu
from kvmmu.walk.batch._kernels import default_instruction_set, instruction_sets

GVA, GPA = 0x40201000, 0x7654000
MODES = ("32", "pae", "4l", "5l")
DTYPES = {"gpa": np.uint64, "status": np.uint8, "error_code": np.uint32, "level": np.uint8, "pte": np.uint64,
          "pte_gpa": np.uint64, "pte_access": np.uint8, "refs": np.uint8}
GVAS = np.array([GVA, GVA + 0x1000, 1 << 63], np.uint64)


@pytest.fixture
def walk():
    """A 4-level walk with one page, at GVA."""
    tables = PageTables("4l")
    tables.map(GVA, GPA, "p u")
    return vcpu_over(tables).gva_walk


# ---- shapes and columns ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [0, 1, 2])
@pytest.mark.parametrize("access", [0, Access.READ, np.uint8(0), "array"])
def test_few_rows(walk, n, access):
    """n = 0 and 1 are batches like any other; one access serves all rows, or each row has its own."""
    access = np.zeros(n, np.uint8) if isinstance(access, str) else access
    t = walk.translate(np.full(n, GVA, np.uint64), access, fields=ALL_FIELDS)
    for name, dtype in DTYPES.items():
        assert ((n,), dtype) == (getattr(t, name).shape, getattr(t, name).dtype)
    assert [GPA] * n == t.gpa.tolist()


def test_each_row_has_its_answer(walk):
    """Success, page fault and non-canonical address side by side; failed rows have INVALID_GPA."""
    t = walk.translate(GVAS, Access.USER)
    assert [GPA, INVALID_GPA, INVALID_GPA] == t.gpa.tolist()
    assert [Status.OK, Status.PAGE_FAULT, Status.NON_CANONICAL] == t.status.tolist()
    assert [0, 4, 0] == t.error_code.tolist()
    assert t.level is t.pte is t.pte_gpa is t.pte_access is t.refs is None
    assert "3 rows" in repr(t)


def test_accesses_of_rows(walk):
    """An array of accesses belongs to the rows; a single value to all."""
    gva = np.full(len(ACCESSES), GVA, np.uint64)
    mixed = walk.translate(gva, np.array(ACCESSES, np.uint8))
    for row, access in enumerate(ACCESSES):
        assert mixed.error_code[row] == walk.translate(gva[:1], access).error_code[0]


@pytest.mark.parametrize("fields", [("gpa",), "gpa", ("refs", "level"), ["status"], (), ALL_FIELDS])
def test_fields(walk, fields):
    """Only what was asked for is there, and the rest does not change it."""
    expected = walk.translate(GVAS, fields=ALL_FIELDS)
    t = walk.translate(GVAS, fields=fields)
    wanted = (fields,) if isinstance(fields, str) else fields
    assert set(wanted) == set(columns(t))
    for name in wanted:
        assert np.array_equal(getattr(expected, name), getattr(t, name))


def test_read_only_inputs(walk):
    """The gva array may be read-only; it cannot be a column of out, too."""
    gva = GVAS.copy()
    gva.flags.writeable = False
    assert GPA == walk.translate(gva).gpa[0]
    in_place = GVAS.copy()
    with pytest.raises(ValueError, match=r"out\.gpa and gva"):
        walk.translate(in_place, fields=("gpa",), out=Translation(gpa=in_place))
    assert GVAS.tolist() == in_place.tolist()


def test_instruction_sets_that_never_ran_are_not_chosen():
    """AVX-512 is there by name, where the processor has it; the best of the others is the default."""
    assert default_instruction_set() in ("avx2", "portable")
    assert default_instruction_set() == next(name for name in instruction_sets() if name != "avx512")
    code = "from kvmmu.walk.batch import _kernels; print(_kernels.default_instruction_set())"
    for name in instruction_sets():
        done = subprocess.run([sys.executable, "-Pc", code], env=os.environ | {"KVMMU_INSTRUCTION_SET": name},
                              capture_output=True,
                              text=True, check=True)
        assert default_instruction_set() == done.stdout.strip()


# ---- out ------------------------------------------------------------------------------------------------------------

def test_out_is_reused(walk):
    """The same arrays, filled again; out is returned; columns not in fields stay as they are."""
    out = Translation.empty(3, ALL_FIELDS)
    before = columns(out)
    out.refs[:] = 77
    t = walk.translate(GVAS, out=out)
    assert t is out
    assert all(getattr(out, name) is before[name] for name in ALL_FIELDS)
    assert [77] * 3 == out.refs.tolist()
    assert GPA == out.gpa[0]
    out.gpa[:] = 0
    walk.translate(GVAS, out=out)
    assert GPA == out.gpa[0]


def test_fields_named_twice(walk):
    """As once; more names than there can be columns are refused."""
    out = Translation.empty(3)
    for t in (walk.translate(GVAS, fields=("gpa", "status", "gpa")), walk.translate(GVAS, fields=("gpa", "gpa"), out=out)):
        assert GPA == t.gpa[0]
    with pytest.raises(ValueError, match="fields: 1000 names"):
        walk.translate(GVAS, fields=("gpa",) * 1000)


def bad_out(name, array):
    out = Translation.empty(3, ("gpa", "status", "error_code"))
    setattr(out, name, array)
    return out


def read_only(array):
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(("out", "named"), [
    ({}, "out.*dict"),
    (Translation.empty(2), r"out\.gpa.*\(2,\)"),
    (Translation(), r"out\.gpa.*NoneType"),
    (bad_out("gpa", np.zeros(3, np.int64)), r"out\.gpa.*int64"),
    (bad_out("status", np.zeros(3, np.uint32)), r"out\.status.*uint32"),
    (bad_out("error_code", np.zeros(6, np.uint32)[::2]), r"out\.error_code.*contiguous"),
    (bad_out("gpa", np.zeros((3, 1), np.uint64)), r"out\.gpa.*\(3, 1\)"),
    (bad_out("gpa", read_only(np.zeros(3, np.uint64))), r"out\.gpa.*read-only"),
])
def test_bad_out(walk, out, named):
    """ValueError naming the column and what is wrong; nothing was translated, no bit set."""
    before = snapshot(walk.mem)
    with pytest.raises(ValueError, match=named):
        walk.translate(GVAS, out=out)
    assert before == snapshot(walk.mem)


def test_translation_has_no_other_columns():
    """TypeError and ValueError naming the column."""
    with pytest.raises(TypeError, match="gva"):
        Translation(gva=1)
    with pytest.raises(ValueError, match="gva"):
        Translation.empty(1, ("gva",))


def test_unusual_columns(walk):
    """Columns that are read-only, not aligned, of C's other type of the size, or one row of a column with gaps, are as good."""
    expected = walk.translate(GVAS, Access.USER)
    for other in (np.ulong, np.ulonglong):
        assert_same_columns(expected, walk.translate(GVAS.astype(other), Access.USER), "another type of the size")
    shifted = np.frombuffer(b"\0" + GVAS.tobytes(), np.uint64, offset=1)
    assert not shifted.flags.aligned
    assert not shifted.flags.writeable
    assert_same_columns(expected, walk.translate(shifted, Access.USER), "not aligned")
    for row in range(GVAS.size):
        gva, access = np.repeat(GVAS, 2)[::2][row:row + 1], np.full(6, Access.USER, np.uint8)[::3][:1]
        one = walk.translate(gva, access, regs=[Regs(cr0=1, cr3=0, cr4=0, efer=0)] * 2, ctx=np.zeros(9, np.uint32)[::4][:1])
        assert one.gpa[0] == gva[0] % 2**32
        one = walk.translate(gva, access)
        assert (expected.gpa[row], expected.status[row]) == (one.gpa[0], one.status[0])
    assert expected.gpa.tolist() == walk.translate(GVAS, np.uint8(Access.USER)).gpa.tolist()


# ---- bad arguments --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("gva", "named"), [
    ([GVA], "gva.*list"), (GVA, "gva.*int"), (None, "gva.*NoneType"), (GVAS.astype(np.int64), "gva.*int64"),
    (GVAS.astype(np.float64), "gva.*float64"), (GVAS.astype(">u8"), "gva.*>u8"), (GVAS[::2], "gva.*contiguous"),
    (GVAS[None], r"gva.*\(1, 3\)"), (np.uint64(GVA), "gva.*uint64"), (np.array(GVA, np.uint64), r"gva.*\(\)"),
    (np.zeros(3, [("gva", np.uint64)]), "gva.*gva"), (np.zeros(3, "M8[s]"), "gva.*datetime"),
    (memoryview(GVAS), "gva.*memoryview"), (np.array([GVA], object), "gva.*object"), (np.zeros(3, "V8"), "gva.*V8"),
    (np.zeros(3, "S8"), "gva.*S8")])
def test_bad_gva(walk, gva, named):
    """ValueError naming the argument and what it got."""
    with pytest.raises(ValueError, match=named):
        walk.translate(gva)


@pytest.mark.parametrize(("access", "named"), [
    (1, "access.*0x1"), (65, "access.*0x1"), (129, "access.*0x1"), (256, "access.*(256|0x100)"),
    (-1, "access.*-1"),
    (np.zeros(2, np.uint8), r"access.*\(2,\)"), (np.zeros(3, np.uint32), "access.*uint32"),
    (np.zeros(6, np.uint8)[::2], "access.*contiguous"), (np.array([0, 0, 1], np.uint8), "access.*0x1"),
    (np.array([0, 193, 0], np.uint8), "access.*0x1"), ([0, 0, 0], "access.*list"), ("2", "access.*str"),
    (0.5, "access.*float"), (None, "access.*None"), (True, "access.*bool")])
def test_bad_access(walk, access, named):
    """ValueError, or TypeError for what is neither integer nor array, naming the argument and what it got."""
    error = ValueError if isinstance(access, np.ndarray) or type(access) is int else TypeError
    with pytest.raises(error, match=named):
        walk.translate(GVAS, access)


@pytest.mark.parametrize("threads", [0, -1, 1025, 1.5, "2", None])
def test_bad_threads(walk, threads):
    """ValueError, or TypeError for what is no integer, naming the value."""
    named = hex(threads) if threads == 1025 else threads
    with pytest.raises(ValueError if isinstance(threads, int) else TypeError, match=f"threads.*{named}"):
        walk.translate(GVAS, threads=threads)


@pytest.mark.parametrize("fields", [("gva",), "nothing", ("gpa", "hpa")])
def test_bad_fields(walk, fields):
    """ValueError naming the column."""
    with pytest.raises(ValueError, match="fields.*(gva|nothing|hpa)"):
        walk.translate(GVAS, fields=fields)


ONE = Regs(cr0=1, cr3=0, cr4=0, efer=0)


@pytest.mark.parametrize(("kwargs", "named"), [
    ({"ctx": np.zeros(3, np.uint32)}, "ctx.*regs"),
    ({"regs": [ONE, ONE]}, "ctx.*2"),
    ({"regs": [ONE], "ctx": np.array([0, 0, 1], np.uint32)}, "ctx.*1 "),
    ({"regs": [ONE], "ctx": np.zeros(2, np.uint32)}, r"ctx.*\(2,\)"),
    ({"regs": [ONE], "ctx": np.zeros(3, np.int64)}, "ctx.*int64"),
    ({"regs": [ONE], "ctx": [0, 0, 0]}, "ctx.*list"),
    ({"regs": [ONE], "ctx": np.zeros(6, np.uint32)[::2]}, "ctx.*contiguous"),
    ({"regs": []}, "0 register sets|regs"),
])
def test_bad_ctx(walk, kwargs, named):
    """ValueError naming the argument and what it got."""
    with pytest.raises(ValueError, match=named):
        walk.translate(GVAS, **kwargs)


def test_illegal_registers_name_their_row(walk):
    """GeneralProtection, with a note that says which row of regs."""
    with pytest.raises(GeneralProtection) as info:
        walk.translate(GVAS, regs=[ONE, Regs(cr0=1 << 31, cr3=0, cr4=0, efer=0)], ctx=np.zeros(3, np.uint32))
    assert "cr0-pg-without-pe" == info.value.rule
    assert "row 1 of regs" in info.value.__notes__[0]


@pytest.mark.parametrize("regs", [[1], [None], [{"cr0": 1}], 5])
def test_regs_of_another_type(walk, regs):
    """TypeError or ValueError that says regs wants Regs."""
    with pytest.raises((TypeError, ValueError), match="regs|Regs"):
        walk.translate(GVAS, regs=regs)


# ---- a row depends on nothing but the row ---------------------------------------------------------------------------

@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("conformance", ["sdm", "kvm"])
def test_two_threads_equal_one(mode, conformance):
    """On an image with cold A/D bits: same answers, same memory afterwards."""
    for seed in range(3):
        results = []
        for threads in (1, 2, 5):
            vcpu, gva, access = random_machine(seed, mode, conformance=conformance)
            fields = [name for name in ALL_FIELDS if name != "pte"]     # A/D bits in it depend on the order
            t = vcpu.gva_walk.translate(gva, access, fields=fields, threads=threads)
            results.append((t, snapshot(vcpu.mem)))
        for t, image in results[1:]:
            assert_same_columns(results[0][0], t, f"seed {seed}")
            assert results[0][1] == image, f"seed {seed}"


@pytest.mark.parametrize("mode", MODES)
def test_order_of_rows_does_not_matter(mode):
    """Shuffled rows give shuffled answers and the same memory."""
    for seed in range(3):
        vcpu, gva, access = random_machine(seed, mode)
        fields = [name for name in ALL_FIELDS if name != "pte"]
        expected, image = vcpu.gva_walk.translate(gva, access, fields=fields), snapshot(vcpu.mem)
        order = np.random.default_rng(seed).permutation(gva.size)
        vcpu, _, _ = random_machine(seed, mode)
        t = vcpu.gva_walk.translate(gva[order], access[order], fields=fields)
        for name, column in columns(expected).items():
            assert np.array_equal(column[order], getattr(t, name)), f"seed {seed}: {name}"
        assert image == snapshot(vcpu.mem), f"seed {seed}"


def register_sets(rng, roots, count):
    """`count` different register sets over all modes and controls; PAE roots are among `roots`."""
    sets = set()
    while len(sets) < count:
        mode = rng.choice(["off", *MODES])
        bit = rng.integers(0, 2, 8).tolist()
        cr0 = 1 | WP * bit[0] | (1 << 31 if mode != "off" else 0)
        cr4 = (1 << 4) * bit[1] | SMEP * bit[2] | SMAP * bit[3] | PKE * bit[4]
        cr4 |= 0 if mode == "32" else 1 << 5 if mode != "off" else (1 << 5) * bit[6]
        cr4 |= 1 << 12 if mode == "5l" else 0
        efer = NXE * bit[5] | (0x500 if mode in ("4l", "5l") else 0)
        cr3 = roots[mode] | int(rng.integers(0, 4)) << 3 if mode in roots else int(rng.integers(0, 1 << 20)) << 12
        pkru = int(rng.integers(0, 1 << 32))
        sets.add(Regs(cr0=cr0, cr3=cr3, cr4=cr4, efer=efer, pkru=pkru, rflags=2 | bit[7] << 18))
    return sorted(sets, key=hash)


def all_modes(seed):
    """(words, roots, addresses) of one memory with random tables of every mode."""
    rng = np.random.default_rng(seed)
    words, roots, gvas = {}, {}, []
    for number, mode in enumerate(MODES):
        tables = random_tables(rng, mode, base=0x100000 * (number + 1), gvas=400)
        words.update(tables.words)
        roots[mode] = tables.cr3
        gvas += tables.gvas
    for index in range(4):                                              # no malformed PDPTE: its set could not be loaded
        at = roots["pae"] + 8 * index
        words[at] = words.get(at, 0) & 0xFFFFF001
    # CR3 bits 4:3 must not choose other PDPTEs: PAE roots are 32-byte aligned
    return words, roots, np.array(gvas, np.uint64)


@pytest.mark.parametrize("conformance", ["sdm", "kvm"])
def test_10000_register_sets_equal_one_call_per_set(conformance):
    """regs and ctx: each row under registers of its own, against set_regs() and a batch for each set."""
    rng = np.random.default_rng(10_000)
    words, roots, gvas = all_modes(7)
    machines = [Vcpu(GuestMemory.from_pages(*words_to_pages(words)), cpu=CpuModel(maxphyaddr=40, conformance=conformance))
                for _ in range(2)]
    sets = register_sets(rng, roots, 10_000)
    assert 10_000 == len(set(sets))
    n = 40_000
    ctx = np.concatenate([np.arange(10_000), rng.integers(0, 10_000, n - 10_000)]).astype(np.uint32)
    gva = rng.choice(gvas, n)
    access = rng.choice(np.array(ACCESSES, np.uint8), n)
    fields = [name for name in ALL_FIELDS if name != "pte"]

    together = machines[0].gva_walk.translate(gva, access, regs=sets, ctx=ctx, fields=fields)

    alone = Translation.empty(n, fields)
    order = np.argsort(ctx, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(ctx[order])) + 1):
        r = sets[ctx[rows[0]]]
        machines[1].set_regs(cr0=r.cr0, cr3=r.cr3, cr4=r.cr4, efer=r.efer, pkru=r.pkru, rflags=r.rflags)
        t = machines[1].gva_walk.translate(gva[rows], access[rows], fields=fields)
        for name in fields:
            getattr(alone, name)[rows] = getattr(t, name)
    assert_same_columns(alone, together, "seed 10000")
    assert snapshot(machines[1].mem) == snapshot(machines[0].mem)
    assert 3 == np.unique(together.status).size


def test_prepared_contexts_are_reusable(walk):
    """prepare() once, translate() often; the vCPU's own registers stay out of it."""
    tables = PageTables("4l")
    contexts = walk.prepare([ONE, Regs(**tables.regs()), ONE])
    assert isinstance(contexts, Contexts)
    assert 3 == len(contexts)
    for _ in range(3):
        t = walk.translate(GVAS, regs=contexts, ctx=np.array([1, 0, 2], np.uint32))
        assert [GPA, int(GVAS[1]), 0] == t.gpa.tolist()
    assert GPA == walk.translate(GVAS[:1]).gpa[0]


def test_registers_are_taken_at_entry(walk):
    """A batch and contexts do not follow a later change of the vCPU's registers."""
    contexts = walk.prepare([Regs(**PageTables("4l").regs())])
    walk.mem.add_slot(1 << 40, 0x1000)
    assert GPA == walk.translate(GVAS[:1], regs=contexts).gpa[0]


@pytest.mark.parametrize("mode", MODES)
def test_threads_racing_for_accessed_and_dirty_bits(mode):
    """Several calls at once over the same cold tables: right answers in each, right bits at the end, no lost update."""
    for seed in range(3):
        vcpu, gva, access = random_machine(seed, mode)
        expected = vcpu.gva_walk.translate(gva, access)
        image = snapshot(vcpu.mem)
        vcpu, _, _ = random_machine(seed, mode)
        rng = np.random.default_rng(seed)
        orders = [rng.permutation(gva.size) for _ in range(4)]
        start, results = threading.Barrier(4), [None] * 4

        def run(number, vcpu=vcpu, gva=gva, access=access, orders=orders, start=start, results=results):
            rows = orders[number]
            start.wait()
            results[number] = vcpu.gva_walk.translate(gva[rows], access[rows])

        threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for rows, t in zip(orders, results, strict=True):
            for name, column in columns(expected).items():
                assert np.array_equal(column[rows], getattr(t, name)), f"seed {seed}: {name}"
        assert image == snapshot(vcpu.mem), f"seed {seed}"


def test_threads_racing_on_one_entry():
    """Every row writes the same page: one A at each level, one D, whoever comes first."""
    for _ in range(20):
        tables = PageTables("4l")
        tables.map(GVA, GPA)
        vcpu = vcpu_over(tables)
        t = vcpu.gva_walk.translate(np.full(2000, GVA, np.uint64), Access.WRITE, threads=4)
        assert not t.status.any()
        for level in (1, 2, 3, 4):
            want = tables.entry(GVA, level) | A | (D if level == 1 else 0)
            assert want == vcpu.mem.read_u64(tables.entry_gpa(GVA, level))
