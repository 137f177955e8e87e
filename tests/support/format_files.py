# SPDX-License-Identifier: Apache-2.0
"""Trace files of other tools, written byte by byte from their layouts, and read again in plain Python."""

import bz2
import gzip
import io
import lzma
import random
import re
import struct
import zipfile

import numpy as np
from paths import DATA

from kvmmu.traces import TraceError
from kvmmu.traces.opening import open_trace

LOAD, STORE, FETCH = 0, 1, 2
LOAD_MMIO, STORE_MMIO = 4, 5
WRITE, USER, AC, EXEC = 2, 4, 8, 16
KERNEL = 0xFFFF_FFFF_8100_0000


def access_of(op, addr, who):
    """The access byte of the reader's rule: a supervisor's if `who` is in the upper half, which passes SMAP in the lower one."""
    kind = {LOAD: 0, STORE: WRITE, FETCH: EXEC}[op & 3]
    if who >> 63 == 0:
        return kind | USER
    return kind if addr >> 63 else kind | AC


def row(op, addr, size=1, ip=0, who=None, **more):
    """A row by column; `access` by ip, or by the address where there is none."""
    who = (ip or addr) if who is None else who
    return {"op": op, "addr": addr, "access": access_of(op, addr, who), "size": size, "ip": ip} | more


# ---- ChampSim ----------------------------------------------------------------------------------------------------------

def champsim_record(ip, loads=(), stores=(), cloudsuite=False):
    """64 bytes: ip, flags, 2 + 4 registers, 2 stores, 4 loads. 96: 4 + 4 registers, 4 stores, 4 loads, asid, padding."""
    slots = 4 if cloudsuite else 2
    record = struct.pack("<QBB", ip, 1, 0) + bytes(range(slots + 4))
    record += b"\0" * (-len(record) % 8)
    record += struct.pack(f"<{slots}Q", *stores, *[0] * (slots - len(stores)))
    record += struct.pack("<4Q", *loads, *[0] * (4 - len(loads)))
    return record + (b"\1\2" + b"\0" * 6 if cloudsuite else b"")


def champsim_file(instructions=2000, cloudsuite=False, seed=1):
    """A file, and its rows."""
    rng = random.Random(seed)
    data, rows, ip = b"", [], 0x40_1000
    for _ in range(instructions):
        ip = (ip + rng.randrange(1, 16)) if rng.random() < 0.9 else rng.choice((0x40_1000, 0x7F12_3456_7000, KERNEL))
        loads = [rng.choice((0x7FFD_0000_0000, KERNEL, 0x60_0000)) + rng.randrange(1 << 16) for _ in range(rng.randrange(3))]
        stores = [0x60_0000 + rng.randrange(1 << 16) for _ in range(rng.choice((0, 0, 1, 2)))]
        data += champsim_record(ip, loads, stores, cloudsuite)
        rows.append(row(FETCH, ip, ip=ip))
        rows += [row(LOAD, addr, ip=ip) for addr in loads] + [row(STORE, addr, ip=ip) for addr in stores]
    return data, rows


# ---- DynamoRIO ---------------------------------------------------------------------------------------------------------

READ, WRITE_ENTRY, PREFETCH, INSTR, DIRECT_CALL, BUNDLE, DATA_FLUSH = 0, 1, 3, 10, 14, 17, 20
THREAD, THREAD_EXIT, PID, HEADER, FOOTER, MARKER, NO_FETCH, ENCODING, TAKEN = 22, 23, 24, 25, 26, 28, 29, 47, 48
TIMESTAMP, CPU_ID, FILETYPE, VERSION, WINDOW_ID, PHYSICAL, NOT_AVAILABLE, VIRTUAL, PAGE_SIZE = 2, 3, 9, 12, 14, 15, 16, 17, 18
KERNEL_EVENT, CHUNK_FOOTER = 0, 21
CORE_SHARDED = 0x10000


def entry(kind, size, addr, narrow=False):
    return struct.pack("<HHI" if narrow else "<HHQ", kind, size, addr)


def marker(kind, value, narrow=False):
    return entry(MARKER, kind, value, narrow)


