# SPDX-License-Identifier: Apache-2.0
"""GuestMemory: slots, holes, buffers without copies, and errors that name what was wrong."""

import gc
import mmap
import threading

import numpy as np
import pytest
from builders import PageTables

from kvmmu import CpuModel, GuestMemory, Regs, Vcpu

PAGE = 0x1000
TOP = 1 << 52
LEAVES = 1 << 32                                                        # beyond the tables
MAX_INDEXED_PAGES = 1 << 20                                             # of _memory.pyx: beyond it, binary search


def walk_of(mem, **registers):
    """A walk over `mem` in 4-level mode."""
    vcpu = Vcpu(mem)
    vcpu.set_regs(**{**PageTables("4l").regs(), **registers})
    return vcpu.gva_walk


# ---- slots ----------------------------------------------------------------------------------------------------------

def test_one_slot_of_zeroes():
    """A size makes zeroed memory at GPA 0."""
    mem = GuestMemory(3 * PAGE)
    assert [(0, 3 * PAGE, False)] == mem.slots
    assert bytes(3 * PAGE) == mem.read(0, 3 * PAGE)
    assert "1 slot, 0x3000 bytes" in repr(mem)


def test_slots_up_to_52_bits():
    """The last page of the physical address space can be a slot; slots list ascending."""
    mem = GuestMemory(PAGE)
    mem.add_slot(TOP - PAGE, PAGE)
    mem.add_slot(1 << 40, 2 * PAGE, readonly=True)
    mem.write_u64(TOP - 8, 0x1122334455667788)
    assert [(0, PAGE, False), (1 << 40, 2 * PAGE, True), (TOP - PAGE, PAGE, False)] == mem.slots
    assert 0x1122334455667788 == mem.read_u64(TOP - 8)
    assert b"\x88" == mem.read(TOP - 8, 1)


@pytest.mark.parametrize(("gpa", "size"), [(0, PAGE), (PAGE, PAGE), (0, 8 * PAGE), (3 * PAGE, PAGE), (PAGE, 3 * PAGE)])
def test_overlapping_slots_are_refused(gpa, size):
    """Both slots are named; nothing changed."""
    mem = GuestMemory(2 * PAGE)
    mem.add_slot(3 * PAGE, PAGE)
    before = mem.slots
    with pytest.raises(ValueError, match=rf"overlap.*{gpa:#x}, {gpa + size:#x}"):
        mem.add_slot(gpa, size)
    assert before == mem.slots


def test_neighbouring_slots_do_not_overlap():
    """A slot may start where another one ends."""
    mem = GuestMemory(PAGE)
    mem.add_slot(2 * PAGE, PAGE)
    mem.add_slot(PAGE, PAGE)
    assert [0, PAGE, 2 * PAGE] == [gpa for gpa, _, _ in mem.slots]


@pytest.mark.parametrize(("gpa", "size", "named"), [
    (1, PAGE, "0x1"), (PAGE + 8, PAGE, "0x1008"), (-PAGE, PAGE, "-0x1000"), (TOP, PAGE, "0x10000000000000"),
    (TOP - PAGE, 2 * PAGE, "0xffffffffff000"), (PAGE, 0, "size_or_buffer: .*got 0"), (PAGE, -PAGE, "-0x1000"),
    (PAGE, 100, "size_or_buffer: .*got 100"), (PAGE, PAGE + 1, "0x1001"), (1 << 64, PAGE, "0x10000000000000000")])
def test_bad_slots_are_refused(gpa, size, named):
    """Unaligned, negative, beyond 52 bits, empty or odd: the value is in the message and nothing changed."""
    mem = GuestMemory(PAGE)
    with pytest.raises(ValueError, match=named):
        mem.add_slot(gpa, size)
    assert [(0, PAGE, False)] == mem.slots


