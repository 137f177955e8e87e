# SPDX-License-Identifier: Apache-2.0
"""Who reads guest memory owns it: batches, handles, register sets and replays over slots that come and go, in any thread.

And who keeps nothing: what only remembers where it walked last keeps no buffer.
"""

import contextlib
import copy
import gc
import mmap
import pickle
import signal
import sys
import threading
import time

import numpy as np
import pytest
from alarms import Stop, alarms
from builders import PageTables

import kvmmu
from kvmmu import Access, CpuModel, Ept, GuestMemory, Npt, Pml, Regs, Translation, Vcpu, Walker
from kvmmu.traces import Op

PAGE = 0x1000
HIGH = 1 << 30
REGS = Regs(cr0=0x80010001, cr3=0x1000, cr4=0x20, efer=0xD00)
GVAS = np.arange(200, dtype=np.uint64) * np.uint64(PAGE)


def registers(regs=REGS):
    return {name: getattr(regs, name) for name in ("cr0", "cr3", "cr4", "efer")}


def memory_with_high_leaves(leaf_tables=1):
    """(memory, mmap behind a second slot, rows): tables in the first slot, tables of leaves in the second."""
    mem = GuestMemory(0x100000)
    buffer = mmap.mmap(-1, leaf_tables * PAGE)
    mem.write_u64(0x1000, 0x2067)
    mem.write_u64(0x2000, 0x3067)
    for i in range(leaf_tables):
        mem.write_u64(0x3000 + 8 * i, HIGH + i * PAGE | 0x67)
    entries = np.arange(512 * leaf_tables, dtype=np.uint64) * np.uint64(PAGE) | np.uint64(0x67)
    buffer[:] = entries.tobytes()
    mem.add_slot(HIGH, buffer)
    return mem, buffer


def vcpu_of(mem, **options):
    vcpu = Vcpu(mem, **options)
    vcpu.set_regs(**registers())
    return vcpu


def tables_alive():
    gc.collect()
    return sum(type(thing).__name__ == "SlotTable" for thing in gc.get_objects())


# ---- who keeps the buffers ---------------------------------------------------------------------------------------------------

def test_a_handle_keeps_a_slot_that_goes():
    """Until refresh(): the buffer cannot be closed; afterwards it can, and the slot is a hole."""
    mem, buffer = memory_with_high_leaves()
    walk = vcpu_of(mem).gva_walk
    walker = Walker(walk)
    mem.remove_slot(HIGH)
    with pytest.raises(BufferError):
        buffer.close()
    walker.refresh()
    buffer.close()
    assert 1 == walk.translate(GVAS).status[0]


def test_a_bytearray_cannot_be_resized_under_a_handle():
    """Its memory may be gone, and its slot."""
    buffer = bytearray(0x10000)
    if np.frombuffer(buffer, np.uint8).ctypes.data % 8:
        pytest.skip("the bytearray is not aligned")
    mem = GuestMemory(PAGE)
    mem.add_slot(HIGH, buffer)
    walker = Walker(vcpu_of(mem).gva_walk)
    mem.remove_slot(HIGH)
    with pytest.raises(BufferError):
        buffer.append(1)
    walker.refresh()
    buffer.append(1)


def test_the_bytes_that_come_back_do_not_free_a_slot():
    """Neither the array of remove_slot(), nor what it is a view of, can let go of the export."""
    buffer = bytearray(0x10000)
    if np.frombuffer(buffer, np.uint8).ctypes.data % 8:
        pytest.skip("the bytearray is not aligned")
    mem = GuestMemory(PAGE)
    mem.add_slot(HIGH, buffer)
    walker = Walker(vcpu_of(mem).gva_walk)
    data = mem.remove_slot(HIGH)
    view = data.base
    while not isinstance(view, memoryview) and getattr(view, "base", None) is not None:
        view = view.base
    if isinstance(view, memoryview):
        with contextlib.suppress(BufferError):
            view.release()
    with pytest.raises(BufferError):
        buffer.append(1)
    own = GuestMemory(PAGE)
    own.add_slot(HIGH, PAGE)
    with pytest.raises(ValueError, match="resize"):
        own.remove_slot(HIGH).resize(1, refcheck=False)
    assert walker.walk is not None


