# SPDX-License-Identifier: Apache-2.0
"""Recorded guests on the machine: which there are, and their replay in order."""

import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from paths import DATA

from kvmmu import GuestMemory, Regs, Vm
from kvmmu.replay.register_events import use_context
from kvmmu.replay.replay import recording_vcpu
from kvmmu.traces import Recording, RecordingError

CLIPS = DATA / "linux"
WHOLE = os.environ.get("KVMMU_RECORDINGS")
PAGE, MB2 = 0x1000, 0x200000
INVALID = 2**64 - 1
CR3_LOAD, CR4_LOAD, INVLPG, CR0_LOAD = 1, 2, 3, 4
EMULATE = 2


def cases(nested=False):
    """(directory, phase) of every recording, either those without a nested guest or those with one."""
    roots = [("clip", CLIPS)] + ([("whole", Path(WHOLE))] if WHOLE else [])
    for kind, root in roots:
        for path in sorted(root.iterdir()):
            for phase in ("static", "dyn"):
                if any((path / f"{phase}_trace.npz{suffix}").exists() for suffix in ("", ".zst")) and (
                        nested == ("n" == path.name[0])):
                    yield pytest.param(path, phase, id=f"{kind} {path.name} {phase}")


def open_recording(path, phase):
    try:
        return Recording.open(path, phase)
    except RecordingError as error:
        if "zst" in str(error):
            pytest.skip(str(error))
        raise


def clear_ad(recording):
    """The table pages with every A and D bit of a present entry clear, as uint8 (n, 4096)."""
    dtype = np.uint32 if recording.mode == "32" else np.uint64
    words = recording.table_data.copy().view(dtype)
    words[words & 1 == 1] &= dtype(~(3 << 5) & np.iinfo(dtype).max)
    return words.view(np.uint8).reshape(-1, PAGE)


class Guest:
    """A recorded guest in memory of its own, on a machine.

    told: KVM learns of the guest's writes to its tables, as of emulated ones; without two-dimensional paging it must.
    """

    def __init__(self, recording, host, backing, data, told=False):
        self.recording, self.told = recording, told
        plain, self.contexts = recording_vcpu(recording)
        real = recording.pages_gpa[recording.pages_io == 0]
        size = int(max(real.max(), int(recording.table_pfn.max()) << 12)) + PAGE
        self.mem = GuestMemory(-(-size // MB2) * MB2)
        for pfn, page in zip(recording.table_pfn.tolist(), data, strict=True):
            self.mem.write(pfn << 12, page.tobytes())
        self.vm = Vm(self.mem, cpu=plain.cpu, host=host, backing=backing)
        self.vcpu = self.vm.create_vcpu()
        self.ctx = None

    def use(self, ctx):
        """Load the registers of a context, and its PDPTEs as they are now; everything is flushed."""
        self.ctx = ctx
        regs = self.contexts[ctx]
        if not isinstance(regs, Regs):
            use_context(self.vcpu, regs)
            return
        self.vcpu.leave_nested()
        names = ["cr0", "cr3", "cr4", "efer"]
        if self.vm.host.tdp is not None:                    # shadow paging has no protection keys
            names.append("pkru")
        registers = {name: getattr(regs, name) for name in names}
        if regs.pdptrs is not None:
            registers["pdptrs"] = tuple(self.mem.read_u64((regs.cr3 & 0xFFFFFFE0) + 8 * i) & ~(1 << 5) for i in range(4))
        self.vcpu.set_regs(**registers)

    def write(self, gpa, value):
        """The guest writes an entry of a table."""
        if self.told:
            self.vm.write_guest_physical(gpa, value.to_bytes(8, "little"))
        else:
            self.mem.write_u64(gpa, value)

    def run(self):
        """Replay in order; checks each address, and returns the accesses that KVM emulated, by their row."""
        recording = self.recording
        events, writes = recording.events, recording.writes
        ctx = recording.pages_ctx[recording.pidx]
        cuts = {0, len(recording), *(events.pos.tolist()), *((writes.pos + np.uint64(1)).tolist()),
                *(np.flatnonzero(np.diff(ctx)) + 1).tolist()}
        cuts = sorted(cut for cut in cuts if cut <= len(recording))
        by_event, by_write = {}, {}
        for pos, code, value in zip(events.pos.tolist(), events.code.tolist(), events.val.tolist(), strict=True):
            by_event.setdefault(pos, []).append((code, value))
        for pos, gpa, value in zip(writes.pos.tolist(), writes.gpa.tolist(), writes.val.tolist(), strict=True):
            by_write.setdefault(pos + 1, []).append((gpa, value))
        emulated = []
        for start, stop in pairwise(cuts):
            for gpa, value in by_write.get(start, ()):
                self.write(gpa, value)
            reload = int(ctx[start]) != self.ctx
            for code, value in by_event.get(start, ()):
                if code == INVLPG:
                    self.vcpu.invlpg(value)
                reload |= code in (CR3_LOAD, CR4_LOAD, CR0_LOAD)
            if reload:
                self.use(int(ctx[start]))
            columns = recording.columns(start, stop)
            r = self.vcpu.access(columns["gva"], recording.access_bytes(start, stop))
            wrong = np.flatnonzero((r.gpa != columns["gpa"]) | (r.status != 0))
            if wrong.size:
                row = int(wrong[0])
                raise AssertionError(
                    f"access {start + row}: {int(columns['gva'][row]):#x} reached {int(r.gpa[row]):#x}, status {r.status[row]}, "
                    f"error code {r.error_code[row]:#x}; recorded {int(columns['gpa'][row]):#x}")
            io = columns["io"] != 0
            assert (r.hpa[io] == INVALID).all()
            assert (r.hpa[~io] != INVALID).all()
            emulated += (start + np.flatnonzero(r.ret == EMULATE)).tolist()
        return emulated


def table_frames(guest):
    """Frames of the tables that walks of the recorded pages read."""
    frames = set()
    recording = guest.recording
    for ctx in np.unique(recording.pages_ctx).tolist():
        guest.use(ctx)
        for gva in recording.pages_gva[recording.pages_ctx == ctx].tolist():
            frames |= {step.gpa >> 12 for step in guest.vcpu.gva_walk.walk_record(gva).steps if step.gpa is not None}
    return frames