@pytest.mark.parametrize("size", [0, -1, 1, 4095, 4097])
def test_bad_sizes_are_refused(size):
    """A positive multiple of 4096; a buffer may end within a page, but not have nothing."""
    named = f"size_or_buffer: .*({size}|{size:#x})"
    with pytest.raises(ValueError, match=named):
        GuestMemory(size)
    if size == 0:
        with pytest.raises(ValueError, match=named):
            GuestMemory(bytearray(size))


@pytest.mark.parametrize("thing", ["4096", None, 4096.0, object(), [0] * 4096])
def test_neither_size_nor_buffer(thing):
    """TypeError naming the type."""
    with pytest.raises(TypeError, match=type(thing).__name__):
        GuestMemory(thing)


# ---- buffers --------------------------------------------------------------------------------------------------------

def aligned_bytearray(size):
    """A bytearray whose first byte is 8-byte aligned; nearly all are."""
    buffers = []
    for _ in range(64):
        buffers.append(bytearray(size))
        if np.frombuffer(buffers[-1], np.uint8).ctypes.data % 8 == 0:
            return buffers[-1]
    pytest.skip("no aligned bytearray to be had")


def buffers():
    yield pytest.param(lambda: np.zeros(PAGE, np.uint8), id="numpy")
    yield pytest.param(lambda: np.zeros((2, 256), np.uint64), id="numpy uint64 2-d")
    yield pytest.param(lambda: aligned_bytearray(PAGE), id="bytearray")
    yield pytest.param(lambda: memoryview(np.zeros(PAGE, np.uint8)), id="memoryview")
    yield pytest.param(lambda: mmap.mmap(-1, PAGE), id="mmap")


@pytest.mark.parametrize("make", [*buffers()])
def test_writable_buffers_are_not_copied(make):
    """Both sides see each other's stores."""
    buffer = make()
    mem = GuestMemory(buffer)
    mem.write(8, b"guest")
    view = memoryview(buffer).cast("B")
    assert b"guest" == bytes(view[8:13])
    view[100] = 7
    assert b"\x07" == mem.read(100, 1)
    assert [(0, PAGE, False)] == mem.slots


@pytest.mark.parametrize("make", [
    pytest.param(lambda: bytes(PAGE), id="bytes"),
    pytest.param(lambda: memoryview(bytearray(PAGE)).toreadonly(), id="read-only memoryview"),
    pytest.param(lambda: memoryview(bytearray(PAGE + 1))[1:].toreadonly(), id="unaligned but read-only"),
    pytest.param(lambda: np.broadcast_to(np.zeros(PAGE, np.uint8), (PAGE,)), id="read-only numpy"),
])
def test_read_only_buffers_make_read_only_slots(make):
    """The guest cannot write there, nor can write()."""
    mem = GuestMemory(make())
    assert [(0, PAGE, True)] == mem.slots
    with pytest.raises(ValueError, match="0x10"):
        mem.write(0x10, b"x")
    assert bytes(16) == mem.read(0x10, 16)


def test_a_read_only_slot_over_a_writable_buffer():
    """The host can still write to it."""
    mem = GuestMemory(PAGE)
    mem.add_slot(PAGE, np.zeros(PAGE, np.uint8), readonly=True)
    mem.write(PAGE, b"rom")
    assert (PAGE, PAGE, True) == mem.slots[1]
    assert b"rom" == mem.read(PAGE, 3)


def test_unusable_buffers_are_refused():
    """Not contiguous, or writable and not 8-byte aligned."""
    with pytest.raises(ValueError, match="contiguous"):
        GuestMemory(np.zeros(2 * PAGE, np.uint8)[::2])
    with pytest.raises(ValueError, match="aligned"):
        GuestMemory(np.zeros(2 * PAGE, np.uint8)[4:PAGE + 4])


def test_buffers_stay_alive():
    """The slot keeps its buffer; a bytearray cannot be resized while it is one."""
    buffer = aligned_bytearray(PAGE)
    mem = GuestMemory(buffer)
    with pytest.raises(BufferError):
        buffer.append(1)
    mem.write_u64(0, 0x23)                                              # entry 0 of the root points to the root itself
    walk = walk_of(mem, cr3=0)
    del buffer, mem
    gc.collect()
    assert 0 == walk.gva_to_gpa(0)


