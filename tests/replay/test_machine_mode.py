# SPDX-License-Identifier: Apache-2.0
"""Traces on a whole machine: the recorded addresses, exits explained one by one, and a tiny trace by hand."""

import json
import os
import signal
from pathlib import Path

import image_files
import numpy as np
import pytest
from paths import DATA

import kvmmu
from kvmmu import CpuModel, GuestMemory, Host, PageTables, TlbHierarchy, TlbLevel, Vm
from kvmmu.cli.command import main
from kvmmu.replay import machine_replay
from kvmmu.report.tables import replay_tables
from kvmmu.traces import Header, Op, Recording, RegisterSet, Trace, TraceError
from kvmmu.traces.conversion import recording_header
from kvmmu.traces.foreign import Brings, ForeignTrace

MB2 = 2 << 20


@pytest.mark.parametrize("host", ["ept", "npt", "shadow"])
@pytest.mark.parametrize("name", ["l4", "l5", "pae", "ntoy", "ndyn", "nlin"])
def test_recordings(name, host):
    """Every access reaches the recorded address; exits are those of KVM's counters."""
    recording = Recording.open(DATA / "linux" / name)
    if host == "shadow" and name.startswith("n"):
        with pytest.raises(ValueError, match="host: a nested guest with a second stage"):
            kvmmu.replay(recording, mode="machine", host=host)
        return
    report = kvmmu.replay(recording, mode="machine", host=host)
    assert (report.verified, report.mismatches, report.unchecked) == (len(recording), 0, 0)
    plain = kvmmu.replay(recording)
    assert (report.kinds, report.table_writes, report.mmio) == (plain.kinds, plain.table_writes, plain.mmio)
    stats = report.stats
    assert int(report.exit_count.sum()) + report.exits_to_l1 == sum(
        count for reason, count in report.exits.items() if "page faults" in reason and "guest" not in reason
        or reason in ("EPT violations", "MMIO"))
    assert report.exit_position.size == sum(report.by_ret.values())
    assert (np.diff(report.exit_position.astype(np.int64)) > 0).all()
    assert report.sptes == {size: stats[f"pages_{size}"] for size in ("4k", "2m", "1g")}
    if host != "shadow" and not name.startswith("n"):
        assert report.exits["EPT violations" if host == "ept" else "nested page faults"] == sum(report.sptes.values())
        assert report.exits.get("MMIO", 0) == stats["mmio_exits"] == report.mmio
    written = {int(gpa) >> 12 for gpa in recording.columns(0, len(recording))["gpa"][
        (recording.kind == 1) & (recording.pages_io[recording.pidx] == 0)]} | {int(gpa) >> 12 for gpa in recording.writes.gpa}
    assert report.dirty_over_time[-1] == (len(recording), len(written))


def trace_of(tables, rows):
    """A trace with the memory of some tables, and rows of (op, addr, value, access)."""
    regs = tables.regs()
    words = np.frombuffer(tables.mem.read(0, 4 * MB2), np.uint64)
    at = np.flatnonzero(words)
    table = [(Op.MEMORY, 0, 4 * MB2, 0), *((Op.MEMORY_WORD, int(i) * 8, int(words[i]), 0) for i in at), *rows]
    op, addr, value, access = zip(*table, strict=True)
    columns = {"op": np.array([int(one) for one in op], np.uint8), "addr": np.array(addr, np.uint64),
               "value": np.array(value, np.uint64), "access": np.array(access, np.uint8),
               "size": np.full(len(table), 8, np.uint8)}
    header = Header(registers=(RegisterSet(cr0=regs.cr0, cr3=regs.cr3, cr4=regs.cr4, efer=regs.efer),),
                    cpu={"vendor": "intel", "maxphyaddr": 46})
    return Trace(header, [columns])


def some_tables():
    tables = PageTables(GuestMemory(4 * MB2), frames=range(0x1000, 0x8000, 4096))
    tables.map(0x400000, 3 * MB2)
    tables.map(0x401000, 3 * MB2 + 4096)
    return tables


