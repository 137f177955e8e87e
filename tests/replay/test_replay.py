# SPDX-License-Identifier: Apache-2.0
"""Recordings of real guests, replayed: every access and fault reproduced, in every form of the walk, and no lie passed.

The expectations are what QEMU recorded. KVMMU_LINUX_DATA=DIRECTORY names full recordings (subdirectories l4, l5, pae and
p32 in the layout of tests/data/linux); without it the tests run on the clips and on the bundled recording.
"""

import os
import time
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from paths import DATA
from toy_recordings import NEEDS_ZSTD

import kvmmu
from kvmmu import Access, CpuModel, GuestMemory, Regs, Status, Vcpu
from kvmmu.replay import row_run
from kvmmu.replay._replay import new_row_loop
from kvmmu.replay.trace_replay import recording_vcpu
from kvmmu.traces import Op, Recording, RecordingError, bundled
from kvmmu.traces._recorded_rows import RecordedRows

CLIPS = DATA / "linux"
FULL = os.environ.get("KVMMU_LINUX_DATA")
LONG = pytest.mark.skipif(not FULL, reason="KVMMU_LINUX_DATA names no directory of full recordings")
CR3_LOAD = 1
CHUNK = 1 << 20
SAMPLE = 53                     # of the accesses, one in so many goes through the scalar call in the default run
FRAME = np.uint64(0x000FFFFFFFFFF000)


def recordings(*names):
    """Parameters (path, phase): the named clips, and the full sets of the long target."""
    whole = {"l4": ("static", "dyn"), "l5": ("static", "dyn"), "pae": ("static", "dyn"), "p32": ("static",)}
    clips = [pytest.param(bundled() if name == "bundled" else CLIPS / name, None, id=name,
                          marks=NEEDS_ZSTD if name == "p32" else ()) for name in names]
    return clips + [pytest.param(Path(FULL or "") / name, phase, id=f"full-{name}-{phase}", marks=LONG)
                    for name, phases in whole.items() for phase in phases]


EVERY_RECORDING = pytest.mark.parametrize(("path", "phase"), recordings("l4", "l5", "pae", "p32", "bundled"))
# QEMU answered for the tables of the stop point, which only a static phase has
WITH_ANSWERS = pytest.mark.parametrize(
    ("path", "phase"), [p for p in recordings("l4", "pae", "p32") if p.values[1] != "dyn"])


@lru_cache(maxsize=2)
def opened(path, phase=None):
    return Recording.open(path, phase)


def pdptrs_at(mem, cr3, maxphyaddr):
    """The PDPTEs at CR3 with QEMU's accessed bit cleared; none where one is bad, as none was loaded then."""
    pdptrs = [mem.read_u64((cr3 & 0xFFFFFFE0) + 8 * i) & ~0x20 for i in range(4)]
    reserved = 0x1E6 | (1 << 64) - (1 << maxphyaddr)
    return (0, 0, 0, 0) if any(pdpte & 1 and pdpte & reserved for pdpte in pdptrs) else tuple(pdptrs)