# ---- reads and writes -----------------------------------------------------------------------------------------------

def test_holes_read_as_zero():
    """Below, between and above slots, and across their edges."""
    mem = GuestMemory.from_pages([PAGE, 3 * PAGE], np.full((2, 4096), 0xAA, np.uint8))
    assert bytes(16) == mem.read(0, 16)
    assert bytes(8) + b"\xaa" * PAGE + bytes(PAGE) + b"\xaa" * PAGE + bytes(8) == mem.read(PAGE - 8, 3 * PAGE + 16)
    assert 0 == mem.read_u64(TOP - 8)
    assert 0xAAAAAAAA00000000 == mem.read_u64(PAGE - 4)
    assert b"" == mem.read(2 * PAGE, 0)


def test_reads_and_writes_cross_slots():
    """Neighbouring slots behave as one range of bytes."""
    mem = GuestMemory(PAGE)
    mem.add_slot(PAGE, PAGE)
    mem.add_slot(2 * PAGE, PAGE, readonly=True)
    data = bytes(range(256)) * 17
    mem.write(PAGE - 100, data)
    assert data == mem.read(PAGE - 100, len(data))
    mem.write_u64(2 * PAGE - 4, 0x0102030405060708)
    assert 0x0102030405060708 == mem.read_u64(2 * PAGE - 4)


@pytest.mark.parametrize("data", [b"\x01" * 16, bytearray(16), memoryview(b"\x01" * 16), np.arange(2, dtype=np.uint64)])
def test_what_can_be_written(data):
    """Anything with contiguous bytes."""
    mem = GuestMemory(PAGE)
    mem.write(8, data)
    assert bytes(data) == mem.read(8, 16)


def test_writing_nothing_is_no_error():
    """An empty write touches nothing."""
    mem = GuestMemory(PAGE)
    mem.write(8, b"")
    assert bytes(PAGE) == mem.read(0, PAGE)


def test_writes_are_all_or_nothing():
    """A write that ends in a hole or in a read-only buffer changes nothing."""
    mem = GuestMemory(PAGE)
    mem.add_slot(PAGE, bytes(PAGE))
    for size in (16, 2 * PAGE):
        with pytest.raises(ValueError, match="0x1000"):
            mem.write(PAGE - 8, b"\x01" * size)
        assert bytes(PAGE) == mem.read(0, PAGE)
    with pytest.raises(ValueError, match=r"hole.*0x2000"):
        mem.write(2 * PAGE, b"x")


@pytest.mark.parametrize(("call", "named"), [
    (lambda m: m.read(-1, 8), "gpa: .*-1"),
    (lambda m: m.read(TOP - 4, 8), "0xffffffffffffc"),
    (lambda m: m.read(TOP, 1), "0x10000000000000"),
    (lambda m: m.read(0, 1 << 53), "0x20000000000000"),
    (lambda m: m.read(0, -1), "-"),
    (lambda m: m.write(-8, b"12345678"), "gpa: .*-8"),
    (lambda m: m.write(TOP - 1, b"12"), "0xfffffffffffff"),
    (lambda m: m.read_u64(TOP - 7), "0xffffffffffff9"),
    (lambda m: m.read_u64(1 << 64), "0x10000000000000000"),
    (lambda m: m.write_u64(0, 1 << 64), "0x10000000000000000|18446744073709551616"),
    (lambda m: m.write_u64(0, -1), "-"),
], ids=["read -1", "read over the end", "read at the end", "read 2^53", "read n=-1", "write -8", "write over the end",
        "read_u64 over the end", "read_u64 2^64", "write_u64 2^64", "write_u64 -1"])
def test_ranges_beyond_52_bits_are_refused(call, named):
    """ValueError naming the value."""
    with pytest.raises(ValueError, match=named):
        call(GuestMemory(PAGE))