def test_what_only_remembers_keeps_no_buffer():
    """Walks, short cuts, register sets, second stages and replays have walked a slot; it goes, and its buffer can be closed."""
    mem, buffer = memory_with_high_leaves()
    vcpu, nested = vcpu_of(mem), Vcpu(mem)
    sets = vcpu.gva_walk.prepare([REGS, (REGS, None)])
    nested.enter_nested(Npt(0x1000, cr4=0x20, efer=0xD00), cr0=1)
    for _ in range(2):
        vcpu.gva_walk.gva_to_gpa(0)
        vcpu.gva_walk.translate(GVAS, Access.USER)
        vcpu.gva_walk.translate(GVAS, regs=sets, ctx=np.zeros(GVAS.size, np.uint32))
        vcpu.gva_walk.walk_record(0)
        nested.gva_walk.translate(GVAS, Access.USER)
        kvmmu.replay([{"op": np.zeros(200, np.uint8), "addr": GVAS, "access": np.full(200, 4, np.uint8)}], vcpu)
    data = mem.remove_slot(HIGH)
    with pytest.raises(BufferError):
        buffer.close()
    del data
    gc.collect()
    buffer.close()


@pytest.mark.parametrize("threads", [1, 2])
def test_a_batch_finishes_on_the_slots_that_it_started_with(threads):
    """remove_slot() in the middle of a batch of another thread: all rows pass, and the buffer lives until the end."""
    mem, buffer = memory_with_high_leaves(512)
    walk = vcpu_of(mem).gva_walk
    gva = np.random.default_rng(1).integers(0, 512 * 512, 2_000_000, np.uint64) * np.uint64(PAGE)
    results = []
    thread = threading.Thread(target=lambda: results.append(walk.translate(gva, Access.USER, threads=threads)))
    thread.start()
    time.sleep(0.01)
    data = mem.remove_slot(HIGH)
    del data
    closed = False
    while not closed:
        try:
            buffer.close()
            closed = True
        except BufferError:
            time.sleep(0.001)
    thread.join()
    statuses = np.unique(results[0].status).tolist()
    assert statuses in ([0], [1])                                       # it began before the slot went, or after
    assert 1 == walk.translate(gva[:1]).status[0]


def test_no_table_is_kept_longer_than_somebody_reads_it():
    """A hundred states of the slots, walked by all who walk: a few tables at most are alive afterwards."""
    mem, _ = memory_with_high_leaves()
    vcpu, nested = vcpu_of(mem), Vcpu(mem)
    nested.set_regs(cr0=1)
    nested.enter_nested(Ept(0x8000 | 0x1E))
    sets, under = vcpu.gva_walk.prepare([REGS]), nested.gva_walk.prepare([nested.regs])
    vcpu.gva_walk.gva_to_gpa(0)
    before = tables_alive()
    assert before                                                       # the collector sees them
    for number in range(100):
        mem.add_slot(1 << 40, PAGE)
        vcpu.gva_walk.translate(GVAS, regs=sets)
        vcpu.gva_walk.gva_to_gpa(0)
        nested.gva_walk.translate(GVAS[:4])
        nested.gva_walk.translate(GVAS[:4], regs=under)
        mem.remove_slot(1 << 40)
        assert number or tables_alive() <= before + 2
    assert tables_alive() <= before + 2


# ---- arguments first, then pointers ------------------------------------------------------------------------------------------

def test_slots_that_fields_change():
    """Code of the caller's runs before anything is taken."""
    mem, _ = memory_with_high_leaves()
    walk = vcpu_of(mem).gva_walk

    def fields():
        yield "gpa"
        for number in range(20):
            mem.add_slot((1 << 40) + number * 0x200000, 0x100000)
            walk.gva_to_gpa(0)
        yield "status"

    t = walk.translate(GVAS, Access.USER, fields=fields())
    assert GVAS.tolist() == t.gpa.tolist()


