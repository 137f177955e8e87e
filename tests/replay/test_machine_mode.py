# SPDX-License-Identifier: Apache-2.0
"""Traces on a whole machine: the recorded addresses, exits explained one by one, and a tiny trace by hand."""

import json

import numpy as np
import pytest
from paths import DATA

import kvmmu
from kvmmu import GuestMemory, PageTables
from kvmmu.cli.command import main
from kvmmu.traces import Header, Op, Recording, RegisterSet, Trace

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


def test_arguments(capsys):
    recording = Recording.open(DATA / "linux" / "l5")
    for given, message in (({"mode": "fast"}, "mode: "), ({"host": "ept"}, "host: is of mode 'machine'"),
                           ({"backing": "4k"}, "backing: is of mode 'machine'"), ({"mode": "machine", "host": "xen"}, "host: "),
                           ({"mode": "machine", "backing": "8k"}, "backing: "),
                           ({"mode": "machine", "tlb": "zen3"}, "tlb: mode")):
        with pytest.raises(ValueError, match=message):
            kvmmu.replay(recording, **given)
    with pytest.raises(ValueError, match="'machine' is for traces that bring registers"):
        kvmmu.replay(kvmmu.traces.bundled("lackey"), mode="machine")
    assert main(["replay", "bundled-lackey", "--backing", "4k"]) == 2
    assert "--backing: is of a machine" in capsys.readouterr().err


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