# ---- from_pages -----------------------------------------------------------------------------------------------------

def test_from_pages_makes_runs_into_slots():
    """Neighbouring pages become one slot, in any order of rows; contents are copied."""
    pages = np.arange(4 * 512, dtype=np.uint64).reshape(4, 512)
    gpas = np.array([5, 2, 9, 3], np.uint64) * np.uint64(PAGE)
    mem = GuestMemory.from_pages(gpas, pages)
    assert [(2 * PAGE, 2 * PAGE, False), (5 * PAGE, PAGE, False), (9 * PAGE, PAGE, False)] == mem.slots
    for gpa, page in zip(gpas.tolist(), pages, strict=True):
        assert page.tobytes() == mem.read(gpa, PAGE)
    pages[0, 0] = 99
    assert 0 == mem.read_u64(5 * PAGE)
    assert mem.read(2 * PAGE, PAGE) == GuestMemory.from_pages(gpas, pages.view(np.uint8)).read(2 * PAGE, PAGE)


@pytest.mark.parametrize(("gpas", "pages", "named"), [
    ([], np.empty((0, 512), np.uint64), r"gpas.*\(0,\)"),
    ([[0]], np.zeros((1, 512), np.uint64), r"gpas.*\(1, 1\)"),
    (np.zeros(1), np.zeros((1, 512), np.uint64), "gpas.*float64"),
    ([0], np.zeros((2, 512), np.uint64), r"pages.*\(2, 512\)"),
    ([0], np.zeros((1, 4096), np.uint64), r"pages.*\(1, 4096\)"),
    ([0], np.zeros((1, 512), np.int64), "pages.*int64"),
    ([0], np.zeros(512, np.uint64), r"pages.*\(512,\)"),
    ([8], np.zeros((1, 512), np.uint64), "0x8"),
    ([0, 0], np.zeros((2, 512), np.uint64), "overlap.*0x0"),
    ([TOP], np.zeros((1, 512), np.uint64), "gpas: .*0x10000000000000"),
    ([-PAGE], np.zeros((1, 512), np.uint64), "-0x1000"),
])
def test_from_pages_refuses_what_is_not_pages(gpas, pages, named):
    """Shapes, dtypes, unaligned, repeated, too high: the message names it."""
    with pytest.raises(ValueError, match=named):
        GuestMemory.from_pages(gpas, pages)


# ---- the look-ups of walks ------------------------------------------------------------------------------------------

def scattered_tables(rng, count):
    """(CR3, page addresses, pages, {gva: gpa}): 4-level tables of `count` mappings, every page far from the next."""
    tables = PageTables("4l")
    leads = {}
    for number in range(count):
        gva = int(rng.integers(1 << 35)) << 12
        tables.map(gva, LEAVES + (number << 12))
        leads[gva] = LEAVES + (number << 12)
    spread = {page: int(rng.integers(1 << 37)) * 2 << 12 for page in tables.tables()}
    for gpa, value in tables.words().items():
        target = value & 0x000FFFFFFFFFF000
        if target in spread:
            tables.write(gpa, value - target + spread[target])
    gpas, pages = tables.pages()
    return spread[tables.cr3], np.array([spread[gpa] for gpa in gpas.tolist()], np.uint64), pages, leads


@pytest.mark.parametrize("extra", [0, MAX_INDEXED_PAGES], ids=["indexed", "binary search"])
def test_walks_over_thousands_of_slots(extra):
    """Both look-ups, the page index and the search that replaces it beyond MAX_INDEXED_PAGES, find the same pages."""
    rng = np.random.default_rng(11)
    cr3, gpas, pages, leads = scattered_tables(rng, 400)
    assert np.unique(gpas).size == gpas.size
    mem = GuestMemory.from_pages(gpas, pages)
    if extra:
        mem.add_slot(1 << 51, (extra + 1) * PAGE)
        mem.add_slot((1 << 51) + (1 << 40), (extra + 2) * PAGE)
    vcpu = Vcpu(mem, cpu=CpuModel(maxphyaddr=52))
    vcpu.set_regs(**{**PageTables("4l").regs(), "cr3": cr3})
    gva = np.array(list(leads), np.uint64)

    t = vcpu.gva_walk.translate(gva)

    assert 0 == np.count_nonzero(t.status)
    assert list(leads.values()) == t.gpa.tolist()