def test_nested_guests_that_fields_and_columns_leave():
    """The batch walks what is in force when all its arguments are known."""
    mem, _ = memory_with_high_leaves()
    vcpu = vcpu_of(mem)

    class Out(Translation):
        __slots__ = ()

        @property
        def gpa(self):
            vcpu.leave_nested()
            gc.collect()
            return Translation.gpa.__get__(self)

        @gpa.setter
        def gpa(self, column):
            Translation.gpa.__set__(self, column)

    def fields():
        yield "gpa"
        vcpu.leave_nested()
        gc.collect()
        yield "status"

    for arguments in ({"fields": fields()}, {"out": Out.empty(GVAS.size)}):
        vcpu.enter_nested(Ept(0x8000 | 0x1E), **registers())
        t = vcpu.gva_walk.translate(GVAS, Access.USER, **arguments)
        assert not t.status.any()


def test_records_beside_a_thread_that_enters_and_leaves():
    """walk_record() takes the walk as it is at one moment."""
    mem, _ = memory_with_high_leaves()
    for gpa, entry in ((0x8000, 0x9007), (0x9000, 0xA007), (0xA000, 0xB7)):
        mem.write_u64(gpa, entry)
    vcpu = vcpu_of(mem)
    end, wrong = time.monotonic() + 0.7, []

    def record():
        while time.monotonic() < end:
            for walk in (vcpu.gva_walk, vcpu.ngpa_walk):
                try:
                    record = walk.walk_record(0x123)
                    if record.rule == "misconfig":
                        wrong.append(record)
                    walk.translate(GVAS)
                except RuntimeError as error:
                    if "not in use" not in str(error):
                        wrong.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        thread = threading.Thread(target=record)
        thread.start()
        while time.monotonic() < end:
            vcpu.enter_nested(Ept(0x8000 | 0x1E), **registers())
            vcpu.leave_nested()
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []


@pytest.mark.parametrize("column", ["ctx", "access", "gva"])
def test_columns_that_a_thread_changes(column):
    """Rows may come out wrong, and nothing else does: every index is held in its range where it is used."""
    mem, _ = memory_with_high_leaves()
    vcpu = vcpu_of(mem)
    n = 2_000_000
    columns = {"gva": np.zeros(n, np.uint64), "access": np.zeros(n, np.uint8), "ctx": np.zeros(n, np.uint32)}
    sets = vcpu.gva_walk.prepare([REGS, REGS, Regs(cr0=1, cr3=0, cr4=0, efer=0)])
    stop = threading.Event()

    def change():
        while not stop.is_set():
            columns[column][:] = np.iinfo(columns[column].dtype).max
            columns[column][:] = 0

    thread = threading.Thread(target=change)
    thread.start()
    for _ in range(40):
        try:
            vcpu.gva_walk.translate(columns["gva"], columns["access"], regs=sets, ctx=columns["ctx"])
        except ValueError as error:
            assert column in str(error)
    stop.set()
    thread.join()
    clean = vcpu.gva_walk.translate(GVAS, Access.USER, regs=sets, ctx=np.zeros(GVAS.size, np.uint32))
    assert GVAS.tolist() == clean.gpa.tolist()                          # nothing of it is remembered