def drmemtrace_begin(tid, file_type=0x40, narrow=False):
    return (entry(HEADER, 0, 7, narrow) + marker(VERSION, 7, narrow) + marker(FILETYPE, file_type, narrow)
            + entry(THREAD, 4, tid, narrow) + entry(PID, 4, 100, narrow))


def drmemtrace_file(tid=100, instructions=1500, seed=2, physical=True, times=lambda i: 1000 + i):
    """A file, and its rows with `gpa` (None where unknown) and the timestamp under which each stands."""
    rng = random.Random(seed)
    data, rows, frames, now = drmemtrace_begin(tid), [], {}, 0

    def known(addr):
        frame = frames.get(addr >> 12)
        return None if frame is None else frame << 12 | addr & 0xFFF

    def touch(addr):
        if not physical or addr >> 12 in frames or rng.random() < 0.2:
            return b""
        if rng.random() < 0.1:
            return marker(NOT_AVAILABLE, addr)
        frames[addr >> 12] = rng.randrange(1 << 20)
        return marker(PHYSICAL, frames[addr >> 12] << 12) + marker(VIRTUAL, addr & ~0xFFF)

    for i in range(instructions):
        if i % 100 == 0:
            now = times(i // 100)
            data += marker(TIMESTAMP, now) + marker(CPU_ID, 3) + marker(WINDOW_ID, i // 500)
        ip, length = rng.choice((0x40_0000, 0x7F00_1234_0000, KERNEL)) + rng.randrange(1 << 14), rng.randrange(1, 16)
        data += touch(ip)
        if rng.random() < 0.3:
            data += entry(ENCODING, 8, rng.getrandbits(64)) + entry(ENCODING, length, rng.getrandbits(64))
        kind = rng.choice((INSTR, INSTR, DIRECT_CALL, TAKEN, NO_FETCH))
        data += entry(kind, length, ip)
        if kind != NO_FETCH:
            rows.append(row(FETCH, ip, length, ip, gpa=known(ip), time=now))
        for _ in range(rng.randrange(3)):
            addr, size = 0x7FFD_0000_0000 + rng.randrange(1 << 15), rng.choice((1, 2, 4, 8, 16, 64))
            data += touch(addr)
            op = rng.choice((LOAD, STORE))
            data += entry(READ if op == LOAD else WRITE_ENTRY, size, addr)
            rows.append(row(op, addr, size, ip, gpa=known(addr), time=now))
        if rng.random() < 0.05:
            data += entry(PREFETCH, 64, 0x1000) + entry(DATA_FLUSH, 64, 0x2000) + marker(KERNEL_EVENT, ip)
    return data + entry(THREAD_EXIT, 4, tid) + entry(FOOTER, 0, 0), rows


def zip_of(members, compression=zipfile.ZIP_DEFLATED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


# ---- text --------------------------------------------------------------------------------------------------------------

def lackey_rows(text):
    """The rows of a lackey file by a regular expression."""
    rows, ip = [], 0
    for kind, addr, size in re.findall(r"^(I | [LSM]) +([0-9a-fA-F]+),(\d+)$", text, re.MULTILINE):
        addr, size = int(addr, 16), int(size)
        if kind == "I ":
            ip = addr
        for op in {"I ": (FETCH,), " L": (LOAD,), " S": (STORE,), " M": (LOAD, STORE)}[kind]:
            rows.append(row(op, addr, size, ip, who=0))
    return rows


def pinatrace_file(lines=2000, seed=3):
    rng = random.Random(seed)
    text, rows = "", []
    for _ in range(lines):
        ip, addr = 0x7F00_0000_0000 + rng.randrange(1 << 20), 0x7FFD_0000_0000 + rng.randrange(1 << 16)
        kind, size = rng.choice("RW"), rng.choice((None, 1, 8, 64))
        text += f"{ip:#x}: {kind} {addr:#x}" + ("" if size is None else f"  {size} 0x{rng.getrandbits(32):x}") + "\n"
        rows.append(row(LOAD if kind == "R" else STORE, addr, size or 1, ip, who=0))
    return (text + "#eof\n").encode(), rows


def execlog_file(lines=2000, seed=4, system=False):
    """A log of user emulation, or of a system: physical addresses with a device's name."""
    rng = random.Random(seed)
    text, rows = "", []
    for _ in range(lines):
        vcpu, ip = rng.randrange(3), rng.choice((0x40_0000, KERNEL)) + rng.randrange(1 << 12)
        text += f'{vcpu}, 0x{ip:x}, 0x{rng.getrandbits(32):x}, "movq %rax, (%rbx), %rcx"'
        if not system:
            rows.append(row(FETCH, ip, 1, ip, vcpu=vcpu, gpa=None))
        for _ in range(rng.choice((0, 1, 1, 2))):
            op, device = rng.choice((LOAD, STORE)), rng.choice(("RAM", "RAM", "apic-msi")) if system else None
            addr = rng.randrange(1 << 30) if system else 0x7FFD_0000_0000 + rng.randrange(1 << 16)
            text += f", {'load' if op == LOAD else 'store'}, 0x{addr:08x}" + (f", {device}" if device else "")
            made = row(op, addr, 1, ip, vcpu=vcpu, gpa=addr if system else None)
            rows.append(made | {"op": op + 4} if device == "apic-msi" else made)
        text += "\n"
    return text.encode(), rows


def perf_file(lines=1000, seed=5):
    rng = random.Random(seed)
    text, rows = "# a comment\n", []
    for i in range(lines):
        event, op = rng.choice((("cpu/mem-loads,ldlat=30/P", LOAD), ("cpu/mem-stores/P", STORE), ("page-faults", LOAD)))
        ip, addr = rng.choice((0x40_0000, KERNEL)) + rng.randrange(1 << 16), 0x7FFD_0000_0000 + rng.randrange(1 << 16)
        cpu, gpa = rng.randrange(8), rng.choice((0, rng.randrange(1, 1 << 40)))
        text += f"  CPU {i % 3}/x {4000 + cpu} [{cpu:03d}] {i}.{i:06d}: {event}: {addr:16x} {ip:16x} {gpa:16x}\n"
        rows.append(row(op, addr, 1, ip, vcpu=cpu, gpa=gpa or None))
    return text.encode(), rows


def ftrace_file(lines=1000, seed=6):
    """Page faults with exit qualifications of EPT violations and error codes of #NPF, among other events."""
    rng = random.Random(seed)
    text, rows = "# tracer: nop\n#\n", []
    for i in range(lines):
        vcpu, rip, addr = rng.randrange(4), rng.choice((0x40_0000, KERNEL)) + i, rng.randrange(1 << 40)
        code, op = rng.choice(((0x181, LOAD), (0x182, STORE), (0x184, FETCH), (0x1_0000_0004, LOAD), (0x1_0000_0006, STORE),
                               (0x1_0000_0014, FETCH)))
        text += (f"       CPU {vcpu}/KVM-{800 + vcpu}     [00{vcpu}] d..1. {i}.000001: kvm_page_fault: vcpu {vcpu} rip 0x{rip:x} "
                 f"address 0x{addr:016x} error_code 0x{code:x}\n")
        rows.append(row(op, addr, 1, rip, who=rip, vcpu=vcpu, gpa=addr))
        if i % 5 == 0:
            text += f"       CPU {vcpu}/KVM-{800 + vcpu}     [00{vcpu}] d..1. {i}.000002: kvm_mmu_get_page: new sp gfn 1 0/4 q0\n"
    return text.encode(), rows


# ---- compression -------------------------------------------------------------------------------------------------------

def zstd(data):
    import zstandard

    return zstandard.ZstdCompressor(level=3, write_checksum=True).compress(data)


PACKERS = {"none": bytes, "gzip": lambda data: gzip.compress(data, 6), "xz": lzma.compress, "bzip2": bz2.compress, "zstd": zstd}
SUFFIXES = {"none": "", "gzip": ".gz", "xz": ".xz", "bzip2": ".bz2", "zstd": ".zst"}


# ---- kvmmu's plugin for QEMU -------------------------------------------------------------------------------------------

VALUE_KIND, CR3_KIND, CPL_KIND = 3, 4, 8
REGISTER_OPS = {CR3_KIND: 16, 5: 17, 6: 18, 7: 19}       # MOV_CR3, MOV_CR0, MOV_CR4, WRMSR_EFER
NO_GPA = 2**52 - 1


def qemu_header(flags=15, vcpus=4):
    return struct.pack("<8sIIII16s24x", b"kvmmuQT1", 64, flags, vcpus, 5, b"x86_64")


def qemu_block(vcpu, records):
    """Records are address, gpa or None, size or its logarithm, kind, I/O."""
    data = struct.pack("<4sHHII", b"KVMB", vcpu, 0, len(records), 0)
    for address, gpa, size, kind, device in records:
        data += struct.pack("<QQ", address, (NO_GPA if gpa is None else gpa) | size << 52 | kind << 56 | device << 60)
    return data


def qemu_file(blocks=40, seed=10, events=False):
    """A file, and its rows; with `events` those of values and of registers too."""
    rng = random.Random(seed)
    data, rows, ips = qemu_header(), [], {}
    for _ in range(blocks):
        vcpu, records = rng.randrange(4), []
        for _ in range(rng.randrange(1, 80)):
            kind = rng.choice((LOAD, STORE, FETCH, FETCH, rng.choice(tuple(REGISTER_OPS))))
            address = rng.choice((0x40_0000, KERNEL)) + rng.randrange(1 << 16)
            gpa = rng.choice((None, rng.randrange(1 << 40) & ~63))
            more = {"vcpu": vcpu, "gpa": gpa, "value": 0}
            if kind == FETCH:
                ips[vcpu] = address
                length = rng.randrange(1, 16)
                records.append((address, gpa, length, kind, 0))
                rows.append(row(FETCH, address, length, address, **more))
                continue
            if kind in REGISTER_OPS:
                records.append((address & ~0xFFF, 0, 0, kind, 0))
                if events:
                    rows.append({"op": REGISTER_OPS[kind], "addr": 0, "access": 0, "size": 1, "ip": 0, "value": address & ~0xFFF,
                                 "vcpu": vcpu})
                continue
            log, io = rng.randrange(7), int(gpa is not None and rng.random() < 0.1)
            records.append((address, gpa, log, kind, io))
            made = row(kind, address, 1 << log, ips.get(vcpu, 0), **more)
            rows.append(made | {"op": kind + 4 * io})
            if kind == STORE and log <= 3 and gpa is not None and not io:
                value = rng.getrandbits(8 << log)
                records.append((value, gpa, log, VALUE_KIND, 0))
                if events:
                    rows.append({"op": 24, "addr": gpa, "access": 0, "size": 1 << log, "ip": 0, "value": value, "vcpu": vcpu})
        data += qemu_block(vcpu, records)
    return data, rows


FILES = DATA / "formats"
INVALID_GPA = 2**64 - 1


def read(path, format=None, **options):
    """All rows of a file as arrays by column, those that a format leaves out filled with what that means."""
    trace = open_trace(path, format, **options)
    parts = list(trace.columns())
    assert all(len({len(column) for column in part.values()}) == 1 for part in parts)
    list(trace.chunks())                                    # the rows are in the trace format
    empty = {"op": np.uint8, "addr": np.uint64, "access": np.uint8, "size": np.uint8, "ip": np.uint64, "vcpu": np.uint16,
             "gpa": np.uint64}
    missing = {"size": 1, "ip": 0, "vcpu": 0, "gpa": INVALID_GPA}
    return {name: np.concatenate([part.get(name, np.full(len(part["op"]), missing.get(name, 0), dtype)) for part in parts]
                                 or [np.empty(0, dtype)]) for name, dtype in empty.items()}


def check(found, rows):
    """Arrays against rows of dicts."""
    assert len(rows) == len(found["op"])
    for name in ("op", "addr", "access", "size", "ip"):
        assert [row[name] for row in rows] == found[name].tolist(), name
    assert [row.get("vcpu", 0) for row in rows] == found["vcpu"].tolist()
    assert [INVALID_GPA if row.get("gpa") is None else row["gpa"] for row in rows] == found["gpa"].tolist()


def until_damage(trace):
    """The addresses of the rows before damage, and what the error says."""
    rows = []
    try:
        for columns in trace.columns():
            rows += columns["addr"].tolist()
    except TraceError as error:
        return rows, str(error)
    return rows, None


def write(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data)
    return path