def test_by_hand():
    """Two pages behind one table each level: 4K backing takes 4 + 1 + 1 exits, 2M backing 1 + 1, shadow paging 2."""
    tables = some_tables()
    rows = [(0, 0x400000, 0, 0), (0, 0x400008, 0, 0), (1, 0x401000, 0, 2), (0, 0x401000, 0, 0)]
    for host, backing, exits, positions in (("ept", "4k", 6, [0, 2]), ("npt", "4k", 6, [0, 2]), ("ept", "2m", 2, [0]),
                                            ("shadow", "4k", 2, [0, 2])):
        report = kvmmu.replay(trace_of(tables, rows), mode="machine", host=host, backing=backing)
        assert (sum(report.exits.values()), report.exit_position.tolist()) == (exits, positions)
        assert (report.accesses, report.unchecked, report.kinds) == (4, 4, {"load": 3, "store": 1, "fetch": 0})
        assert report.sptes[backing] == (exits if host != "shadow" else 2)
        assert report.dirty_over_time == [(4, 1)]
        assert report.table_bytes == 4096 * report.shadow_pages > 0
        plain = report.to_dict()
        assert json.loads(json.dumps(plain))["exits"] == report.exits
        assert plain["exits_over_time"][-1] == [positions[-1], exits]


def test_events():
    """INVLPG and MOV to CR3 exit under shadow paging alone; a table write takes effect with both."""
    tables = some_tables()
    leaf = int(np.flatnonzero(np.frombuffer(tables.mem.read(0, MB2), np.uint64) & np.uint64(2**64 - 4096)
                              == np.uint64(3 * MB2))[0]) * 8
    entry = tables.mem.read_u64(leaf)
    rows = [(0, 0x400000, 0, 0), (Op.GUEST_WRITE, leaf, entry + 0x5000, 0), (Op.INVLPG, 0x400000, 0, 0), (0, 0x400000, 0, 0),
            (Op.MOV_CR3, 0, tables.root, 0), (0, 0x400000, 0, 0)]
    ept = kvmmu.replay(trace_of(tables, rows), mode="machine", backing="4k")
    shadow = kvmmu.replay(trace_of(tables, rows), mode="machine", host="shadow", backing="4k")
    assert ept.exits == {"EPT violations": 6}                       # four tables, the page, and the page that it becomes
    assert (shadow.exits["MOV to CR3"], shadow.exits["INVLPG"], shadow.table_writes) == (1, 1, 1)
    assert shadow.exits["shadow page faults"] == 2


@pytest.mark.parametrize("host", ["ept", "npt", "shadow"])
def test_accesses_that_fail(host):
    """Counted by error code or status, as in mode "walk"; so are recorded faults, register sets, and the mode is named."""
    tables = some_tables()
    rows = [(0, 0x400000, 0, 4), (0, 0x402000, 0, 4), (0, 0x403000, 0, 0), (1, 0x402000, 0, 6), (0, 1 << 63, 0, 4),
            (0, 0x402008, 0, 4), (Op.PAGE_FAULT, 0x402000, 4, 0), (Op.PAGE_FAULT, 0x402000, 6, 0),
            (Op.PAGE_FAULT, 0x402000, 4, 0), (Op.MOV_CR3, 0, tables.root | 1 << 3, 0), (0, 0x401000, 0, 4)]
    report = kvmmu.replay(trace_of(tables, rows), mode="machine", host=host)
    plain = kvmmu.replay(trace_of(tables, rows))
    assert report.walk_faults == {"0x4 (U)": 2, "0x0": 1, "0x6 (W U)": 1, "NON_CANONICAL": 1} == plain.walk_faults
    assert report.faults == {"0x4 (U)": 2, "0x6 (W U)": 1} == plain.faults
    assert (report.mode, report.contexts, report.page_sizes) == ("4l", 2, {})
    assert (plain.mode, plain.contexts, plain.page_sizes) == ("4l", 2, {"4K": 2})
    titles = [title for title, _, _ in replay_tables(report)]
    assert "Walks that fail, without a recorded address" in titles
    assert "By page size" not in titles


def test_recorded_addresses_that_fail_are_mismatches():
    """An access whose recorded address is not reached is no walk without one."""
    trace = trace_of(some_tables(), [(0, 0x402000, 0, 4), (0, 0x402000, 0, 4)])
    gpa = np.full(trace._chunks[0]["op"].size, 2**64 - 1, np.uint64)
    gpa[-1] = 0x5000
    report = kvmmu.replay(Trace(trace.header, [trace._chunks[0] | {"gpa": gpa}]), mode="machine")
    assert (report.walk_faults, report.unchecked, report.mismatches) == ({"0x4 (U)": 1}, 1, 1)


