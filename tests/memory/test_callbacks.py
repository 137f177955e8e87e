# SPDX-License-Identifier: Apache-2.0
"""GuestMemory.from_callbacks(): the same answers as memory that is there, from few calls."""

import gc
import os
import subprocess
import sys
import threading
import weakref

import builders
import numpy as np
import pytest
from children import outcome

import kvmmu
from kvmmu import Access, CpuModel, GuestMemory, Vcpu

FIELDS = ("gpa", "status", "error_code", "level", "pte", "pte_gpa", "pte_access", "refs")
PAGE = 4096


class Target:
    """Memory behind callbacks that count what they are asked for."""

    def __init__(self, mem, size=1 << 32):
        self.mem, self.size = mem, size
        self.calls, self.asked = 0, []

    def read(self, gpas):
        self.calls += 1
        self.asked += gpas.tolist()
        return np.frombuffer(b"".join(self.mem.read(gpa, PAGE) for gpa in gpas.tolist()), np.uint8).reshape(-1, PAGE)

    def write(self, gpas, pages):
        for gpa, page in zip(gpas.tolist(), pages, strict=True):
            self.mem.write(gpa, page.tobytes())

    def memory(self, write=False, **options):
        return GuestMemory.from_callbacks(self.read, self.write if write else None, size=self.size, **options)


def random_guest(mode, seed):
    rng = np.random.default_rng(seed)
    while True:
        tables = builders.random_tables(rng, mode, tables=14, gvas=400, memsize=1 << 30)
        mem = GuestMemory.from_pages(*tables.pages())
        vcpu = Vcpu(mem, CpuModel(maxphyaddr=40))
        try:
            vcpu.set_regs(**tables.regs())
            return mem, vcpu, tables
        except kvmmu.GeneralProtection:
            continue


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("mode", ["32", "pae", "4l", "5l"])
def test_batches_are_those_of_memory_that_is_there(mode, seed):
    """Every column, and what is mapped."""
    mem, vcpu, tables = random_guest(mode, seed)
    target = Target(mem)
    lazy = Vcpu(target.memory(), CpuModel(maxphyaddr=40))
    lazy.set_regs(**tables.regs())
    gva = np.array(tables.gvas, np.uint64)
    access = np.random.default_rng(seed).choice(np.array([0, 2, 4, 6, 16, 20], np.uint8), gva.size)
    for threads in (1, 2):
        expected = vcpu.gva_walk.translate(gva, access, fields=FIELDS, set_ad=False)
        found = lazy.gva_walk.translate(gva, access, fields=FIELDS, set_ad=False, threads=threads)
        for name in FIELDS:
            np.testing.assert_array_equal(getattr(expected, name), getattr(found, name), name)
    assert len(set(target.asked)) == len(target.asked)
    a, b = vcpu.gva_walk.mappings(), lazy.gva_walk.mappings()
    assert list(a) == list(b)


def test_scalar_calls():
    """gva_to_gpa(), walk_record(), span(), faults with their rule."""
    mem, vcpu, tables = random_guest("4l", 8)
    for gva in tables.gvas[:150]:
        lazy = Vcpu(Target(mem).memory(), CpuModel(maxphyaddr=40))
        lazy.set_regs(**tables.regs())
        assert lazy.gva_walk.walk_record(gva) == vcpu.gva_walk.walk_record(gva)
        lazy.mem.drop_cached()
        try:
            assert lazy.gva_walk.gva_to_gpa(gva) == vcpu.gva_walk.translate(np.array([gva], np.uint64), set_ad=False).gpa[0]
        except kvmmu.GuestFault as error:
            with pytest.raises(type(error)) as expected:
                vcpu.gva_walk.gva_to_gpa(gva)
            assert (error.rule, error.entry, error.level) == (expected.value.rule, expected.value.entry, expected.value.level)