@pytest.mark.parametrize("extra", [0, MAX_INDEXED_PAGES], ids=["indexed", "binary search"])
def test_edges_of_slots_in_walks(extra):
    """First and last entry of each slot are found, those one entry outside are in a hole."""
    mem = GuestMemory.from_pages([0x10 * PAGE, 0x12 * PAGE, 0x20 * PAGE], np.full((3, 512), 0x0000500300005003, np.uint64))
    if extra:
        mem.add_slot(1 << 40, extra * PAGE)
        mem.add_slot(1 << 45, (extra + 1) * PAGE)
    vcpu = Vcpu(mem)
    for page in range(0xE, 0x23):
        vcpu.set_regs(cr0=0x80000001, cr3=page * PAGE, cr4=0x10, efer=0)       # 2-level: one table is one read
        for gva in (0, 0xFFC00000):
            record = vcpu.gva_walk.walk_record(gva)
            present = page in (0x10, 0x12, 0x20)
            assert page * PAGE + (gva >> 20) == record.steps[0].gpa
            assert (2 if present else 1) == len(record.steps), f"page {page:#x}"


def test_slots_added_during_walks():
    """Batches in other threads finish on the slots that they started with; every answer is one or the other."""
    tables = PageTables("4l")
    tables.map(0x5000, 0x9000)
    mem = GuestMemory.from_pages(*tables.pages())
    walk = walk_of(mem, cr3=tables.cr3)
    contexts = walk.prepare([Regs(**tables.regs())])
    gva = np.full(20_000, 0x5000, np.uint64)
    wrong, batches, stop = [], [0, 0], threading.Event()

    def walks(number, **kwargs):
        while not stop.is_set():
            batches[number] += 1
            t = walk.translate(gva, **kwargs)
            if t.status.any() or (t.gpa != 0x9000).any() or walk.gva_to_gpa(0x5000) != 0x9000:
                wrong.append(t)

    threads = [threading.Thread(target=walks, args=(0,)),
               threading.Thread(target=walks, args=(1,), kwargs={"regs": contexts})]
    for thread in threads:
        thread.start()
    number = 0
    while number < 300 or (min(batches) < 20 and number < 3000):
        mem.add_slot((1 << 30) + 2 * number * PAGE, PAGE)
        number += 1
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert number + 1 == len(mem.slots)


def test_remove_slot_gives_the_bytes_back():
    """A slot that goes leaves a hole; its buffer can come back elsewhere, without a copy."""
    mem = GuestMemory(0x1000)
    buffer = np.full(0x2000, 7, np.uint8)
    mem.add_slot(0x10000, buffer)
    data = mem.remove_slot(0x10000)
    assert np.shares_memory(data, buffer)
    assert not mem.is_backed(0x10000)
    assert [(0, 0x1000, False)] == mem.slots
    mem.add_slot(0x40000, data)
    assert b"\x07" == mem.read(0x41FFF, 1)
    with pytest.raises(ValueError, match="no slot begins at gpa 0x41000"):
        mem.remove_slot(0x41000)
    mem.remove_slot(0)
    with pytest.raises(ValueError, match="the last one"):
        mem.remove_slot(0x40000)