def test_arguments(capsys):
    recording = Recording.open(DATA / "linux" / "l5")
    for given, message in (({"mode": "fast"}, "mode: "), ({"host": "ept"}, "host: is of mode 'machine'"),
                           ({"backing": "4k"}, "backing: is of mode 'machine'"), ({"mode": "machine", "host": "xen"}, "host: "),
                           ({"mode": "machine", "backing": "8k"}, "backing: "),
                           ({"mode": "machine", "page": "4k"}, "paging, page, frames, pager: ")):
        with pytest.raises(ValueError, match=message):
            kvmmu.replay(recording, **given)
    with pytest.raises(ValueError, match="'machine' is for traces that bring registers"):
        kvmmu.replay(kvmmu.traces.bundled("lackey"), mode="machine")
    assert main(["replay", "bundled-lackey", "--backing", "4k"]) == 2
    assert "--backing: is of a machine" in capsys.readouterr().err


# ---- the caller's machine ----------------------------------------------------------------------------------------------

def vm_of(host, backing, size=4 * MB2, vcpus=1, **more):
    """A machine with memory, and vCPUs with a TLB of one entry of each size."""
    vm = Vm(GuestMemory(size), CpuModel(vendor="intel", maxphyaddr=46), Host(tdp=host, maxphyaddr=46, **more), backing=backing)
    for _ in range(vcpus):
        vm.create_vcpu(tlb=[(1, 1)] * 3)
    return vm