class Tape:
    """A recording played by hand: its memory, its register sets, and the stretches over which neither changes."""

    def __init__(self, recording):
        self.recording = recording
        self.mem = GuestMemory.from_pages(recording.table_pfn << np.uint64(12), recording.table_data)
        self.vcpu = Vcpu(self.mem, cpu=CpuModel(vendor="amd", maxphyaddr=recording.maxphyaddr))
        self.regs, self._chunk, self._columns = [], None, None
        for _, cr3, _, cr0, cr4, efer in recording.ctx.tolist():
            regs = Regs(cr0=cr0, cr3=cr3, cr4=cr4, efer=efer, pkru=recording.pkru)
            self.regs.append(self._with_pdptrs(regs) if regs.is_pae_paging else regs)

    def _with_pdptrs(self, regs):
        return replace(regs, pdptrs=pdptrs_at(self.mem, regs.cr3, self.recording.maxphyaddr))

    def stretches(self, cuts=()):
        """(start, stop) in order; the tables and `regs` are right for these rows. Cuts there, and at all of `cuts`."""
        recording = self.recording
        loads = recording.events.code == CR3_LOAD if recording.mode == "pae" else np.zeros(recording.events.pos.size, bool)
        load_pos, load_cr3 = recording.events.pos[loads].tolist(), recording.events.val[loads].tolist()
        writes = [column.tolist() for column in recording.writes]
        total = len(recording)
        bounds = {0, total, *load_pos, *(pos + 1 for pos in writes[0]), *cuts, *range(0, total, CHUNK)}
        bounds = sorted(bound for bound in bounds if bound <= total)
        written = loaded = 0
        for start, stop in zip(bounds, [*bounds[1:], total], strict=True):
            while written < len(writes[0]) and writes[0][written] < start:
                self.mem.write_u64(writes[1][written], writes[2][written])
                written += 1
            while loaded < len(load_pos) and load_pos[loaded] <= start:
                self.regs = [self._with_pdptrs(r) if r.cr3 == load_cr3[loaded] else r for r in self.regs]
                loaded += 1
            yield start, stop

    def decoded(self, start, stop):
        """gva, gpa, ctx and access columns of rows within one chunk, decoded once per chunk."""
        chunk = start // CHUNK * CHUNK
        if self._chunk != chunk:
            c = self.recording.columns(chunk, chunk + CHUNK)
            self._chunk = chunk
            self._columns = c["gva"], c["gpa"], c["ctx"], self.recording.access_bytes(chunk, chunk + CHUNK)
        return [column[start - chunk:stop - chunk] for column in self._columns]


def shown(capsys, what, path, phase, count, started):
    """Print a figure of the long target past the capture."""
    if phase is not None:
        with capsys.disabled():
            seconds = time.perf_counter() - started
            print(f"\n  {path.name} {phase} {what}: {count} ({seconds:.1f} s) ", end="")


@EVERY_RECORDING
def test_replay_verifies_every_access_and_fault(path, phase, capsys):
    """Every recorded access was allowed and reached its address; every recorded #PF has its error code."""
    recording = opened(path, phase)
    started = time.perf_counter()
    report = kvmmu.replay(recording)
    assert report.examples == []
    assert (report.accesses, report.verified, report.mismatches) == (len(recording), len(recording), 0)
    assert report.kinds == dict(zip(("load", "store", "fetch"), np.bincount(recording.kind, minlength=3), strict=True))
    assert sum(report.page_sizes.values()) == report.verified
    assert sum(report.faults.values()) == recording.faults.pos.size
    assert report.faults_reproduced == (report.faults if recording.phase == "dyn" else {})
    assert report.table_writes == int((recording.writes.pos < len(recording)).sum())
    assert report.mmio == int(recording.pages_io[recording.pidx].sum(dtype=np.int64))
    faults = sum(report.faults_reproduced.values())
    shown(capsys, "replay", path, phase, f"{report.verified:,} verified, {faults:,} faults, 0 mismatches", started)


@EVERY_RECORDING
def test_array_form_reaches_every_recorded_address(path, phase, capsys):
    """translate() with regs and ctx, table writes and PDPTE loads applied where they happened; faults in between."""
    recording = opened(path, phase)
    started = time.perf_counter()
    tape, count, loaded, reproduced = Tape(recording), 0, None, 0
    faults = list(zip(*(column.tolist() for column in recording.faults), strict=True)) if recording.phase == "dyn" else []
    faults.reverse()
    walk = tape.vcpu.gva_walk
    for start, stop in tape.stretches(fault[0] for fault in faults):
        if loaded is not tape.regs:
            loaded, contexts = tape.regs, walk.prepare(tape.regs)
        while faults and faults[-1][0] == start:
            _, cr2, code, ctx = faults.pop()
            assert code in fault_codes(walk, contexts, ctx, cr2, code), f"#PF {code:#x} of {cr2:#x} before {start}"
            reproduced += 1
        gva, gpa, ctx, access = tape.decoded(start, stop)
        t = walk.translate(gva, access, regs=contexts, ctx=ctx)
        wrong = np.flatnonzero((t.status != Status.OK) | (t.gpa != gpa) | (t.error_code != 0))
        assert wrong.size == 0, f"access {start + wrong[0]} of {gva[wrong[0]]:#x}: recorded {gpa[wrong[0]]:#x}"
        count += gva.size
    assert (count, faults) == (len(recording), [])
    shown(capsys, "array", path, phase, f"{count:,} translated, {reproduced:,} faults", started)