@pytest.mark.parametrize("kind", ["ept", "npt"])
def test_two_stages(kind):
    """Tables of both stages come by callbacks; 4-on-4 asks as often as it reads."""
    mem = GuestMemory(64 << 20)
    first = kvmmu.PageTables(mem, "4l", frames=range(1 << 20, 2 << 20, PAGE))
    gva = np.arange(0x40000000, 0x40000000 + 256 * PAGE, PAGE, dtype=np.uint64)
    first.map(gva, np.arange(8 << 20, (8 << 20) + 256 * PAGE, PAGE, dtype=np.uint64), accessed=True, dirty=True)
    stage = kvmmu.PageTables(mem, "ept" if kind == "ept" else "4l", frames=range(2 << 20, 3 << 20, PAGE))
    for gpa in range(0, 16 << 20, PAGE):
        stage.map(gpa, gpa, accessed=True, dirty=True)
    target = Target(mem, 64 << 20)
    vcpus = [Vcpu(memory, tdp=kind) for memory in (mem, target.memory())]
    results = []
    for vcpu in vcpus:
        vcpu.set_regs(cr0=0x80010033, cr3=stage.root, cr4=0x20, efer=0xD00)
        vcpu.enter_nested(stage.second_stage(), **builders.mode_regs("4l", first.root))
        results.append(vcpu.gva_walk.translate(gva, Access.USER, fields=FIELDS, set_ad=False))
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(results[0], name), getattr(results[1], name))
    assert not results[0].status.any()
    assert target.calls <= 24
    assert list(vcpus[0].gva_walk.mappings()) == list(vcpus[1].gva_walk.mappings())


