# SPDX-License-Identifier: Apache-2.0
"""What several test files share: from tables and registers to a vCPU, and from an access to the oracle's keywords."""

import numpy as np
import oracle

import kvmmu
from kvmmu import Access, CpuModel, GuestMemory, Regs, Status, Vcpu

ALL_FIELDS = ("gpa", "status", "error_code", "level", "pte", "pte_gpa", "pte_access", "refs")
WP, PG, PE = 1 << 16, 1 << 31, 1
SMEP, SMAP, PKE = 1 << 20, 1 << 21, 1 << 22
NXE = 1 << 11
A, D = 1 << 5, 1 << 6

# Every access that exists: one kind, a ring, AC, and implicit accesses, which are data accesses.
ACCESSES = tuple(
    kind | user | ac | implicit
    for kind in (Access.READ, Access.WRITE, Access.FETCH)
    for user in (Access.READ, Access.USER)
    for ac in (Access.READ, Access.AC)
    for implicit in (Access.READ, Access.IMPLICIT)
    if not (kind == Access.FETCH and implicit))


def oracle_access(access):
    """Keywords of oracle.translate() for an Access."""
    return {name: bool(access & getattr(Access, name.upper())) for name in (
        "write", "fetch", "user", "ac", "implicit", "shadow_stack")}


def oracle_cpu(cpu):
    """The oracle's Cpu for a CpuModel."""
    return oracle.Cpu(vendor=cpu.vendor, maxphyaddr=cpu.maxphyaddr, gbpages=cpu.gbpages, pse36=cpu.pse36,
                      conformance=cpu.conformance, c_bit=cpu.c_bit)


def vcpu_over(tables, *, pages=(), off=None, on=None, **cpu):
    """A vCPU over builders' tables, with their registers in force.

    `pages` are further page addresses that exist; `on` and `off` are masks set or cleared in single registers, e.g.
    on={"cr4": SMEP}.  Everything else goes to the CpuModel.
    """
    gpas, data = tables.pages()
    words = dict(zip(gpas.tolist(), data, strict=True))
    for gpa in pages:
        words.setdefault(gpa, np.zeros(512, np.uint64))
    gpas = sorted(words)
    vcpu = Vcpu(GuestMemory.from_pages(np.array(gpas, np.uint64), np.array([words[gpa] for gpa in gpas], np.uint64)),
                cpu=CpuModel(**cpu))
    vcpu.set_regs(**changed(tables.regs(), on, off))
    return vcpu


def changed(regs, on=None, off=None):
    """Registers with the masks of `off` cleared, then those of `on` set."""
    regs = dict(regs)
    for name, mask in (off or {}).items():
        regs[name] = regs.get(name, 0) & ~mask
    for name, mask in (on or {}).items():
        regs[name] = regs.get(name, 0) | mask
    return regs


def scalar(walk, gva, access):
    """(status, gpa or None, error_code, level, rule) of one scalar call."""
    try:
        return Status.OK, walk.gva_to_gpa(gva, access), 0, None, None
    except kvmmu.PageFault as fault:
        return Status.PAGE_FAULT, None, fault.error_code, fault.level, fault.rule
    except kvmmu.GeneralProtection as fault:
        status = Status.LASS_VIOLATION if fault.rule == "lass" else Status.NON_CANONICAL
        return status, None, fault.error_code, fault.level, fault.rule


def fault_of(walk, gva, access=0):
    """The exception of one scalar call that must fault."""
    try:
        gpa = walk.gva_to_gpa(gva, access)
    except kvmmu.GuestFault as fault:
        return fault
    raise AssertionError(f"{gva:#x} led to {gpa:#x}; a fault was expected")


def one(walk, gva, access=0, **kwargs):
    """A batch of one row, as a dict of plain integers."""
    t = walk.translate(np.array([gva], np.uint64), access, fields=ALL_FIELDS, **kwargs)
    return {name: int(getattr(t, name)[0]) for name in ALL_FIELDS}


def snapshot(mem):
    """Every slot's bytes."""
    return {gpa: mem.read(gpa, size) for gpa, size, _ in mem.slots}


def columns(t):
    """The columns of a Translation that are there, as a dict."""
    return {name: getattr(t, name) for name in ALL_FIELDS if getattr(t, name) is not None}


def assert_same_columns(expected, actual, why):
    """Two Translations, column by column."""
    for name, column in columns(expected).items():
        other = getattr(actual, name)
        wrong = np.flatnonzero(column != other)
        assert wrong.size == 0, (f"{why}: {name} differs in {wrong.size} rows, first row {wrong[0]}: "
                                 f"expected {int(column[wrong[0]]):#x}, got {int(other[wrong[0]]):#x}")


def as_regs(registers, **more):
    """Regs of a dict of registers."""
    return Regs(**{**registers, **more})