def fault_codes(walk, contexts, ctx, cr2, code):
    """Error codes of an access like the recorded one, with EFLAGS.AC (which the recording does not tell) clear and set."""
    access = code & (Access.WRITE | Access.USER | Access.FETCH)
    accesses = np.array([access, access | Access.AC], np.uint8)
    t = walk.translate(np.full(2, cr2, np.uint64), accesses, regs=contexts, ctx=np.full(2, ctx, np.uint32), set_ad=False)
    return t.error_code[t.status == Status.PAGE_FAULT].tolist()


@EVERY_RECORDING
def test_scalar_form_reaches_every_recorded_address(path, phase, capsys):
    """gva_to_gpa() under set_regs(): a sample by default, every access in the long target."""
    recording = opened(path, phase)
    started = time.perf_counter()
    step = 1 if phase else SAMPLE
    tape, count, in_force = Tape(recording), 0, None
    switches = (np.flatnonzero(np.diff(recording.pages_ctx[recording.pidx])) + 1).tolist()
    gva_to_gpa = tape.vcpu.gva_walk.gva_to_gpa
    for start, stop in tape.stretches(switches):
        first = -(-start // step) * step
        if first >= stop:
            continue
        gva, gpa, ctx, access = tape.decoded(first, stop)
        if in_force is not tape.regs[ctx[0]]:
            in_force = tape.regs[ctx[0]]
            tape.vcpu.set_regs(**in_force.__dict__)
        reached = [gva_to_gpa(addr, how) for addr, how in zip(gva[::step].tolist(), access[::step].tolist(), strict=True)]
        assert reached == gpa[::step].tolist(), f"within accesses {first} to {stop}"
        count += len(reached)
    assert count == -(-len(recording) // step)
    shown(capsys, "scalar", path, phase, f"{count:,} translated", started)


# -- what QEMU said about single addresses at the stop point ------------------------------------------------------------

def stop_point(recording):
    """A vCPU with the registers of the stop point, keys aside, over its tables."""
    tape = Tape(recording)
    registers = {name: recording.registers[name] for name in ("cr0", "cr3", "cr4", "efer")}
    if recording.mode == "pae":
        registers["pdptrs"] = pdptrs_at(tape.mem, registers["cr3"], recording.maxphyaddr)
    tape.vcpu.set_regs(**registers)
    return tape.vcpu


@WITH_ANSWERS
def test_gva2gpa_of_qemu(path, phase, capsys):
    """QEMU's gva2gpa looks at mapping alone: a supervisor read with EFLAGS.AC and no PKRU is denied by nothing else."""
    recording = opened(path, phase)
    started = time.perf_counter()
    table = recording.gva2gpa()
    mapped = table["mapped"].astype(bool)
    walk = stop_point(recording).gva_walk
    t = walk.translate(table["gva"], Access.AC, set_ad=False)
    np.testing.assert_array_equal(t.status == Status.OK, mapped)
    np.testing.assert_array_equal(t.gpa[mapped], table["gpa"][mapped])
    assert mapped.any()
    assert not mapped.all()
    assert not (t.error_code[~mapped] & 1).any(), "what is not mapped is not present, or not canonical"
    shown(capsys, "gva2gpa", path, phase, f"{mapped.size:,} equal, {int(mapped.sum()):,} mapped", started)


@WITH_ANSWERS
def test_rights_never_change_what_is_mapped(path, phase):
    """With SMAP in force a walk of a mapped user page may be denied, but it meets the same leaf (walk_record)."""
    recording = opened(path, phase)
    table = recording.gva2gpa()
    walk = stop_point(recording).gva_walk
    denied = 0
    for gva, gpa, mapped in zip(*(table[name].tolist() for name in ("gva", "gpa", "mapped")), strict=True):
        record = walk.walk_record(gva, Access.USER | Access.WRITE)
        assert bool(mapped) == (record.status == Status.OK or bool(record.error_code & 1)), record
        if mapped and record.status == Status.PAGE_FAULT:
            denied += 1
            leaf = record.steps[-1]
            size = 1 << 12 + (10 if record.mode_bits == 32 else 9) * (leaf.level - 1)
            assert leaf.entry & int(FRAME) & ~(size - 1) | gva & (size - 1) == gpa, record
    assert denied > 100


@WITH_ANSWERS
def test_info_tlb_of_qemu(path, phase, capsys):
    """Every leaf that QEMU lists: its address, and the flags of the leaf entry alone."""
    recording = opened(path, phase)
    started = time.perf_counter()
    table = recording.info_tlb()
    t = stop_point(recording).gva_walk.translate(table["gva"], Access.AC, fields=("gpa", "status", "pte"), set_ad=False)
    assert not t.status.any()
    np.testing.assert_array_equal(t.gpa, table["gpa"])
    bits = (63, 8, 7, 6, 5, 4, 3, 2, 1)                     # NX G bit7 D A PCD PWT U W
    flags = sum((t.pte >> np.uint64(bit) & np.uint64(1)) << np.uint64(row) for row, bit in enumerate(bits))
    np.testing.assert_array_equal(flags, table["flags"])
    found = stop_point(recording).gva_walk.mappings(merge=False)
    np.testing.assert_array_equal(found.gva, table["gva"])
    np.testing.assert_array_equal(found.gpa, table["gpa"])
    for bit, column in ((1, found.global_), (3, found.dirty), (4, found.accessed)):
        np.testing.assert_array_equal(flags >> np.uint64(bit) & np.uint64(1) != 0, column)
    shown(capsys, "info tlb", path, phase, f"{flags.size:,} leaves equal", started)


# -- recordings that lie ------------------------------------------------------------------------------------------------

def flipped(array, index, mask):
    copy = array.copy()
    copy[index] ^= array.dtype.type(mask)
    return copy


def leaf_at(recording, gva):
    """(page number in table_data, byte offset) of the leaf entry for gva, in the first context."""
    tape = Tape(recording)
    tape.vcpu.set_regs(**tape.regs[0].__dict__)
    gpa = tape.vcpu.gva_walk.walk_record(gva, Access.AC).steps[-1].gpa
    return int(np.flatnonzero(recording.table_pfn == gpa >> 12)[0]), gpa & 0xFFF


def assert_mismatches(report, positions, recording):
    """These accesses are reported, the first 20 explained, and all others verified."""
    positions = [int(position) for position in positions]
    assert report.mismatches == len(positions) > 0
    assert report.verified == report.accesses - len(positions) == len(recording) - len(positions)
    assert [example.position for example in report.examples] == positions[:20]
    for example in report.examples:
        row = {name: int(column[0]) for name, column in recording.columns(example.position, example.position + 1).items()}
        assert example.gva == row["gva"]
        assert f"{row['gpa']:#x}" in example.recorded
        assert f"of {row['gva']:#x}\n" in example.walked
        assert "->" in example.walked.splitlines()[-1]
        assert f"access {example.position}" in str(example)


@pytest.mark.parametrize("bit", [12, 13, 21, 35, 52, 63])
@pytest.mark.parametrize("rare", [True, False])
def test_a_flipped_recorded_page_is_reported(bit, rare):
    """One bit of one recorded physical page: exactly the accesses of that row, with both addresses in the text."""
    recording = opened(CLIPS / "l4")
    counts = np.bincount(recording.pidx)
    row = int(np.flatnonzero(counts == counts.min())[0]) if rare else int(np.argsort(counts)[len(counts) // 2])
    lie = replace(recording, pages_gpa=flipped(recording.pages_gpa, row, 1 << bit))
    report = kvmmu.replay(lie)
    assert_mismatches(report, np.flatnonzero(lie.pidx == row), lie)
    truth = int(recording.columns()["gpa"][report.examples[0].position])
    assert f"-> gpa {truth:#x} (" in report.examples[0].walked


@pytest.mark.parametrize("position", [0, 1, 123_456, 199_999])
def test_a_flipped_address_of_one_access_is_reported(position):
    """One bit of one access's physical address, at the ends of the trace too: that access and no other."""
    recording = opened(CLIPS / "l4")
    row = recording.pidx[position]
    pages = {name: np.append(getattr(recording, name), getattr(recording, name)[row])
             for name in ("pages_gva", "pages_gpa", "pages_ctx", "pages_io")}
    pages["pages_gpa"][-1] ^= np.uint64(1 << 30)
    pidx = recording.pidx.astype(np.uint32)
    pidx[position] = pages["pages_gpa"].size - 1
    lie = replace(recording, pidx=pidx, **pages)
    assert_mismatches(kvmmu.replay(lie), [position], lie)


@pytest.mark.parametrize(("name", "bit"), [("l4", 0), ("l4", 14), ("l4", 51), ("pae", 0), ("pae", 14), ("pae", 51),
                                           pytest.param("p32", 0, marks=NEEDS_ZSTD), pytest.param("p32", 14, marks=NEEDS_ZSTD)])
def test_a_flipped_bit_of_a_leaf_entry_is_reported(name, bit):
    """A leaf that is gone, leads elsewhere, or has a reserved bit: the accesses of its page and no others."""
    recording = opened(CLIPS / name)
    user_4k = np.flatnonzero(recording.pages_gva[recording.pidx] < 1 << 30)
    gva = int(recording.pages_gva[recording.pidx[user_4k[user_4k.size // 2]]])
    page, offset = leaf_at(recording, gva)
    lie = replace(recording, table_data=flipped(recording.table_data, (page, offset + bit // 8), 1 << bit % 8))
    report = kvmmu.replay(lie)
    assert_mismatches(report, np.flatnonzero(recording.pages_gva[recording.pidx] == gva), lie)
    assert {0: "not present", 14: "-> gpa", 51: "reserved"}[bit] in report.examples[0].walked


def needed_write(recording):
    """(number, page row) of the only write to the leaf entry through which that user page is first reached."""
    rows, first = np.unique(recording.pidx, return_index=True)
    uses = {int(pos): int(row) for row, pos in zip(rows, first, strict=True) if recording.pages_gva[row] < 1 << 47}
    tape = Tape(recording)
    words = {int(gpa): tape.mem.read_u64(int(gpa)) for gpa in recording.writes.gpa}
    for start, _ in tape.stretches(uses):
        if start in uses:
            row = uses[start]
            tape.vcpu.set_regs(**tape.regs[recording.pages_ctx[row]].__dict__)
            leaf = tape.vcpu.gva_walk.walk_record(int(recording.pages_gva[row]), Access.AC).steps[-1]
            numbers = np.flatnonzero(recording.writes.gpa == leaf.gpa)
            if numbers.size == 1 and not words[leaf.gpa] & 1:
                return int(numbers[0]), row
    raise AssertionError("the clip has no such write")


def test_a_dropped_table_write_is_reported():
    """The page that the write maps stays unmapped: its accesses, and no others, are reported."""
    recording = opened(CLIPS / "l5")
    number, row = needed_write(recording)
    writes = type(recording.writes)(*(np.delete(column, number) for column in recording.writes))
    lie = replace(recording, writes=writes)
    report = kvmmu.replay(lie)
    assert report.table_writes == recording.writes.pos.size - 1
    assert_mismatches(report, np.flatnonzero(recording.pidx == row), lie)
    assert "not present" in report.examples[0].walked


@pytest.mark.parametrize(("mask", "code"), [(1, 0x6), (1, 0x7), (1, 0x14), (8, 0x4), (32, 0x7), (2, 0x7)])
def test_a_changed_error_code_is_reported(mask, code):
    """Faults with one bit of the error code flipped: those and no others, and all accesses still verified.

    P, RSVD and PK are what the walk finds, of any fault. W, U and F are what was asked for: another request of a page
    that is not present faults as well, but a read of a read-only page does not.
    """
    recording = opened(CLIPS / "l5")
    numbers = np.flatnonzero(recording.faults.err == code)
    faults = recording.faults._replace(err=flipped(recording.faults.err, numbers, mask))
    report = kvmmu.replay(replace(recording, faults=faults))
    assert (report.verified, report.mismatches) == (len(recording), numbers.size)
    assert sum(report.faults_reproduced.values()) == recording.faults.pos.size - numbers.size
    for number, example in zip(numbers, report.examples, strict=False):
        assert (example.position, example.gva) == (int(faults.pos[number]), int(faults.cr2[number]))
        assert f"#PF {code ^ mask:#x}" in example.recorded


# -- the function itself ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["l4", "l5"])
def test_replay_leaves_the_recording_alone(name):
    """Table writes and accessed bits go to a copy: the second replay finds what the first found."""
    recording = opened(CLIPS / name)
    before = recording.table_data.copy()
    first, second = (kvmmu.replay(recording) for _ in range(2))
    np.testing.assert_array_equal(recording.table_data, before)
    assert replace(first, seconds=0) == replace(second, seconds=0)
    assert first.rate == first.accesses / first.seconds > 0


def test_an_empty_trace():
    """No accesses: nothing verified, nothing wrong."""
    recording = opened(CLIPS / "l4")
    cut = {name: getattr(recording, name)[:0] for name in ("pidx", "off", "kind", "size", "priv")}
    events = type(recording.events)(*(column[:0] for column in recording.events))
    faults = type(recording.faults)(*(column[:0] for column in recording.faults))
    report = kvmmu.replay(replace(recording, **cut, events=events, faults=faults))
    assert (report.accesses, report.verified, report.mismatches, report.page_sizes) == (0, 0, 0, {})


def test_a_table_write_into_a_hole_names_the_address():
    recording = opened(CLIPS / "l5")
    writes = recording.writes._replace(gpa=flipped(recording.writes.gpa, 5, 1 << 45))
    place, gpa = int(writes.pos[5]) + 1, int(writes.gpa[5])
    with pytest.raises(RecordingError, match=f"{recording.path}: before access {place}: GUEST_WRITE: goes to gpa {gpa:#x}"):
        kvmmu.replay(replace(recording, writes=writes))


@pytest.mark.parametrize("name", ["ntoy", "ndyn", "nlin"])
def test_a_nested_recording_replays(name):
    """Accesses of L1 through one stage, of L2 through two; every #NPF of a dyn phase with its EXITINFO."""
    report = kvmmu.replay(CLIPS / name)
    assert (report.verified, report.mismatches) == (report.accesses, 0), report.examples
    if report.faults_checked:
        assert report.faults == report.faults_reproduced
    assert name != "ndyn" or sum(report.faults.values()) == 189


def test_kvm_translate_of_the_nested_guest():
    """KVM_TRANSLATE on the L2 vCPU: supervisor reads through L2's tables to its physical addresses."""
    recording = Recording.open(CLIPS / "ntoy")
    vcpu, contexts = recording_vcpu(recording)
    context = next(c for c in contexts if isinstance(c, tuple) and c[0].cr3 == recording.vmcb["cr3"])
    answers = recording.kvm_translate()
    t = vcpu.gva_walk.translate(answers["gva"], regs=[context], fields=("ngpa",), set_ad=False)
    assert ((t.ngpa != kvmmu.INVALID_GPA) == (answers["valid"] == 1)).all()
    valid = answers["valid"] == 1
    assert (t.ngpa[valid] == answers["gpa"][valid]).all()


# -- a replay that is stopped -------------------------------------------------------------------------------------------

class Stopping:
    """A loop of rows that is interrupted behind some stretches of a few rows."""

    def __init__(self, loop, stretch, left):
        self.__dict__.update(loop=loop, stretch=stretch, left=left)

    def __getattr__(self, name):
        return getattr(self.loop, name)

    def __setattr__(self, name, value):
        setattr(self.loop, name, value)

    def run(self, *stop):
        before = self.loop.row
        why = self.loop.run(min((before + self.stretch, *stop)))
        self.__dict__["left"] -= 1
        if not self.left:
            raise KeyboardInterrupt
        return why


def stopped(source, stretch, after, monkeypatch):
    """The report of a replay that is interrupted, and how many rows its loop has done."""
    loops = []

    def make(*arguments):
        loops.append(Stopping(new_row_loop(*arguments), stretch, after))
        return loops[-1]
    monkeypatch.setattr(row_run, "new_row_loop", make)
    with pytest.raises(kvmmu.ReplayInterrupted) as caught:
        kvmmu.replay(source)
    assert not caught.value.report.complete
    return caught.value.report, loops[-1].row


@pytest.mark.parametrize("after", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("name", ["l4", "l5", "ndyn"])
def test_the_report_of_a_stopped_replay_counts_what_was_walked(name, after, monkeypatch):
    """A Ctrl-C behind any block: what the loop walked is in all counters, and nothing else is."""
    recording = opened(CLIPS / name)
    report, _ = stopped(recording, 5000, after, monkeypatch)
    assert 0 < report.accesses == report.verified == sum(report.kinds.values()) == sum(report.page_sizes.values()) <= 5000 * after
    kinds = np.bincount(recording.kind[:report.accesses], minlength=3)
    assert list(report.kinds.values()) == kinds.tolist()
    assert report.mmio == recording.pages_io[recording.pidx[:report.accesses]].sum()


@pytest.mark.parametrize(("stretch", "after"), [(1, 1), (1, 30_000), (7, 1000), (1000, 40), (5000, 20)])
@pytest.mark.parametrize("name", ["l5", "ndyn"])
def test_a_fault_is_counted_once_and_for_all(name, stretch, after, monkeypatch):
    """A Ctrl-C anywhere: the faults in the rows that are done are in all counters, and no other is."""
    recording = opened(CLIPS / name)
    report, rows = stopped(recording, stretch, after, monkeypatch)
    op = RecordedRows(recording).columns(rows)["op"]
    assert report.faults == report.faults_reproduced
    assert sum(report.faults.values()) == np.isin(op, (Op.PAGE_FAULT, Op.NPT_FAULT)).sum()
    assert report.accesses == (op < Op.MOV_CR3).sum()
    assert report.table_writes == (op == Op.GUEST_WRITE).sum()


@pytest.mark.parametrize("page", [2**64 - 4096, 2**64 - 1, 2**64 - 65536 + 1])
def test_a_walk_that_faults_is_never_verified(page):
    """A recorded address of 2**64 - 1 is where a walk that fails ends: refused, also in a Recording that somebody changed."""
    recording = opened(CLIPS / "l4")
    gpa = recording.pages_gpa.copy()
    gpa[-1] = page
    with pytest.raises(RecordingError, match=f"{recording.path}: pages_gpa: is {page:#x}; allowed is below 2..52"):
        kvmmu.replay(replace(recording, pages_gpa=gpa))


def test_a_recorded_address_that_no_walk_can_reach_is_a_mismatch():
    """Without tables every walk fails; whatever is recorded, nothing is verified."""
    recording = opened(CLIPS / "l4")
    gpa = np.full_like(recording.pages_gpa, 2**64 - 65536 - 4096)
    report = kvmmu.replay(replace(recording, pages_gpa=gpa, table_data=np.zeros_like(recording.table_data)))
    assert (report.verified, report.mismatches, report.page_sizes) == (0, len(recording), {})


@pytest.mark.parametrize(("change", "words"), [
    ({"pidx": 65535}, r"pidx\[0\]: is 65535 .* below"), ({"kind": 3}, r"kind\[0\]: is 3"), ({"priv": 255}, r"priv\[0\]: is 255"),
    ({"pages_ctx": 1}, r"page_ctx\[0\]: is 1 .* number of contexts"), ({"off": np.uint16([0])}, "off: has shape"),
    ({"kind": np.zeros(200_000, np.int8)}, "kind: dtype"), ({"pages_gpa": np.zeros(1, np.uint64)}, "page_gpa: has shape")])
def test_a_changed_recording_is_checked_before_the_loop_trusts_it(change, words):
    """What dataclasses.replace() makes: an index beyond its table, a column of another length or type."""
    recording = opened(CLIPS / "l4")
    columns = {name: np.full_like(getattr(recording, name), value) if isinstance(value, int) else value
               for name, value in change.items()}
    with pytest.raises(RecordingError, match=words):
        kvmmu.replay(replace(recording, **columns))
    assert kvmmu.replay(replace(recording)).verified == len(recording)


def test_an_unaligned_table_write_is_refused():
    recording = opened(CLIPS / "l5")
    writes = recording.writes._replace(gpa=flipped(recording.writes.gpa, 5, 1))
    with pytest.raises(RecordingError, match=r"w_gpa\[5\]: .* a multiple of 8"):
        kvmmu.replay(replace(recording, writes=writes))
