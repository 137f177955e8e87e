# SPDX-License-Identifier: Apache-2.0
"""Recordings and chunks that a caller has made or changed are checked before compiled code walks them."""

import threading
from dataclasses import replace

import numpy as np
import pytest
from paths import DATA

import kvmmu
from kvmmu import GuestMemory, Regs, Vcpu
from kvmmu.replay._replay import END, new_row_loop
from kvmmu.traces import Chunk, Header, Op, Recording, RegisterSet, Trace

CLIP = DATA / "linux" / "l4"


@pytest.fixture(scope="module")
def recording():
    return Recording.open(CLIP)


def chunk(n=1, **columns):
    """A chunk of accesses with paging off, or of what is given."""
    plain = {"op": np.zeros(n, np.uint8), "addr": np.zeros(n, np.uint64), "access": np.zeros(n, np.uint8),
             "gpa": np.zeros(n, np.uint64), "size": None, "vcpu": None, "value": None, "has_events": False, "all_known": True,
             "vcpus": 1}
    return Chunk(**(plain | columns))


def write(addr, size, value=0x4141414141414141):
    return chunk(op=np.full(1, Op.GUEST_WRITE, np.uint8), addr=np.full(1, addr, np.uint64), size=np.full(1, size, np.uint8),
                 value=np.full(1, value, np.uint64), has_events=True)


def plain_vcpu():
    vcpu = Vcpu(GuestMemory(0x1000))
    vcpu.set_regs(cr0=1)
    return vcpu


@pytest.mark.parametrize(("name", "change"), [
    ("pidx", lambda r: np.full(r.pidx.size, 65535, r.pidx.dtype)), ("pidx", lambda r: np.full(r.pidx.size, 1 << 31, np.uint32)),
    ("pidx", lambda r: r.pidx[:-1]), ("pidx", lambda r: r.pidx.astype(np.int64)), ("off", lambda r: r.off[:-1]),
    ("kind", lambda r: np.full(r.kind.size, 3, np.uint8)),
    ("kind", lambda r: r.kind.tolist()), ("priv", lambda r: np.full(r.priv.size, 255, np.uint8)), ("priv", lambda r: r.priv[:0]),
    ("pages_gva", lambda r: r.pages_gva[:-1]), ("pages_gpa", lambda r: r.pages_gpa[:1]),
    ("pages_gpa", lambda r: r.pages_gpa.astype(np.float64)), ("pages_ctx", lambda r: r.pages_ctx + np.uint32(len(r.ctx))),
    ("pages_ctx", lambda r: np.full(r.pages_ctx.size, 0xFFFFFFFF, np.uint32)),
    ("writes", lambda r: r.writes._replace(gpa=np.zeros(r.writes.gpa.size + 1, np.uint64))),
    ("writes", lambda r: r.writes._replace(pos=r.writes.pos.astype(np.uint32))),
])
def test_a_recording_with_columns_that_do_not_fit(recording, name, change):
    """The error names the column, or the other one of two that do not go together."""
    changed = replace(recording, **{name: change(recording)})
    with pytest.raises(ValueError, match="page|pidx|off|kind|priv|w_|list"):
        kvmmu.replay(changed)


def test_a_recording_with_pages_that_are_nowhere(recording):
    """A walk that fails ends at no address, and so is not verified by an address of 2**64-1."""
    nowhere = np.full(recording.pages_gpa.size, 2**64 - 1, np.uint64)
    with pytest.raises(ValueError, match="pages_gpa"):
        kvmmu.replay(replace(
            recording, pages_gva=nowhere - np.uint64(0xFFFF), pages_gpa=nowhere, off=np.zeros_like(recording.off)))


def test_columns_of_other_forms(recording):
    """Page numbers of four bytes do as those of two; rows may lie apart from each other, or not aligned."""
    expected = kvmmu.replay(recording)
    wide = recording.pidx.astype(np.uint32)
    shifted = np.frombuffer(b"\0" + wide.tobytes(), np.uint32, offset=1)
    for change in ({"pidx": wide}, {"pidx": shifted}, {"off": np.repeat(recording.off, 2)[::2]}):
        report = kvmmu.replay(replace(recording, **change))
        assert (expected.verified, expected.mismatches, expected.kinds) == (report.verified, report.mismatches, report.kinds)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_columns_of_a_recording_that_a_thread_changes(recording, dtype):
    """Rows may be walked wrong; every index is held in its range where it is used."""
    pidx, kind, priv = recording.pidx.astype(dtype), recording.kind.copy(), recording.priv.copy()
    changed = replace(recording, pidx=pidx, kind=kind, priv=priv)
    stop = threading.Event()

    def change():
        before = pidx.copy(), kind.copy(), priv.copy()
        while not stop.is_set():
            for column, values in zip((pidx, kind, priv), before, strict=True):
                column[:] = np.iinfo(column.dtype).max
                column[:] = values

    thread = threading.Thread(target=change)
    thread.start()
    for _ in range(20):
        try:
            kvmmu.replay(changed)
        except (ValueError, IndexError):
            continue
    stop.set()
    thread.join()