def test_many_slots_in_any_order():
    """Slots added and removed at random are those of a plain list; overlaps are found wherever they are."""
    rng = np.random.default_rng(5)
    mem, model = GuestMemory(PAGE), {0: PAGE}
    places = (rng.permutation(4000) + 1) * 4 * PAGE
    for number, gpa in enumerate(places.tolist()):
        size = PAGE * int(rng.integers(1, 5))
        mem.add_slot(gpa, size)
        model[gpa] = size
        if number % 3 == 0:
            gone = list(model)[int(rng.integers(len(model)))]
            assert model.pop(gone) == mem.remove_slot(gone).size
        if number % 500 == 0:
            assert [(gpa, model[gpa], False) for gpa in sorted(model)] == mem.slots
            for taken in rng.choice(sorted(model), 20).tolist():
                for start, pages in ((taken, 1), (taken + model[taken] - PAGE, 9), (max(taken - PAGE, 0), 3)):
                    with pytest.raises(ValueError, match="overlap"):
                        mem.add_slot(start, pages * PAGE)
                assert mem.is_backed(taken, model[taken])
                assert not mem.is_backed(taken, 5 * PAGE) or taken + 4 * PAGE in model
    assert [(gpa, model[gpa], False) for gpa in sorted(model)] == mem.slots
    assert f"{len(model)} slots, {sum(model.values()):#x} bytes" in repr(mem)
    with pytest.raises(ValueError, match=rf"0x1000; there are .*, {len(model) - 8} more"):
        mem.remove_slot(0x1000)


def test_slots_one_by_one_cost_the_same_however_many_there_are():
    """100,000 of them: with work for each that grows with their number this would take hours."""
    mem = GuestMemory(PAGE)
    buffer = np.zeros(PAGE, np.uint8)
    for number in range(1, 100_000):
        mem.add_slot(2 * number * PAGE, buffer)
    mem.write_u64(2 * 77_777 * PAGE, 0x23)                                          # 2-level: points to page 0
    vcpu = Vcpu(mem)
    vcpu.set_regs(cr0=0x80000001, cr3=2 * 77_777 * PAGE, cr4=0x10, efer=0)
    assert [0x23, 0] == [step.entry for step in vcpu.gva_walk.walk_record(0).steps]
    for number in range(1, 100_000):
        mem.remove_slot(2 * number * PAGE)
    assert [(0, PAGE, False)] == mem.slots


def test_a_subclass_that_forgets_its_memory():
    """Without super().__init__() there are no slots: nothing to read, and a walk says what to do."""
    class Forgetful(GuestMemory):
        def __init__(self):
            pass

    for mem in (Forgetful(), GuestMemory.__new__(GuestMemory)):
        assert (bytes(8), [], "GuestMemory(0 slots, 0x0 bytes)") == (mem.read(0, 8), mem.slots, repr(mem))
        vcpu = Vcpu(mem)
        for call in (vcpu.gva_walk.gva_to_gpa, vcpu.gva_walk.walk_record, vcpu.access):
            with pytest.raises(RuntimeError, match=r"super\(\).__init__\(\)"):
                call(0)
        mem.add_slot(0, PAGE)
        assert 5 == vcpu.gva_walk.gva_to_gpa(5)


def test_several_slots_at_once():
    """In any order, of sizes and of buffers: as by add_slot() one after the other."""
    buffer = np.arange(8192, dtype=np.uint64).astype(np.uint8)
    mem = GuestMemory.from_slots([(0x10000, buffer), (0, 4096), (0x12000, bytes(range(256)) * 16)])
    assert mem.slots == [(0, 4096, False), (0x10000, 8192, False), (0x12000, 4096, True)]
    assert mem.read(0x10000, 4) == bytes([0, 1, 2, 3])
    mem.write_u64(0x10000, 1 << 40)
    assert buffer[5] == 1


@pytest.mark.parametrize(("slots", "words"), [
    ([(0, 4096), (0, 4096)], "overlap"), ([(1, 4096)], "not a multiple"),
    ([(0, 1)], "want 0x1000 to"), ([(1 << 52, 4096)], "gpa: want 0 to")])
def test_slots_that_are_refused_at_once(slots, words):
    with pytest.raises(ValueError, match=words):
        GuestMemory.from_slots(slots)
