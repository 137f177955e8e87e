# SPDX-License-Identifier: Apache-2.0
"""The files `ext_*` of tests/data/vectors: their cases as arguments of the package, and their answers.

KVMMU_VECTORS names a folder with more files of the same kinds; those are read instead.
"""

import os
from functools import lru_cache
from pathlib import Path

import numpy as np
from paths import DATA

from kvmmu import Access, CpuModel, Ept, GeneralProtection, GuestMemory, Npt, Regs, Status

FOLDER = Path(os.environ.get("KVMMU_VECTORS", DATA / "vectors"))
KINDS = np.array([Access.READ, Access.WRITE, Access.FETCH, Access.SHADOW_STACK, Access.SHADOW_STACK | Access.WRITE], np.uint8)
REGISTERS = ("cr0", "cr3", "cr4", "efer", "pkru", "pkrs")
MBEC, SUB_PAGES, NO_EXECONLY, GMET, VE = 1, 2, 4, 16, 32
STACK_FAULT, GENERAL_PROTECTION, PAGE_FAULT, VIRT_EXCEPTION, GP_AT_LOAD, VM_EXIT = 12, 13, 14, 20, 253, 256
VECTOR = {Status.OK: 0, Status.PAGE_FAULT: PAGE_FAULT, Status.NON_CANONICAL: GENERAL_PROTECTION,
          Status.LASS_VIOLATION: GENERAL_PROTECTION, Status.VIRT_EXCEPTION: VIRT_EXCEPTION}
REASON = {Status.EPT_VIOLATION: 48, Status.EPT_MISCONFIG: 49, Status.SPP_EVENT: 66, Status.NESTED_PAGE_FAULT: 1024}
PK = 1 << 5


def names(*, two_stage, matrices=False):
    """Names of files that there are."""
    found = sorted(path.stem for path in FOLDER.glob("ext_*.npz"))
    return [name for name in found if matrices == ("_exh_" in name) and two_stage == ("_ept_" in name or "_npt_" in name)]


@lru_cache(maxsize=2)
def load(name):
    with np.load(FOLDER / f"{name}.npz") as archive:
        return dict(archive)


def memory(z):
    """The initial image: the pages that hold words, all else holes."""
    frames = np.unique(z["words_gpa"] >> np.uint64(12))
    pages = np.zeros((frames.size, 512), np.uint64)
    row = np.searchsorted(frames, z["words_gpa"] >> np.uint64(12))
    pages[row, (z["words_gpa"] >> np.uint64(3)) & np.uint64(511)] = z["words_val"]
    return GuestMemory.from_pages(frames << np.uint64(12), pages)


def words_now(z, mem):
    return np.array([mem.read_u64(gpa) for gpa in z["words_gpa"].tolist()], np.uint64)


def final_words(z):
    expected = z["words_val"].copy()
    expected[z["expect_final_idx"]] ^= z["expect_final_xor"]
    return expected


def cpu_of(z):
    return CpuModel(vendor="amd" if z["amd"] else "intel", maxphyaddr=int(z["maxpa"]),
                    gbpages=bool(z["gbpages"]) if "gbpages" in z else True, c_bit=int(z["cbit"]) if "cbit" in z else None)


def accesses(columns):
    """The Access of each case. IN columns: arrays by name; those that are missing are 0"""
    access = KINDS[columns["kind"]]
    for name in ("user", "ac", "implicit"):
        access = access | np.uint8(getattr(Access, name.upper())) * columns.get(name, np.zeros(1)).astype(np.uint8)
    return access.astype(np.uint8)


def can_be_said(z):
    """Mask of cases that an Access can say: data references of UAI go through DS or ES."""
    if not np.any(z["efer"] & np.uint64(1 << 20)):
        return np.ones(z["gva"].size, bool)
    return ~((z["stack"] == 1) & (z["expect_vec"] == STACK_FAULT))


def stage_of(z, i):
    control, root = int(z["ctl2"][i]), int(z["root2"][i])
    if z["mode2"][i] == 1:
        return Ept(root, mbec=bool(control & MBEC), execonly=not control & NO_EXECONLY,
                   spptp=int(z["spptp"][i]) if control & SUB_PAGES else None,
                   ve=int(z["ve_area"][i]) if control & VE else None)
    return Npt(root, cr4=int(z["hcr4"][i]), efer=int(z["hefer"][i]), gmet=bool(control & GMET))


def register_sets(z):
    """(register sets, one or a pair with its second stage; which one each case uses)."""
    columns = [z[name].astype(np.uint64) for name in REGISTERS]
    if "root2" in z:
        columns += [z[name].astype(np.uint64) for name in ("root2", "ctl2", "spptp", "ve_area", "mode2", "hcr4", "hefer")]
    _, first, ctx = np.unique(np.stack(columns, axis=1), axis=0, return_index=True, return_inverse=True)
    sets = [Regs(**{name: int(z[name][i]) for name in REGISTERS}) for i in first.tolist()]
    if "root2" in z:
        sets = [(regs, stage_of(z, i)) for regs, i in zip(sets, first.tolist(), strict=True)]
    return sets, ctx.ravel().astype(np.uint32)


def admitted(walk, sets):
    """(sets whose illegal ones are replaced by paging off, mask of the legal ones)."""
    legal = np.ones(len(sets), bool)
    kept = list(sets)
    for i, regs in enumerate(sets):
        try:
            walk.prepare([regs])
        except GeneralProtection as fault:
            assert fault.rule == "pdpte-reserved"
            legal[i], kept[i] = False, Regs(cr0=0x11, cr3=0, cr4=0, efer=0)
    return kept, legal


def check(z, rows, got):
    """Hold columns (vector, error code, gpa) of cases to the answers. Doubt 1: the PK bit is disputed."""
    vector = np.where(z["expect_vec"] == STACK_FAULT, GENERAL_PROTECTION, z["expect_vec"])[rows]
    differ("vector", rows, vector, got["vec"])
    fault = vector == PAGE_FAULT
    error = np.where(fault, z["expect_err"][rows], 0)
    sure = np.where(z["doubt"][rows] == 1, ~PK & 0xFFFF, 0xFFFF)
    differ("error code", rows, error.astype(np.int64) & sure, got["err"].astype(np.int64) & sure)
    differ("gpa", rows, np.where(vector == 0, z["gpa"][rows], np.uint64(2**64 - 1)), got["gpa"])
    for column in ("reason", "qual", "xgpa"):
        if column in got:
            count = vector == VM_EXIT
            differ(column, rows, np.where(count, z[f"expect_{column}"][rows], 0), np.where(count, got[column], 0))


def differ(what, rows, expected, actual):
    bad = np.flatnonzero(expected != actual)
    assert bad.size == 0, (f"{what}: {bad.size} cases differ, first {np.asarray(rows)[bad[0]]}: "
                           f"want {int(expected[bad[0]]):#x}, got {int(actual[bad[0]]):#x}")


def columns_of(t):
    """Answers of a Translation in the form of the files."""
    got = {"vec": np.array([VECTOR.get(Status(status), VM_EXIT) for status in t.status.tolist()], np.int64),
           "err": t.error_code.astype(np.int64), "gpa": t.gpa}
    if t.fault_gpa is not None:
        got["reason"] = np.array([REASON.get(Status(status), 0) for status in t.status.tolist()], np.int64)
        got["qual"], got["xgpa"] = t.exit_qualification, t.fault_gpa
    return got