@pytest.mark.parametrize(("host", "kind"), [("ept", "ept"), ("npt", "npt"), (None, "shadow")])
@pytest.mark.parametrize("name", ["l4", "l5", "pae"])
def test_a_recording_on_a_machine_of_the_caller(name, host, kind):
    """The same report as on a machine that is made for it, and the machine is as it was left: SPTEs, statistics, registers."""
    recording = Recording.open(DATA / "linux" / name)
    end = max(int(recording.pages_gpa[recording.pages_io == 0].max()), int(recording.table_pfn.max()) << 12) + 1
    vm = vm_of(host, "4k", -(-end // MB2) * MB2)
    vm = Vm(vm.mem, CpuModel(**recording_header(recording).cpu), Host(tdp=host, maxphyaddr=46), backing="4k")
    vm.create_vcpu()
    vm.mem.write(0, b"\xff" * 4096)                     # what was there before does not matter
    given, made = kvmmu.replay(recording, vm, mode="machine"), kvmmu.replay(recording, mode="machine", host=kind, backing="4k")
    one, two = given.to_dict(), made.to_dict()
    for report in (one, two):
        for timed in ("seconds", "rate"):
            del report[timed]
    assert one == two
    assert (given.exit_position.tolist(), given.verified) == (made.exit_position.tolist(), len(recording))
    assert vm.stats == given.stats
    assert len(vm.sptes()["sp"]) == given.shadow_pages
    assert vm.audit() == []


def test_host_and_tlb_of_the_callers_machine():
    """Two pages in turn: a TLB of one entry never hits, and the machine's host pages, mitigations and TLBs are those in use."""
    tables = some_tables()
    rows = [(2, 0x400000 + 0x1000 * (i % 2), 0, 16) for i in range(10)]
    one = vm_of("ept", "2m", nx_huge_pages=True)
    report = kvmmu.replay(trace_of(tables, rows), one, mode="machine")
    assert (one.vcpus[0].tlb.misses, one.vcpus[0].tlb.hits) == (10, 0)
    assert (report.backing, report.stats["nx_lpage_splits"]) == ("2m", one.stats["nx_lpage_splits"])
    assert one.stats["nx_lpage_splits"] == 1
    again = kvmmu.replay(trace_of(tables, rows), one, mode="machine")
    assert (again.exits, again.stats["pf_taken"], again.sptes) == ({}, 0, report.sptes)         # counted from its start on


def test_vcpus_by_their_number():
    """The vcpu column names the machine's vCPUs; each has registers and a TLB of its own."""
    tables = some_tables()
    regs = tables.regs()
    header = Header(registers=(RegisterSet(cr0=regs.cr0, cr3=regs.cr3, cr4=regs.cr4, efer=regs.efer),) * 2)
    vm = vm_of("ept", "4k", vcpus=3)
    vm.mem.write(0, tables.mem.read(0, 4 * MB2))
    columns = {"op": np.zeros(6, np.uint8), "addr": np.full(6, 0x400000, np.uint64), "access": np.zeros(6, np.uint8),
               "vcpu": np.array([1, 1, 0, 1, 0, 0], np.uint16)}
    report = kvmmu.replay(Trace(header, [columns]), vm, mode="machine")
    assert (report.accesses, report.exit_position.tolist()) == (6, [0])
    assert [(vcpu.tlb.misses, vcpu.tlb.hits) for vcpu in vm.vcpus] == [(1, 2), (1, 2), (0, 0)]
    with pytest.raises(ValueError, match="vm: has 1 vCPUs, the trace has 2"):
        kvmmu.replay(Trace(header, [columns]), vm_of("ept", "4k"), mode="machine")


def test_chunks_and_traces_without_registers_on_a_machine():
    """They run from the registers that the vCPUs have."""
    tables = some_tables()
    vm = Vm(tables.mem, CpuModel(maxphyaddr=46), Host(maxphyaddr=46), backing="4k")
    for _ in range(2):
        vm.create_vcpu().set_regs(tables.regs())
    rows = {"op": np.zeros(4, np.uint8), "addr": np.array([0x400000, 0x401000, 0x400000, 0x500000], np.uint64),
            "access": np.zeros(4, np.uint8), "vcpu": np.array([0, 1, 1, 0], np.uint16)}
    report = kvmmu.replay([rows], vm, mode="machine")
    assert (report.accesses, report.unchecked, report.exits) == (4, 4, {"EPT violations": 6})
    assert [vcpu.tlb.misses for vcpu in vm.vcpus] == [2, 2]

    def read(notes):
        notes.add("lines", 3)
        yield {name: column for name, column in rows.items() if name != "vcpu"}
    foreign = ForeignTrace("test", Path("made"), read, Brings(), vcpus=1)
    report = kvmmu.replay(foreign, vm, mode="machine", tlb=TlbHierarchy([TlbLevel("one", 1, 1)]))
    assert (report.accesses, report.exits, report.skipped) == (4, {}, {"lines": 3})
    assert (int(report.tlb.walks.sum()), report.tlb.unmapped, report.tlb.host_refs) == (3, 1, 3 * 5 * 4)

    def told(notes):
        yield rows | {"vcpu": np.full(4, 5, np.uint16)}
    with pytest.raises(TraceError, match="rows of vCPU 5 behind access 0; the vm has 2 vCPUs"):
        kvmmu.replay(ForeignTrace("test", Path("made"), told, Brings(), vcpus=8, tells_registers=True), vm, mode="machine")


@pytest.mark.parametrize("host", ["ept", "shadow"])
def test_tlbs_beside_a_machine(host):
    """The counters of a walk: of two stages under EPT, of the shadow page tables alone under shadow paging."""
    recording = Recording.open(DATA / "linux" / "l5")
    plain, report = kvmmu.replay(recording, tlb="zen3"), kvmmu.replay(recording, mode="machine", host=host, tlb="zen3")
    assert report.tlb.hits.tolist() == plain.tlb.hits.tolist()
    assert report.tlb.guest_refs == plain.tlb.guest_refs
    assert (report.tlb.host_refs > report.tlb.guest_refs) == (host == "ept")
    assert report.exits == kvmmu.replay(recording, mode="machine", host=host).exits


def test_what_a_machine_is_refused_for():
    tables = some_tables()
    for vm, given, words in [
            (Vm(GuestMemory(MB2)), {}, "vm: has no vCPU"), (vm_of("ept", "4k"), {"host": "ept"}, "host: the vm has one"),
            (vm_of("ept", "4k"), {"backing": "4k"}, "backing: the vm has one"),
            (vm_of("ept", "4k", MB2), {}, "vm: the trace brings memory from gpa 0x0 to 0x7fffff")]:
        with pytest.raises(ValueError, match=words):
            kvmmu.replay(trace_of(tables, [(0, 0x400000, 0, 0)]), vm, mode="machine", **given)
    with pytest.raises(TypeError, match="vm: want a Vm, a Vcpu or None, got int"):
        kvmmu.replay(trace_of(tables, []), 3, mode="machine")
    rows = {"op": np.array([Op.RESTART], np.uint8), "addr": np.zeros(1, np.uint64), "access": np.zeros(1, np.uint8),
            "value": np.zeros(1, np.uint64)}
    with pytest.raises(TraceError, match="RESTART.*needs memory that the trace brings"):
        kvmmu.replay([rows], vm_of("ept", "4k"), mode="machine")


def test_an_interrupt_waits_for_the_end_of_a_chunk(monkeypatch):
    """The report counts whole chunks, and has the exits of each."""
    before, chunks = machine_replay._MachineRun.take, []

    def take(self, chunk):
        if len(chunks) == 1:
            os.kill(os.getpid(), signal.SIGINT)
            os.getpid()
        before(self, chunk)
        chunks.append(self.accesses)
    monkeypatch.setattr(machine_replay._MachineRun, "take", take)
    columns = {"op": np.zeros(10, np.uint8), "addr": np.full(10, 0x400000, np.uint64), "access": np.zeros(10, np.uint8)}
    trace = trace_of(some_tables(), [])
    several = Trace(trace.header, [*trace._chunks, columns, columns, columns])
    with pytest.raises(kvmmu.ReplayInterrupted, match="interrupted after 10 accesses") as found:
        kvmmu.replay(several, mode="machine")
    report = found.value.report
    assert (report.complete, report.accesses, report.exits) == (False, 10, {"EPT violations": 2})


def test_the_command_on_the_machine_of_an_image(tmp_path, capsys):
    image = tmp_path / "dump.elf"
    image.write_bytes(image_files.qemu_core(image_files.Guest()))
    trace = tmp_path / "trace.csv"
    trace.write_text("va,type\n0x400000,R\n0x400008,R\n")
    assert main(["replay", str(trace), "--image", str(image), "--machine", "npt", "--backing", "4k", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["host"], found["backing"], found["accesses"]) == ("npt", "4k", 2)
    trace.write_text("va,type\n0x400000,R\n0x700000,R\n0x700000,R\n")
    assert main(["replay", str(trace), "--image", str(image), "--machine", "ept"]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[0].endswith("mode 4l")
    told = [line.strip(" │").split() for line in text.splitlines() if "(U)" in line or "register contexts" in line]
    assert [words[-1] for words in told] == ["1", "2"]


@pytest.mark.parametrize(("options", "message"), [
    (["--machine", "ept"], "--machine ept: TRACE brings no registers and page tables; want --image FILE, too, or no --machine; "
     "kvmmu compare runs such a trace under several hosts"),
    (["--machine", "ept", "--page", "2m", "--pager"], "--page, --pager: a machine runs on the page tables that there are; "
     "allowed without --machine"),
    (["--machine", "npt", "--image", "IMAGE", "--checkpoint", "x"],
     "--checkpoint: the state of a whole machine is not kept in a file; allowed without --machine"),
    (["--machine", "npt", "--image", "IMAGE", "--resume", "x"],
     "--resume: the state of a whole machine is not kept in a file; allowed without --machine"),
    (["--image", "IMAGE", "--checkpoint", "x"], "--checkpoint: the memory of an image is not kept in a file; allowed without "
     "--image"),
    (["--machine", "npt", "--image", "IMAGE", "--scheduler", "threads"],
     "--scheduler threads: a machine runs in one process; allowed without --machine")])
def test_options_that_do_not_go_together(tmp_path, capsys, options, message):
    """Messages name options and commands, not arguments and functions of Python."""
    image, trace = tmp_path / "dump.elf", tmp_path / "trace.csv"
    image.write_bytes(image_files.qemu_core(image_files.Guest()))
    trace.write_text("va,type\n0x400000,R\n")
    assert main(["replay", str(trace), *(str(image) if option == "IMAGE" else option for option in options)]) == 2
    assert capsys.readouterr().err == f"kvmmu: {message.replace('TRACE', str(trace))}\n"


def test_command(capsys):
    path = str(DATA / "linux" / "l5")
    assert main(["replay", path, "--machine", "npt", "--backing", "4k"]) == 0
    text = capsys.readouterr().out
    for part in ("Exits to a host with npt, 4k backing", "nested page faults", "pages of SPTEs", "RET_PF"):
        assert part in text
    assert main(["replay", path, "--machine", "ept", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["host"] == "ept"
    assert found["exits"]["EPT violations"] == sum(found["sptes"].values())