@pytest.mark.parametrize(("bad", "text"), [
    (write(4088, 255), "255 bytes to 0xff8"), (write(4088, 16), "16 bytes"), (write(4088, 0), "0 bytes"),
    (write(4090, 8), "0xffa"), (write(4095, 2), "0xfff"), (write(0, 3), "3 bytes"),
    (replace(write(0, 8), value=None), "no size or no value"), (replace(write(0, 8), size=None), "no size or no value"),
    (replace(write(0, 8), value=None, has_events=False), "want 1, 2, 4 or 8"),
    (chunk(2, gpa=np.zeros(1, np.uint64)), "one length"), (chunk(2, access=np.zeros(3, np.uint8)), "one length"),
    (chunk(2, op=np.zeros(1, np.uint8)), "one length"), (chunk(vcpu=np.zeros(2, np.uint16)), "one length"),
    (chunk(addr=np.zeros(1, np.int64)), "addr"), (chunk(addr=None), "addr"), (chunk(access=np.zeros(1, np.uint64)), "access"),
    (chunk(gpa=[0]), "gpa"), (chunk(vcpus=2), "2 vCPUs"),
    (chunk(op=np.full(1, 200, np.uint8)), "200"), (chunk(op=np.full(1, Op.SET_REGS, np.uint8)), None),
    (chunk(addr=np.full(1, 1 << 40, np.uint64), gpa=np.full(1, 2**64 - 1, np.uint64)), None),
])
def test_chunks_that_are_not_what_they_say(bad, text):
    """They end the replay with an exception, and change no memory; the compiled loop checks for itself."""
    vcpu = plain_vcpu()
    errors = []
    try:
        report = kvmmu.replay([chunk(), bad], vcpu)
    except Exception as error:
        errors.append(str(error))
    else:                                       # a number of vCPUs is counted anew
        assert (text is None, report.verified) in ((True, 1), (bad.vcpus == 1, 2))
    loop = new_row_loop(vcpu.gva_walk, 1)
    loop.use(0, vcpu.gva_walk.prepare([vcpu.regs]))
    try:
        loop.load(bad)
        loop.run()
    except Exception as error:
        errors.append(str(error))
    assert text is None or any(text in error for error in errors)
    assert bytes(0x1000) == vcpu.mem.read(0, 0x1000)


def test_all_known_is_no_promise_that_is_believed():
    """Rows without a recorded address in a chunk that says it has all of them: none of them is verified."""
    vcpu = Vcpu(GuestMemory(0x1000))
    vcpu.set_regs(cr0=0x80010001, cr3=0x1000, cr4=0x20, efer=0xD00)
    unknown = chunk(300, gpa=np.full(300, 2**64 - 1, np.uint64))
    report = kvmmu.replay([unknown], vcpu)
    assert (report.verified, report.unchecked, report.mismatches) == (0, 300, 0)
    loop = new_row_loop(vcpu.gva_walk, 1)
    loop.use(0, vcpu.gva_walk.prepare([vcpu.regs]))
    loop.load(unknown)
    with pytest.raises(ValueError, match="address of each access"):
        loop.run()


def test_vcpus_beyond_the_last():
    """In the column, or only while it is walked."""
    vcpu = plain_vcpu()
    header = Header(registers=(RegisterSet(cr0=1, cr3=0, cr4=0, efer=0),) * 2)
    beyond = chunk(3, vcpu=np.array([0, 1, 2], np.uint16), vcpus=2)
    with pytest.raises(ValueError, match="vcpu is 2"):
        kvmmu.replay(Trace(header, [beyond]), vcpu)
    loop, sets = new_row_loop(vcpu.gva_walk, 2), vcpu.gva_walk.prepare([Regs(cr0=1, cr3=0, cr4=0, efer=0)])
    with pytest.raises(ValueError, match="registers of 0"):
        loop.load(chunk())
    for number in (0, 1):
        assert loop.use(number, sets) == 0              # one set, on both
    n = 400_000
    vcpus, stop = np.zeros(n, np.uint16), threading.Event()

    def change():
        while not stop.is_set():
            vcpus[:] = 60_000
            vcpus[:] = 0

    thread = threading.Thread(target=change)
    thread.start()
    walked = 0
    for _ in range(40):
        try:
            loop.load(chunk(n, vcpu=vcpus, vcpus=2))
        except ValueError:
            continue
        assert (loop.run(), loop.row, loop.accesses) == (END, n, n * (walked := walked + 1))
    stop.set()
    thread.join()


def test_loops_are_for_one_thread():
    """While one walks without the GIL, another that comes along is told so."""
    vcpu = plain_vcpu()
    loop = new_row_loop(vcpu.gva_walk, 1)
    loop.use(0, vcpu.gva_walk.prepare([Regs(cr0=1, cr3=0, cr4=0, efer=0)]))
    n = 3_000_000
    loop.load(chunk(n))
    refused, done = [], threading.Event()

    def run():
        for _ in range(20):
            try:
                loop.run()
            except RuntimeError as error:
                refused.append(str(error))
        done.set()

    thread = threading.Thread(target=run)
    thread.start()
    while not done.is_set():
        try:
            loop.load(chunk(n))
        except RuntimeError as error:
            refused.append(str(error))
    thread.join()
    assert set(refused) <= {"another thread walks rows with this loop"}