def big_guest(pages=1 << 20):
    """Identity mapping of many pages by 4K leaves, in memory of its own."""
    mem = GuestMemory.from_pages([0], np.zeros((1, PAGE), np.uint8))
    count = pages // 512
    tables = np.zeros((count + 2 + -(-count // 512), 512), np.uint64)
    base = 1 << 20
    uppers = -(-count // 512)
    tables[0, 0] = base + PAGE | 0x27
    tables[1, :uppers] = (base + PAGE * (2 + np.arange(uppers))) | 0x27
    leaf_tables = base + PAGE * (2 + uppers + np.arange(count))
    tables[2:2 + uppers].reshape(-1)[:count] = leaf_tables | 0x27
    tables[2 + uppers:] = (np.arange(pages, dtype=np.uint64) << np.uint64(12) | np.uint64(0x67)).reshape(count, 512)
    del mem
    return base, tables


def test_a_batch_of_a_million_asks_six_times_at_most():
    """One call for each level, and no page twice."""
    base, tables = big_guest()
    calls, asked = [], []

    def read(gpas):
        calls.append(gpas.size)
        asked.extend(gpas.tolist())
        return tables[((gpas - np.uint64(base)) >> np.uint64(12)).astype(np.int64)]

    vcpu = Vcpu(GuestMemory.from_callbacks(read))
    vcpu.set_regs(**builders.mode_regs("4l", base))
    gva = np.random.default_rng(1).integers(0, 1 << 32, 1_000_000, dtype=np.uint64)
    t = vcpu.gva_walk.translate(gva)
    assert not t.status.any()
    np.testing.assert_array_equal(t.gpa, gva)
    assert len(calls) <= 6
    assert len(asked) == len(set(asked)) <= 1.2 * len(tables)
    before = len(calls)
    vcpu.gva_walk.translate(gva)
    assert len(calls) == before


def test_few_pages_are_kept_between_calls():
    """A batch may need more than cache_pages; later ones begin anew."""
    base, tables = big_guest(1 << 14)
    asked = []

    def read(gpas):
        asked.extend(gpas.tolist())
        return tables[((gpas - np.uint64(base)) >> np.uint64(12)).astype(np.int64)]

    vcpu = Vcpu(GuestMemory.from_callbacks(read, size=1 << 30, cache_pages=1))
    vcpu.set_regs(**builders.mode_regs("4l", base))
    gva = np.arange(0, 1 << 26, PAGE, dtype=np.uint64)
    for _ in range(3):
        assert not vcpu.gva_walk.translate(gva).status.any()
        vcpu.mem.drop_cached()
    for gva in range(0, 1 << 26, 1 << 21):
        assert vcpu.gva_walk.gva_to_gpa(gva) == gva
    assert len(asked) > 3 * len(tables)
    assert len(vcpu.gva_walk.mappings(merge=False)) == 1 << 14
    vcpu.gva_walk.gva_to_gpa(0)
    for gva in range(0, 1 << 26, 1 << 21):              # as many tables as there are, of which few stay
        vcpu.mem.read(base + (gva >> 21) * PAGE, 8)
        assert int(repr(vcpu.mem).split()[-3]) <= 64 + 16


def test_accessed_and_dirty_bits():
    """Without a write callback none are set; with one, in the pages that are kept, until flush() gives them to it."""
    mem, vcpu, tables = random_guest("4l", 3)
    row = next(m for m in vcpu.gva_walk.mappings() if m.pte_access & 2 and not m.dirty and m.pkey == 0)
    target = Target(mem)
    before = mem.read_u64(row.pte_gpa)
    for write in (False, True):
        lazy = Vcpu(target.memory(write=write), CpuModel(maxphyaddr=40))
        lazy.set_regs(**tables.regs())
        assert lazy.gva_walk.translate(np.array([row.gva], np.uint64), Access.WRITE | Access.AC).gpa[0] == row.gpa
        assert lazy.mem.read_u64(row.pte_gpa) == (before | 0x60 if write else before)
        assert mem.read_u64(row.pte_gpa) == before
    lazy.mem.flush()
    assert mem.read_u64(row.pte_gpa) == before | 0x60
    lazy.mem.write_u64(row.pte_gpa, 0)
    assert mem.read_u64(row.pte_gpa) == lazy.mem.read_u64(row.pte_gpa) == 0
    with pytest.raises(ValueError, match="read-only"):
        target.memory().write(0, b"x")
    with pytest.raises(ValueError, match="read-only"):
        target.memory().flush()


def test_bytes():
    """read() and write() over pages that are kept and others, and beyond the end."""
    rng = np.random.default_rng(4)
    mem = GuestMemory(rng.integers(0, 256, 64 * PAGE, np.uint8))
    lazy = Target(mem, 64 * PAGE).memory(write=True)
    for _ in range(100):
        gpa, n = int(rng.integers(0, 63 * PAGE)), int(rng.integers(0, 30 * PAGE))
        assert lazy.read(gpa, n) == mem.read(gpa, n)
        data = rng.integers(0, 256, min(n, 64 * PAGE - gpa), np.uint8).tobytes()
        lazy.write(gpa, data)
        assert mem.read(gpa, len(data)) == data
    assert lazy.read(64 * PAGE - 4, 8)[4:] == bytes(4)
    assert lazy.is_backed(63 * PAGE, PAGE)
    assert not lazy.is_backed(63 * PAGE, PAGE + 1)
    assert lazy.slots == [(0, 64 * PAGE, False)]
    with pytest.raises(ValueError, match="write to a hole"):
        lazy.write(64 * PAGE - 1, b"xx")
    assert "64" not in repr(lazy) or "callbacks" in repr(lazy)


@pytest.mark.parametrize(("answer", "error", "words"), [
    (lambda gpas: 1 // 0, ZeroDivisionError, "division"),
    (lambda gpas: np.zeros((gpas.size + 1, PAGE), np.uint8), ValueError, "read: want 1 pages of 4096 bytes, got shape"),
    (lambda gpas: np.zeros((gpas.size, PAGE // 2), np.uint8), ValueError, "read: want 1 pages"),
    (lambda gpas: np.zeros((gpas.size, 512), np.int16), ValueError, "got dtype int16"),
    (lambda gpas: b"short", ValueError, "read: want 1 pages"),
    (lambda gpas: None, TypeError, "got NoneType"),
    (lambda gpas: 7, TypeError, "got int"),
    (lambda gpas: "x" * PAGE, TypeError, "got str"),
    (lambda gpas: np.ma.zeros((gpas.size, PAGE), np.uint8), ValueError, "read: want an array without a mask"),
], ids=range(9))
def test_callbacks_that_fail(answer, error, words):
    """The error comes to the caller, and the memory works on when the callback does."""
    good = False

    def read(gpas):
        return bytes(PAGE) * gpas.size if good else answer(gpas)

    vcpu = Vcpu(GuestMemory.from_callbacks(read))
    vcpu.set_regs(**builders.mode_regs("4l", 0x1000))
    gva = np.arange(100, dtype=np.uint64)
    for call in (lambda: vcpu.gva_walk.translate(gva), lambda: vcpu.gva_walk.gva_to_gpa(5), lambda: vcpu.gva_walk.mappings(),
                 lambda: vcpu.gva_walk.walk_record(5), lambda: vcpu.mem.read(0, 8)):
        with pytest.raises(error, match=words) as caught:
            call()
        if error is ZeroDivisionError:
            assert any("in read() of a GuestMemory, asked for 1 pages" in note for note in caught.value.__notes__)
    good = True
    assert (vcpu.gva_walk.translate(gva).status == 1).all()
    assert vcpu.mem.read(0, 8) == bytes(8)


def test_a_callback_that_comes_back():
    """It gets an error, and nothing waits for itself."""
    inner = []

    def read(gpas):
        for call in (lambda: mem.read(0, 8), lambda: vcpu.gva_walk.gva_to_gpa(5), lambda: vcpu.gva_walk.mappings()):
            with pytest.raises(RuntimeError, match="a callback of a GuestMemory used the memory that it serves") as caught:
                call()
            inner.append(caught)
        return bytes(PAGE) * gpas.size

    mem = GuestMemory.from_callbacks(read)
    vcpu = Vcpu(mem)
    vcpu.set_regs(**builders.mode_regs("4l", 0x1000))
    with pytest.raises(kvmmu.PageFault):
        vcpu.gva_walk.gva_to_gpa(0x5000)
    assert len(inner) >= 3


def test_pages_that_are_dropped_while_others_come():
    """One thread drops what another fetches: no table is written beyond its end, and each fetch comes to an end."""
    def work():
        sys.setswitchinterval(1e-6)
        mem = GuestMemory.from_callbacks(lambda gpas: np.ones((gpas.size, PAGE), np.uint8), size=1 << 40, cache_pages=1 << 20)
        done = threading.Event()

        def drop():
            while not done.is_set():
                mem.drop_cached()

        thread = threading.Thread(target=drop, daemon=True)
        thread.start()
        for base in range(0, 100 * 1000, 1000):
            mem.fetch(np.arange(base, base + 600))              # room for 1,024 pages; an empty table has less than for 400
            mem.fetch(np.arange(base + 600, base + 1000))
        done.set()
        thread.join(5)
        assert mem.read(5, 1) == b"\1"

    assert outcome(work, seconds=10) == (0, "ok NoneType")


def test_frames_that_are_fetched_twice():
    """Each is asked for once, and those beyond the size never."""
    target = Target(GuestMemory(64 * PAGE), 64 * PAGE)
    mem = target.memory()
    mem.fetch(np.array([5, 3, 5, 1 << 52, 64]))
    mem.fetch(np.array([3, 63, 5]))
    assert target.asked == [3 * PAGE, 5 * PAGE, 63 * PAGE]


@pytest.mark.parametrize("name", ["drop_cached", "__init__", "flush", "write", "fetch", "walk"])
@pytest.mark.parametrize("where", ["read", "write"])
def test_uses_that_a_callback_may_not_make(name, where):
    """All that changes what is kept is refused in it, and the memory works on."""
    caught = []

    def inner():
        vcpu = Vcpu(mem)
        vcpu.set_regs(**builders.mode_regs("4l", 0x1000))
        calls = {"drop_cached": mem.drop_cached, "__init__": lambda: mem.__init__(print), "flush": mem.flush,
                 "write": lambda: mem.write(0, b"x"), "fetch": lambda: mem.fetch(np.arange(3)),
                 "walk": lambda: vcpu.gva_walk.gva_to_gpa(5)}
        with pytest.raises(RuntimeError, match="a callback of a GuestMemory used the memory that it serves") as error:
            calls[name]()
        caught.append(error)

    def read(gpas):
        if where == "read" and len(caught) < 20:
            inner()
        return bytes(PAGE) * gpas.size

    def write(gpas, pages):
        if where == "write":
            inner()

    mem = GuestMemory.from_callbacks(read, write, size=1 << 20)
    mem.fetch(np.arange(1, 3))
    mem.write(0, b"data")
    assert mem.read(0, 4) == b"data"
    assert 0 < len(caught) < 20
    mem.drop_cached()


def test_a_walk_whose_callback_drops_the_pages():
    """It ends with the error, not never."""
    calls = []

    def read(gpas):
        calls.append(gpas)
        if len(calls) < 50:
            mem.drop_cached()
        return bytes(PAGE) * gpas.size

    mem = GuestMemory.from_callbacks(read)
    vcpu = Vcpu(mem)
    vcpu.set_regs(**builders.mode_regs("4l", 0x1000))
    with pytest.raises(RuntimeError, match="used the memory that it serves"):
        vcpu.gva_walk.gva_to_gpa(0x5000)
    assert len(calls) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork()")
def test_a_fork_while_another_thread_is_in_a_callback():
    """The child cannot use this memory, and says so at once; another memory works there."""
    inside, leave = threading.Event(), threading.Event()

    def read(gpas):
        if threading.current_thread() is thread:
            inside.set()
            leave.wait(10)
        return bytes(PAGE) * gpas.size

    mem = GuestMemory.from_callbacks(read, size=1 << 20)
    thread = threading.Thread(target=lambda: mem.read(0, 8), daemon=True)
    thread.start()
    assert inside.wait(10)
    try:
        signal, text = outcome(lambda: mem.read(0, 8), seconds=2)
        other = outcome(lambda: GuestMemory.from_callbacks(lambda gpas: bytes(PAGE) * gpas.size).read(0, 8), seconds=2)
    finally:
        leave.set()
        thread.join(10)
    assert signal == 0
    assert text.startswith("RuntimeError: this memory was in a callback of another thread when the process was forked")
    assert other == (0, "ok bytes")
    assert outcome(lambda: mem.read(0, 8), seconds=2) == (0, "ok bytes")


def dirty_target(fail=False):
    """200 tables' worth of pages, each mapped by an entry without accessed bits; vCPU, its target, and what it was given."""
    base, tables = big_guest(200 * 512)
    tables[2:] &= ~np.uint64(0x60)
    mem = GuestMemory.from_pages(base + PAGE * np.arange(len(tables), dtype=np.uint64), tables)
    target, given = Target(mem), []

    def write(gpas, pages):
        if fail:
            raise OSError("no")
        given.append(gpas.tolist())
        target.write(gpas, pages)

    lazy = GuestMemory.from_callbacks(target.read, write, size=1 << 32, cache_pages=1)
    vcpu = Vcpu(lazy)
    vcpu.set_regs(**builders.mode_regs("4l", base))
    return vcpu, mem, given, base + 3 * PAGE


def test_accessed_bits_outlive_pages_that_leave():
    """Pages that walks have changed go to the write callback before they are forgotten; others never do."""
    vcpu, mem, given, leaf = dirty_target()
    vcpu.mem.read(leaf + 0x1000_0000, 5000)                     # not changed
    for n in range(200):
        vcpu.gva_walk.gva_to_gpa(n << 21)
    assert 1 <= len(given) <= 4
    vcpu.mem.flush()
    assert all(mem.read_u64(leaf + n * PAGE) & 0x20 for n in range(200))
    everything = [gpa for call in given for gpa in call]
    assert all(gpa < leaf + 200 * PAGE for gpa in everything)
    calls = len(given)
    vcpu.mem.flush()
    assert len(given) == calls


def test_a_write_callback_that_fails_as_pages_leave():
    """The walk raises, and the bits stay for the next try."""
    vcpu, mem, _, leaf = dirty_target(fail=True)
    errors = 0
    for n in range(200):
        try:
            vcpu.gva_walk.gva_to_gpa(n << 21)
        except OSError as error:
            errors += str(error) == "no"
    assert errors > 100
    assert int(repr(vcpu.mem).split()[-3]) > 64
    assert not mem.read_u64(leaf) & 0x20


@pytest.mark.parametrize("spoil", [
    lambda pages: pages.fill(7),
    lambda pages: pages.resize((1, 5), refcheck=False),
    lambda pages: setattr(pages, "shape", (-1,)),
    lambda pages: setattr(pages, "dtype", np.uint64),
], ids=["fill", "resize", "shape", "dtype"])
def test_what_a_write_callback_does_to_its_array(spoil):
    """The array is its own."""
    mem = GuestMemory.from_callbacks(lambda gpas: bytes(PAGE) * gpas.size, lambda gpas, pages: spoil(pages), size=1 << 20)
    mem.fetch(np.arange(2))
    mem.write(PAGE - 2, b"data")
    assert mem.read(PAGE - 3, 6) == b"\0data\0"
    assert mem.read(0, 8) == bytes(8)


def test_a_write_keeps_bits_that_were_set_meanwhile():
    """A walk in another thread sets an accessed bit in the page that is written, while the callback runs."""
    base, tables = big_guest(512)
    tables &= ~np.uint64(0x60)
    mem = GuestMemory.from_pages(base + PAGE * np.arange(len(tables), dtype=np.uint64), tables)
    target = Target(mem)

    def write(gpas, pages):
        target.write(gpas, pages)
        if not walked:
            walked.append(threading.Thread(target=lambda: vcpu.gva_walk.gva_to_gpa(0)))
            walked[0].start()
            walked[0].join(5)

    walked = []
    vcpu = Vcpu(GuestMemory.from_callbacks(target.read, write, size=1 << 32))
    vcpu.set_regs(**builders.mode_regs("4l", base))
    leaf = base + 3 * PAGE
    vcpu.mem.fetch(np.arange(base >> 12, (base >> 12) + 4))
    vcpu.mem.write_u64(leaf + 8, 0x1234)
    assert walked
    assert vcpu.mem.read_u64(leaf) & 0x20
    assert vcpu.mem.read_u64(leaf + 8) == mem.read_u64(leaf + 8) == 0x1234
    vcpu.mem.flush()
    assert mem.read_u64(leaf) & 0x20


def test_memory_without_its_callbacks():
    """Made without __init__(): each use names what is missing."""
    kind = type(GuestMemory.from_callbacks(print))

    class Mine(kind):
        def __init__(self):
            pass

    for mem in (kind.__new__(kind), Mine()):
        assert "not initialized" in repr(mem)
        assert mem.slots == []
        for call in (lambda mem: mem.read(0, 1), lambda mem: mem.write(0, b"x"), lambda mem: mem.flush(),
                     lambda mem: mem.drop_cached(), lambda mem: mem.fetch(np.arange(3)), lambda mem: mem.read_u64(0),
                     lambda mem: mem.pages_of(0, 1)):
            with pytest.raises(RuntimeError, match=r"has no callbacks: .* has to call super\(\)\.__init__"):
                call(mem)
        vcpu = Vcpu(mem)
        vcpu.set_regs(**builders.mode_regs("4l", 0x1000))
        with pytest.raises(RuntimeError, match="has no callbacks"):
            vcpu.gva_walk.gva_to_gpa(0)
        mem = kind.__init__(mem, lambda gpas: bytes(PAGE) * gpas.size) or mem
        assert mem.read(0, 1) == b"\0"


def test_threads_share_the_pages():
    """Two walks at once: each page is asked for once or twice, and both are right."""
    base, tables = big_guest(1 << 16)
    target = []
    lock = threading.Lock()

    def read(gpas):
        with lock:
            target.append(gpas.size)
        return tables[((gpas - np.uint64(base)) >> np.uint64(12)).astype(np.int64)]

    mem = GuestMemory.from_callbacks(read)
    gva = np.random.default_rng(2).integers(0, 1 << 28, 200_000, dtype=np.uint64)
    wrong = []

    def work():
        vcpu = Vcpu(mem)
        vcpu.set_regs(**builders.mode_regs("4l", base))
        for _ in range(3):
            wrong.append(int((vcpu.gva_walk.translate(gva).gpa != gva).sum()))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [0] * 12
    assert sum(target) == len(tables)


def test_pae_registers_come_by_callbacks():
    """The PDPTEs that a load of CR3 reads."""
    mem, _, tables = random_guest("pae", 5)
    lazy = Vcpu(Target(mem).memory(), CpuModel(maxphyaddr=40))
    lazy.set_regs(**tables.regs())
    assert lazy.pdptrs == tuple(mem.read_u64(tables.cr3 + 8 * i) for i in range(4))


def test_what_needs_slots_says_so():
    """A machine, and whoever builds tables."""
    mem = GuestMemory.from_callbacks(lambda gpas: bytes(PAGE) * gpas.size, size=1 << 20)
    vcpu = Vcpu(mem)
    with pytest.raises(ValueError, match="memory of callbacks"):
        vcpu.access(0, 0)
    with pytest.raises(ValueError, match="memory of callbacks"):
        kvmmu.PageTables(mem).map(0, 0)
    with pytest.raises(ValueError, match="no slots of its own"):
        mem.add_slot(1 << 21, PAGE)
    with pytest.raises(ValueError, match="no slots of its own"):
        mem.remove_slot(0)
    for bad, error in ((5, TypeError), (None, TypeError)):
        with pytest.raises(error, match="read: want a function"):
            GuestMemory.from_callbacks(bad)
    with pytest.raises(ValueError, match="size: 0x5 is not a multiple"):
        GuestMemory.from_callbacks(print, size=5)


def test_memory_without_slots():
    """All of it is a hole."""
    mem = GuestMemory.from_slots([])
    assert mem.slots == []
    assert mem.read(0, 8) == bytes(8)
    vcpu = Vcpu(mem)
    vcpu.set_regs(**builders.mode_regs("4l", 0x1000))
    assert (vcpu.gva_walk.translate(np.arange(1000, dtype=np.uint64)).error_code == 0).all()
    assert len(vcpu.gva_walk.mappings()) == 0
    with pytest.raises(kvmmu.PageFault, match="hole"):
        vcpu.gva_walk.gva_to_gpa(0)
    mem.add_slot(0x1000, PAGE)
    assert mem.slots == [(0x1000, PAGE, False)]


def test_a_slot_that_ends_within_a_page():
    """Its last page is a copy, with zeros behind."""
    data = np.arange(5000, dtype=np.int64).astype(np.uint8)
    mem = GuestMemory(data)
    assert mem.slots == [(0, PAGE, False), (PAGE, PAGE, False)]
    assert mem.read(0, 8192) == data.tobytes() + bytes(8192 - 5000)
    mem.add_slot(0x10000, bytes(10))
    assert mem.slots[-1] == (0x10000, PAGE, True)
    mem.write(4, b"first")
    assert data[4:9].tobytes() == b"first"
    with pytest.raises(ValueError, match="not a multiple"):
        GuestMemory(5000)
    with pytest.raises(ValueError, match="overlap"):
        mem.add_slot(0x8000, np.zeros(0x8001, np.uint8))
    assert len(mem.slots) == 3
    for size in (0, -1):
        with pytest.raises(ValueError, match="size_or_buffer"):
            GuestMemory(size)
    with pytest.raises(ValueError, match="size_or_buffer"):
        GuestMemory(b"")


def test_nothing_is_kept_of_threads_that_ended():
    """What a walk notes of its thread goes with the thread."""
    mem = GuestMemory.from_callbacks(lambda gpas: np.zeros((gpas.size, 4096), np.uint8), size=1 << 20)
    noted = []

    class Note:
        pass

    def walk():
        vcpu = Vcpu(mem)
        vcpu.set_regs(cr0=0x80000001, cr3=0x1000, cr4=0, efer=0)
        vcpu.gva_walk.walk_record(0x1000)
        threading.current_thread().note = note = Note()
        noted.append(weakref.ref(note))

    gc.collect()
    before = len(gc.get_objects())
    for _ in range(200):
        thread = threading.Thread(target=walk)
        thread.start()
        thread.join()
    del thread
    gc.collect()
    assert all(ref() is None for ref in noted)
    assert len(gc.get_objects()) - before < 400             # 200 weak references, and no dict entry for each thread
    assert sys.getsizeof(mem) < 1000


def test_the_room_of_memory_makes_callback_memory_by_itself():
    """`from_callbacks()` works with the memory room alone; nobody has to load the rest."""
    code = "from kvmmu.memory._memory import GuestMemory as m; print(m.from_callbacks(lambda gpas: b'', size=4096).slots)"
    done = subprocess.run([sys.executable, "-Pc", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[(0, 4096, True)]\n"
