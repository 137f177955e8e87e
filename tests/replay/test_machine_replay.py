# SPDX-License-Identifier: Apache-2.0
"""Recordings of real guests on the machine: the recorded addresses, the A and D bits of plain walks, and every exit explained.

KVMMU_RECORDINGS names a directory of whole recordings, which are replayed too.
"""

import numpy as np
import pytest
from recorded_guest import CLIPS, PAGE, Guest, cases, clear_ad, open_recording, table_frames

from kvmmu import Access, Host
from kvmmu.replay.replay import replay


@pytest.mark.parametrize("backing", ["4k", "2m"])
@pytest.mark.parametrize("tdp", ["ept", "npt"])
@pytest.mark.parametrize(("path", "phase"), list(cases()))
def test_recording(path, phase, tdp, backing):
    """Same addresses; A and D as plain walks leave them; first touches are the distinct host pages, nothing else exits."""
    recording = open_recording(path, phase)
    data = clear_ad(recording) if phase == "static" else recording.table_data
    guest = Guest(recording, Host(tdp=tdp, maxphyaddr=46), backing, data)
    emulated = guest.run()
    stats = guest.vm.stats
    assert guest.vm.audit() == []
    assert stats["bugs"] == stats["pf_spurious"] == stats["pf_fast"] == 0

    io = recording.pages_io[recording.pidx] != 0
    assert np.flatnonzero(io).tolist() == emulated
    io_frames = {int(gpa) >> 12 for gpa in np.unique(recording.pages_gpa[recording.pages_io != 0])}
    assert len(emulated) == stats["mmio_exits"] == stats["insn_emulation"]
    assert len(io_frames) == stats["pf_mmio_spte_created"] == stats["pf_emulate"]

    shift = 12 if backing == "4k" else 21
    mapped = stats["pages_4k"] if backing == "4k" else stats["pages_2m"]
    assert mapped == stats["pf_fixed"] == stats["pf_taken"] - len(io_frames)
    assert stats["exits"] == mapped + len(emulated)
    touched = {int(gpa) >> shift for gpa in recording.pages_gpa[recording.pages_io == 0]}
    if phase == "static":
        touched |= {frame >> (shift - 12) for frame in table_frames(guest)}
        assert mapped == len(touched)
        assert_same_ad(recording, guest, data)
    else:                           # tables come and go: those at the end are some of all
        assert mapped >= len(touched)
        tables = {int(pfn) >> (shift - 12) for pfn in recording.table_pfn}
        assert mapped <= len(touched | tables)


def assert_same_ad(recording, guest, data):
    """The tables are, byte for byte, as the same accesses leave them without a host."""
    other = Guest(recording, Host(), "4k", data)
    ctx = recording.pages_ctx[recording.pidx]
    for number in np.unique(ctx).tolist():
        other.use(number)
        rows = ctx == number
        t = other.vcpu.gva_walk.translate(
            np.ascontiguousarray(recording.columns()["gva"][rows]), np.ascontiguousarray(recording.access_bytes()[rows]))
        assert (t.status == 0).all()
    for pfn in recording.table_pfn.tolist():
        assert other.mem.read(pfn << 12, PAGE) == guest.mem.read(pfn << 12, PAGE), f"table page {pfn:#x}"


@pytest.mark.parametrize("backing", ["4k", "2m"])
@pytest.mark.parametrize(("path", "phase"), list(cases()))
def test_recording_under_shadow_paging(path, phase, backing):
    """Same addresses, A and D as plain walks leave them; KVM emulates MMIO, and writes to tables, alone."""
    recording = open_recording(path, phase)
    data = clear_ad(recording) if phase == "static" else recording.table_data
    guest = Guest(recording, Host(tdp=None, maxphyaddr=46), backing, data, told=True)
    emulated = guest.run()
    stats = guest.vm.stats
    io = recording.pages_io[recording.pidx] != 0
    others = np.setdiff1d(emulated, np.flatnonzero(io))
    assert np.isin(np.flatnonzero(io), emulated).all()
    assert (recording.access_bytes()[others] & Access.WRITE).all()
    tables = np.union1d(recording.table_pfn, recording.writes.gpa >> np.uint64(12))
    assert np.isin(recording.columns()["gpa"][others] >> np.uint64(12), tables).all()
    assert stats["bugs"] == stats["pf_guest"] == 0
    assert stats["pf_taken"] == stats["pf_fixed"] + stats["pf_spurious"] + stats["pf_emulate"]
    assert guest.vm.audit() == []
    if phase == "static":
        assert_same_ad(recording, guest, data)


@pytest.mark.parametrize("tdp", ["ept", "npt"])
@pytest.mark.parametrize(("path", "phase"), list(cases(nested=True)))
def test_recording_of_a_nested_guest(path, phase, tdp):
    """L1 and L2 on one machine: same addresses, through shadows of L1's nested page tables."""
    recording = open_recording(path, phase)
    guest = Guest(recording, Host(tdp=tdp, maxphyaddr=46), "2m", recording.table_data, told=True)
    guest.run()
    stats = guest.vm.stats
    assert stats["bugs"] == 0
    assert stats["mmu_cache_miss"] > 0
    assert guest.vm.audit() == []


def test_the_walks_alone_agree():
    """What the comparison above rests on: the recording replays without a machine."""
    assert 0 == replay(open_recording(CLIPS / "l5", "dyn")).mismatches