# ---- columns of out= ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [1, 5, 500, 5000])
def test_out_shares_no_memory(n):
    """With gva, access, ctx, or another column: ValueError names both, and nothing is written."""
    walk = vcpu_of(memory_with_high_leaves()[0]).gva_walk
    sets = walk.prepare([REGS, REGS])
    gva, access, ctx = GVAS[np.arange(n) % 200], np.zeros(8 * n, np.uint8), np.zeros(2 * n, np.uint32)
    both = np.zeros(8 * n, np.uint8)
    cases = {
        "out.gpa and gva": ({"gpa": gva}, {}), "out.status and access": ({"status": access[:n]}, {"access": access[:n]}),
        "out.error_code and ctx": ({"error_code": ctx[n // 2:n // 2 + n]}, {"regs": sets, "ctx": ctx[:n]}),
        "out.gpa and out.status": ({"gpa": both.view(np.uint64), "status": both[7 * n:]}, {}),
        "out.gpa and access": ({"gpa": access.view(np.uint64)}, {"access": access[3 * n:4 * n]}),
    }
    for text, (shared, arguments) in cases.items():
        out = Translation.empty(n)
        for name, column in shared.items():
            setattr(out, name, column)
        before = gva.copy()
        with pytest.raises(ValueError, match=text):
            walk.translate(gva, out=out, **arguments)
        assert before.tolist() == gva.tolist()
    halves = np.zeros(2 * n, np.uint64)                                 # side by side is not shared
    halves[:n] = gva
    out = Translation.empty(n)
    out.gpa = halves[n:]
    assert gva.tolist() == walk.translate(halves[:n], Access.USER, out=out).gpa.tolist()


def test_unaligned_columns():
    """Of out they are refused; arguments are copied first."""
    walk = vcpu_of(memory_with_high_leaves()[0]).gva_walk
    out = Translation.empty(3)
    out.gpa = np.frombuffer(bytearray(25), np.uint64, offset=1)
    with pytest.raises(ValueError, match=r"out\.gpa.*not aligned"):
        walk.translate(GVAS[:3], out=out)
    ctx = np.frombuffer(b"\0" + np.array([1, 0, 1], np.uint32).tobytes(), np.uint32, offset=1)
    t = walk.translate(GVAS[:3], Access.USER, regs=[Regs(cr0=1, cr3=0, cr4=0, efer=0), REGS], ctx=ctx, fields=("gpa", "level"))
    assert ([1, 0, 1], GVAS[:3].tolist()) == (t.level.tolist(), t.gpa.tolist())


# ---- register sets -----------------------------------------------------------------------------------------------------------

def test_register_sets_in_two_memories_at_once():
    """Each walk goes through its own memory."""
    walks, wants = [], []
    for shift in (0, 7):
        mem, buffer = memory_with_high_leaves()
        frames = (np.arange(512, dtype=np.uint64) + np.uint64(shift)) % np.uint64(512)
        buffer[:] = (frames * np.uint64(PAGE) | np.uint64(0x67)).tobytes()
        walks.append(vcpu_of(mem).gva_walk)
        wants.append(((np.arange(200) + shift) * PAGE).tolist() * 200)
    sets, gva = walks[0].prepare([REGS]), np.tile(GVAS, 200)
    wrong, end = [], time.monotonic() + 0.5

    def run(number):
        while time.monotonic() < end:
            if walks[number].translate(gva, Access.USER, regs=sets).gpa.tolist() != wants[number]:
                wrong.append(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_register_sets_belong_to_a_processor_model_and_a_stage():
    """Elsewhere they are refused, in a sentence; a walk of the same kind takes them, of another vCPU too."""
    mem, _ = memory_with_high_leaves()
    vcpu = vcpu_of(mem)
    plain, paired = vcpu.gva_walk.prepare([REGS]), vcpu.gva_walk.prepare([(REGS, None)])
    twin = vcpu_of(mem)
    assert GVAS.tolist() == twin.gva_walk.translate(GVAS, Access.USER, regs=plain).gpa.tolist()
    other = vcpu_of(mem, cpu=CpuModel(maxphyaddr=36))
    with pytest.raises(ValueError, match="maxphyaddr 48 and not 36"):
        other.gva_walk.translate(GVAS, regs=plain)
    twin.cpu = CpuModel(conformance="kvm")
    with pytest.raises(ValueError, match="conformance sdm and not kvm"):
        twin.gva_walk.translate(GVAS, regs=plain)

    vcpu.enter_nested(Ept(0x8000 | 0x1E), **registers())
    with pytest.raises(ValueError, match="without a second stage, this walk is under Ept"):
        vcpu.gva_walk.translate(GVAS, regs=plain)
    assert GVAS.tolist() == vcpu.gva_walk.translate(GVAS, Access.USER, regs=paired).gpa.tolist()
    with pytest.raises(ValueError, match="gva_walk"):
        vcpu.ngpa_walk.translate(GVAS, regs=paired)
    under = vcpu.gva_walk.prepare([Regs(cr0=1, cr3=0, cr4=0, efer=0)])
    vcpu.enter_nested(Ept(0x9000 | 0x1E), **registers())
    with pytest.raises(ValueError, match="prepare"):
        vcpu.gva_walk.translate(GVAS, regs=under)
    vcpu.enter_nested(Ept(0x8000 | 0x1E), **registers())
    assert 3 == vcpu.gva_walk.translate(GVAS, regs=under).status[0]
    vcpu.leave_nested()
    with pytest.raises(ValueError, match="under Ept.*without a second stage"):
        vcpu.gva_walk.translate(GVAS, regs=under)


def test_registers_reloaded_during_a_batch():
    """A batch goes on with the registers that it was given."""
    tables = PageTables("pae")
    tables.map(0x5000, 0x9000)
    mem = GuestMemory.from_pages(*tables.pages())
    vcpu = Vcpu(mem)
    regs = Regs(**tables.regs())
    sets = vcpu.gva_walk.prepare([regs])
    gva = np.full(300_000, 0x5000, np.uint64)
    results, stop = [], threading.Event()

    def batches():
        while not stop.is_set():
            results.append(np.unique(vcpu.gva_walk.translate(gva, regs=sets).status).tolist())

    thread = threading.Thread(target=batches)
    thread.start()
    empty = Regs(**(tables.regs() | {"pdptrs": (0, 0, 0, 0)}))
    while len(results) < 30:
        vcpu.gva_walk._reload(sets, 0, empty)
        vcpu.gva_walk._reload(sets, 0, regs)
    stop.set()
    thread.join()
    assert all(statuses in ([0], [1]) for statuses in results)


# ---- walks out of use, copies ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("use", ["never", "before"])
@pytest.mark.parametrize("call", [
    lambda walk: walk.fmt, lambda walk: walk.get_guest_pgd(), lambda walk: walk.get_pdptr(0),
    lambda walk: walk.permission_fault(7, 0, 0), lambda walk: walk.prepare([REGS]),
    lambda walk: walk.translate(GVAS), lambda walk: walk.translate(GVAS[:0]),
    lambda walk: walk.gva_to_gpa(0), lambda walk: walk.span(0, 8), lambda walk: walk.translate_span(GVAS, 8),
    lambda walk: walk.walk_record(0), lambda walk: Walker(walk), lambda walk: walk._second_stage_gpa(0, 0, 15)],
    ids=["fmt", "get_guest_pgd", "get_pdptr", "permission_fault", "prepare", "translate", "translate nothing", "gva_to_gpa",
         "span", "translate_span", "walk_record", "Walker", "_second_stage_gpa"])
def test_a_walk_out_of_use_says_so(call, use):
    """Outside a nested guest ngpa_walk has no registers and no format, whatever it had before."""
    vcpu = vcpu_of(memory_with_high_leaves()[0])
    if use == "before":
        vcpu.enter_nested(Npt(0x1000, cr4=0x20, efer=0xD00), cr0=1, cr4=0, efer=0)
        vcpu.leave_nested()
    with pytest.raises(RuntimeError, match="not in use"):
        call(vcpu.ngpa_walk)
    assert "PageWalk" in repr(vcpu.ngpa_walk)


@pytest.mark.parametrize("make", [
    lambda vcpu: vcpu.mem, lambda vcpu: vcpu.gva_walk, lambda vcpu: Walker(vcpu.gva_walk), lambda vcpu: vcpu._guest.arch,
    lambda vcpu: vcpu.gva_walk.prepare([REGS]), lambda vcpu: type("Derived", (GuestMemory,), {})(PAGE)],
    ids=["GuestMemory", "PageWalk", "Walker", "VcpuArch", "Contexts", "derived GuestMemory"])
@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickle.dumps])
def test_no_copy_shares_half_of_an_object(make, way):
    """TypeError."""
    thing = make(vcpu_of(memory_with_high_leaves()[0]))
    with pytest.raises(TypeError, match=r"copied or pickled|__reduce__|pickle"):
        way(thing)


# ---- L1's page-modification log ----------------------------------------------------------------------------------------------

def test_the_log_has_every_page_that_becomes_dirty():
    """Two threads, whose order is free: an entry for each page whose D they set, and for no other."""
    pages = 500
    mem = GuestMemory(1 << 20)
    for gpa, entry in ((0x1000, 0x2007), (0x2000, 0x3007), (0x3000, 0x4007)):
        mem.write_u64(gpa, entry)
    clean = (np.arange(512, dtype=np.uint64) * np.uint64(PAGE)) | np.uint64(0x137)       # WB, RWX, A, not D
    clean[100:110] |= np.uint64(0x200)
    vcpu = Vcpu(mem)
    vcpu.set_regs(cr0=1)
    gva = np.repeat(np.arange(1, pages + 1, dtype=np.uint64) * np.uint64(PAGE), 3)
    for threads in (1, *[2] * 60):
        mem.write(0x4000, clean.tobytes())
        mem.write(0x6000, bytes(PAGE))
        vcpu.leave_nested()
        vcpu.enter_nested(Ept(0x1000 | 0x1E | 0x40, pml=Pml(0x6000, 511)))
        t = vcpu.gva_walk.translate(gva, Access.WRITE, threads=threads)
        dirty = np.frombuffer(mem.read(0x4000, PAGE), np.uint64) & np.uint64(0x200) != 0
        dirty[100:110] = False
        log = np.frombuffer(mem.read(0x6000, PAGE), np.uint64)
        assert not t.status.any()
        assert 511 - dirty.sum() == vcpu.gva_walk.second.pml_index
        assert (np.flatnonzero(dirty) * PAGE).tolist() == sorted(log[log != 0].tolist())


def test_a_full_log_stops_each_thread():
    """More pages than entries: as many become dirty as the log holds."""
    mem = GuestMemory(1 << 20)
    for gpa, entry in ((0x1000, 0x2007), (0x2000, 0x3007), (0x3000, 0x4007)):
        mem.write_u64(gpa, entry)
    vcpu = Vcpu(mem)
    vcpu.set_regs(cr0=1)
    for threads in (1, *[2] * 20):
        mem.write(0x4000, ((np.arange(512, dtype=np.uint64) * np.uint64(PAGE)) | np.uint64(0x137)).tobytes())
        vcpu.leave_nested()
        vcpu.enter_nested(Ept(0x1000 | 0x1E | 0x40, pml=Pml(0x6000, 99)))
        t = vcpu.gva_walk.translate(np.arange(7, 512, dtype=np.uint64) * np.uint64(PAGE), Access.WRITE, threads=threads)
        dirty = np.frombuffer(mem.read(0x4000, PAGE), np.uint64) & np.uint64(0x200) != 0
        assert (100, 100, 405) == (dirty.sum(), (t.status == 0).sum(), (t.status == 6).sum())


def test_a_page_that_is_dirty_already_takes_no_entry():
    """A write that sets A alone is not logged, and a full log does not stop it."""
    mem = GuestMemory(1 << 20)
    for gpa, entry in ((0x1000, 0x2007), (0x2000, 0x3007), (0x3000, 0x4007), (0x4000, 0x5237)):
        mem.write_u64(gpa, entry)
    vcpu = Vcpu(mem)
    vcpu.set_regs(cr0=1)
    for index in (511, 0x8000):
        mem.write_u64(0x4000, 0x5237)
        vcpu.leave_nested()
        vcpu.enter_nested(Ept(0x1000 | 0x1E | 0x40, pml=Pml(0x6000, index)))
        assert 0x5123 == vcpu.gva_walk.gva_to_gpa(0x123, Access.WRITE)
        assert 0x5337 == mem.read_u64(0x4000)
        assert index == vcpu.gva_walk.second.pml_index
        assert 0 == mem.read_u64(0x6000 + 8 * 511)


# ---- interruptions -----------------------------------------------------------------------------------------------------------

def slow_batch():
    """(walk, gva, Translation, seconds): a batch of faults of all kinds, that takes longer than Python waits for signals."""
    mem, _ = memory_with_high_leaves(64)
    walk = vcpu_of(mem).gva_walk
    gva = np.random.default_rng(1).integers(0, 1 << 48, 24_000_000, np.uint64)
    start = time.monotonic()
    out = walk.translate(gva, Access.USER, threads=2)
    return walk, gva, out, time.monotonic() - start


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs signal.setitimer()")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_batch_can_be_interrupted(threads):
    """A signal handler that raises, as that of Ctrl-C does, ends a batch before its last row; the walk can be used again."""
    walk, gva, out, seconds = slow_batch()
    for _ in range(20):
        out.status[:] = 99
        with alarms(), contextlib.suppress(Stop):
            signal.setitimer(signal.ITIMER_REAL, seconds / 20)
            walk.translate(gva, Access.USER, threads=threads, out=out)
        if 99 in out.status[-out.status.size // 4:]:
            break
    assert 99 in out.status[-out.status.size // 4:]
    assert GVAS.tolist() == walk.translate(GVAS, Access.USER).gpa.tolist()


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs signal.setitimer()")
def test_workers_that_nobody_waits_for():
    """A second interruption ends the wait for the other threads: what they still walk is theirs, and the rows that they write are
    right."""
    walk, gva, out, seconds = slow_batch()
    plain = Vcpu(GuestMemory(PAGE)).gva_walk
    right = out.gpa.copy()
    raised = 0
    for tried in range(40):
        with alarms():
            try:
                signal.setitimer(signal.ITIMER_REAL, seconds * (tried % 4 + 1) / 10, 0.002)
                walk.translate(gva, Access.USER, threads=2, out=out)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Stop:
                raised += 1
            while True:
                try:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    break
                except Stop:
                    continue
            done = time.monotonic() + 0.1                   # the others stop at the end of a slice of 20 ms
            while time.monotonic() < done:
                plain.translate(gva[:640])
        assert np.array_equal(out.gpa, right)
        if raised == 4:
            break
    assert raised


# ---- replays -----------------------------------------------------------------------------------------------------------------

def rows_to(gpa, n=128):
    return {"op": np.zeros(n, np.uint8), "addr": np.zeros(n, np.uint64), "access": np.full(n, 4, np.uint8),
            "gpa": np.full(n, gpa, np.uint64)}


def test_a_producer_that_writes_tables():
    """From the next chunk on the tables are used as it left them, however it wrote them."""
    mem, buffer = memory_with_high_leaves()
    vcpu = vcpu_of(mem)

    def chunks():
        yield rows_to(0)
        mem.write_u64(HIGH, 0x9067)
        yield rows_to(0x9000)
        buffer[1] = 0xA0
        yield rows_to(0xA000)

    report = kvmmu.replay(chunks(), vcpu)
    assert (0, 384) == (report.mismatches, report.verified)


def test_a_progress_callback_that_writes_tables():
    """The same of who looks on."""
    mem, _ = memory_with_high_leaves()
    report = kvmmu.replay([rows_to(0), rows_to(0x9000)], vcpu_of(mem), progress=lambda done, total: mem.write_u64(HIGH, 0x9067))
    assert (0, 256) == (report.mismatches, report.verified)


def test_slots_that_change_between_chunks():
    """A slot that goes is a hole for the next chunk; one that comes back is memory again."""
    mem, buffer = memory_with_high_leaves()
    vcpu = vcpu_of(mem)

    def chunks():
        yield rows_to(0)
        data = mem.remove_slot(HIGH)
        yield {name: column for name, column in rows_to(0).items() if name != "gpa"}
        mem.add_slot(HIGH, data)
        yield rows_to(0)

    report = kvmmu.replay(chunks(), vcpu)
    assert (0, 256, 128) == (report.mismatches, report.verified, report.unchecked)
    assert {"0x4 (U)": 128} == report.walk_faults
    buffer.flush()


def test_a_producer_that_writes_registers_and_events():
    """Table writes that the trace tells of are used at once, as before."""
    mem, _ = memory_with_high_leaves()
    chunk = {name: np.concatenate([column, column]) for name, column in rows_to(0, 100).items()}
    chunk |= {"size": np.full(200, 8, np.uint8), "value": np.zeros(200, np.uint64)}
    chunk["op"][100], chunk["addr"][100], chunk["value"][100], chunk["access"][100] = Op.GUEST_WRITE, HIGH, 0x9067, 0
    chunk["gpa"][101:] = 0x9000
    report = kvmmu.replay([chunk], vcpu_of(mem))
    assert (0, 199, 1) == (report.mismatches, report.verified, report.table_writes)
