# SPDX-License-Identifier: Apache-2.0
"""Recorded answers of other implementations: every one-stage file of data/vectors, each case in four ways.

The answers are those of data/vectors/README.md: `expect_*` for conformance "sdm" (Bochs with its bugs fixed; the
kernel for the *_amd files), `kmodel_*` for "kvm".  After every way of running the cases the whole memory must equal
the recorded final words and nothing else may have changed.
"""

from functools import lru_cache

import numpy as np
import pytest
from machines import scalar, snapshot
from paths import DATA

import kvmmu
from kvmmu import INVALID_GPA, Access, CpuModel, GuestMemory, Regs, Status, Vcpu

VECTORS = DATA / "vectors"
FILES = ("live_4l_pa40_amd", "live_4l_pa48_amd", "live_4l_pa40_no1g", "wide_4l_pa46", "wide_5l_pa51", "wide_pae_pa45",
         "wide_2l_pa48", "wide_2l_pa36", "tcg_nopg_pa40")
PAGING_OFF = Regs(cr0=0x11, cr3=0, cr4=0, efer=0)
GP_AT_LOAD = 253
each_answer = pytest.mark.parametrize(
    ("name", "conformance"), [(name, conformance) for name in FILES for conformance in ("sdm", "kvm")])


class Vectors:
    """One file: its cases, and one memory to run them on, renewed by every vcpu()."""

    def __init__(self, name):
        self.name = name
        self.data = dict(np.load(VECTORS / f"{name}.npz"))
        data = self.data
        self.gva = data["gva"]
        self.access = (data["kind"] == 1) * Access.WRITE + (data["kind"] == 2) * Access.FETCH
        for flag in ("user", "ac", "implicit"):
            self.access = self.access + data[flag].astype(int) * getattr(Access, flag.upper())
        self.access = self.access.astype(np.uint8)
        registers = np.stack([data[key].astype(np.uint64) for key in ("cr0", "cr3", "cr4", "efer", "pkru")], axis=1)
        self.words = np.zeros(int(self.data["memsize"]) // 8, np.uint64)
        self.at = data["words_gpa"] >> np.uint64(3)
        self.pages = np.unique(self.at >> np.uint64(9))
        self.mem = GuestMemory(self.words)
        rows, self.ctx = np.unique(registers, axis=0, return_inverse=True)
        self.ctx = self.ctx.astype(np.uint32).ravel()
        self.regs = [dict(zip(("cr0", "cr3", "cr4", "efer", "pkru"), row, strict=True)) for row in rows.tolist()]

    def vcpu(self, conformance):
        """A fresh vCPU over the initial memory."""
        data = self.data
        self.words[self.at] = data["words_val"]
        cpu = CpuModel(vendor="amd" if data["amd"] else "intel", maxphyaddr=int(data["maxpa"]),
                       gbpages=bool(data["gbpages"]), conformance=conformance)
        return Vcpu(self.mem, cpu=cpu)

    def answers(self, conformance):
        """(vector, error code) of every case."""
        which = "expect" if conformance == "sdm" else "kmodel"
        return self.data[f"{which}_vec"], self.data[f"{which}_err"]

    def check_final_words(self, conformance):
        """The recorded final words, and zero everywhere else in the pages of tables."""
        data = self.data
        which = "bochs" if conformance == "sdm" and "bochs_vec" in data else "kmodel"
        expected = data["words_val"].copy()
        expected[data[f"{which}_final_idx"]] ^= data[f"{which}_final_xor"]
        wrong = np.flatnonzero(expected != self.words[self.at])
        assert wrong.size == 0, (f"{self.name}: {wrong.size} final words differ, first at "
                                 f"{int(data['words_gpa'][wrong[0]]):#x}")
        self.words[self.at] = 0
        assert not self.words.reshape(-1, 512)[self.pages].any(), f"{self.name}: bytes beside the words were written"

    def check(self, conformance, rows, status, error_code, gpa):
        """The answers of `rows`."""
        vector, error = (column[rows] for column in self.answers(conformance))
        actual = np.choose(status, [0, 14, 13])
        where = self.place(rows, vector != actual)
        assert not where, f"vector: {where}"
        page_fault = vector == 14
        where = self.place(rows, error_code != np.where(page_fault, error, 0))
        assert not where, f"error code: {where}"
        expected = np.where(vector == 0, self.data["gpa"][rows], np.uint64(INVALID_GPA))
        where = self.place(rows, gpa != expected)
        assert not where, f"gpa: {where}"

    def place(self, rows, wrong):
        bad = np.asarray(rows)[wrong]
        return f"{self.name}: {bad.size} cases differ, first {bad[0]}" if bad.size else ""


@lru_cache
def vectors(name):
    return Vectors(name)


@lru_cache
def admitted(v, conformance):
    """(register sets, bool per case that they are legal); illegal sets are replaced by paging off.

    They must be exactly those that the answers call a #GP at the load of CR3.
    """
    vcpu = v.vcpu(conformance)
    regs = []
    legal = np.ones(len(v.regs), bool)
    for row, registers in enumerate(v.regs):
        try:
            vcpu.gva_walk.prepare([Regs(**registers)])
        except kvmmu.GeneralProtection as fault:
            assert "pdpte-reserved" == fault.rule
            legal[row] = False
        regs.append(Regs(**registers) if legal[row] else PAGING_OFF)
    return regs, legal[v.ctx]


@each_answer
def test_all_cases_in_one_batch(name, conformance):
    """Every recorded answer and final A/D word, with the registers of each row given by regs and ctx."""
    v = vectors(name)
    regs, legal = admitted(v, conformance)
    vcpu = v.vcpu(conformance)
    rows = np.flatnonzero(legal)

    t = vcpu.gva_walk.translate(v.gva[rows], v.access[rows], regs=regs, ctx=v.ctx[rows])

    assert np.array_equal(v.answers(conformance)[0] != GP_AT_LOAD, legal)
    v.check(conformance, rows, t.status, t.error_code, t.gpa)
    v.check_final_words(conformance)


@each_answer
def test_cases_of_equal_registers_as_one_batch(name, conformance):
    """The same with registers loaded by set_regs(), which raises #GP where PDPTEs are malformed."""
    v = vectors(name)
    vcpu = v.vcpu(conformance)
    order = np.argsort(v.ctx, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(v.ctx[order])) + 1)

    for rows in groups:
        before = vcpu.regs
        if v.answers(conformance)[0][rows[0]] == GP_AT_LOAD:
            with pytest.raises(kvmmu.GeneralProtection, match="PDPTE"):
                vcpu.set_regs(**v.regs[v.ctx[rows[0]]])
            assert before == vcpu.regs
            continue
        vcpu.set_regs(**v.regs[v.ctx[rows[0]]])
        t = vcpu.gva_walk.translate(v.gva[rows], v.access[rows])
        v.check(conformance, rows, t.status, t.error_code, t.gpa)

    v.check_final_words(conformance)


@each_answer
def test_shuffled_batches_of_1000(name, conformance):
    """The same in random order, 1,000 rows at a time: the cases are independent."""
    v = vectors(name)
    regs, legal = admitted(v, conformance)
    vcpu = v.vcpu(conformance)
    contexts = vcpu.gva_walk.prepare(regs)
    rows = np.random.default_rng(1000).permutation(np.flatnonzero(legal))

    for start in range(0, rows.size, 1000):
        part = rows[start:start + 1000]
        t = vcpu.gva_walk.translate(v.gva[part], v.access[part], regs=contexts, ctx=v.ctx[part])
        v.check(conformance, part, t.status, t.error_code, t.gpa)

    v.check_final_words(conformance)


@each_answer
def test_each_case_alone(name, conformance):
    """The same by scalar calls: a gpa, or an exception with the error code; CR2 is the truncated address."""
    v = vectors(name)
    vcpu = v.vcpu(conformance)
    vector, error = (column.tolist() for column in v.answers(conformance))
    gvas, gpas, accesses = v.gva.tolist(), v.data["gpa"].tolist(), v.access.tolist()
    loaded = None

    for row in np.argsort(v.ctx, kind="stable").tolist():
        if vector[row] == GP_AT_LOAD:
            with pytest.raises(kvmmu.GeneralProtection, match="PDPTE"):
                vcpu.set_regs(**v.regs[v.ctx[row]])
            continue
        if v.ctx[row] != loaded:
            loaded = v.ctx[row]
            vcpu.set_regs(**v.regs[loaded])
        try:
            actual = 0, vcpu.gva_walk.gva_to_gpa(gvas[row], accesses[row])
        except kvmmu.PageFault as fault:
            actual = 14, fault.error_code
            address = gvas[row] if vcpu.regs.is_long_mode else gvas[row] & 0xFFFFFFFF
            assert address == fault.address, f"{name} case {row}"
        except kvmmu.GeneralProtection:
            actual = 13, 0
        expected = vector[row], {0: gpas[row], 13: 0, 14: error[row]}[vector[row]]
        assert expected == actual, f"{name} case {row}"

    v.check_final_words(conformance)


OTHER_ORACLES = [*((name, "live") for name in FILES[:3]), *((name, "bochs") for name in FILES[2:]),
                 (FILES[-1], "qemu"), (FILES[-1], "unicorn")]


@pytest.mark.parametrize(("name", "which"), OTHER_ORACLES)
def test_raw_answers_of_other_oracles(name, which):
    """Where a file does not call a difference known, the raw answer of every oracle is ours too."""
    v = vectors(name)
    regs, legal = admitted(v, "sdm")
    vcpu = v.vcpu("sdm")
    rows = np.flatnonzero(legal & ~v.data[f"{which}_differs"])

    t = vcpu.gva_walk.translate(v.gva[rows], v.access[rows], regs=regs, ctx=v.ctx[rows], set_ad=False)

    wrong = v.place(rows, v.data[f"{which}_vec"][rows] != np.choose(t.status, [0, 14, 13]))
    assert not wrong, f"{which} vector: {wrong}"
    if f"{which}_err" in v.data:
        faults = t.status == Status.PAGE_FAULT
        error = v.data[f"{which}_err"][rows]
        error = error | (error >> 3 & 1)                                # QEMU 7.2 forgets P on RSVD faults (row D5)
        wrong = v.place(rows, faults & (error != t.error_code))
        assert not wrong, f"{which} error code: {wrong}"


# ---- exh_4l_perm: every combination of rights of four entries -------------------------------------------------------

TABLES = 0x1000                                                         # PML4, PDPT, PD and PT at 0x1000 .. 0x4000
LEAF = 0x7000


def rights_tables():
    """Entry k of each of four tables has the rights of code k: W | U << 1 | NX << 2; A and D are set."""
    pages = np.zeros((4, 512), np.uint64)
    for table in range(4):
        target = LEAF if table == 3 else TABLES + 0x1000 * (table + 1)
        for code in range(8):
            pages[table, code] = 1 | (code & 3) << 1 | 0x60 | target | (code >> 2) << 63
    return np.arange(4, dtype=np.uint64) * np.uint64(0x1000) + np.uint64(TABLES), pages


def rights_gvas():
    combination = np.arange(4096, dtype=np.uint64)
    gva = np.zeros(4096, np.uint64)
    for digit, shift in enumerate((12, 21, 30, 39)):
        gva |= (combination >> np.uint64(3 * digit) & np.uint64(7)) << np.uint64(shift)
    return gva


def rights_config(row):
    """(registers, access) of one configuration."""
    wp, nxe, smep, smap, ac, kind, user = row
    registers = {"cr0": 1 << 31 | 1 | wp << 16, "cr3": TABLES, "cr4": 1 << 5 | smep << 20 | smap << 21,
                 "efer": 0x500 | nxe << 11}
    return registers, (Access.READ, Access.WRITE, Access.FETCH)[kind] | ac * Access.AC | user * Access.USER


@pytest.fixture(scope="module")
def rights():
    with np.load(VECTORS / "exh_4l_perm.npz") as data:
        return dict(data)


@pytest.mark.parametrize("conformance", ["sdm", "kvm"])
@pytest.mark.parametrize("way", ["one batch", "set_regs"])
def test_all_rights_of_all_levels(rights, conformance, way):
    """589,824 combinations of R/W, U/S and XD in four entries under every control, ring and kind of access."""
    gpas, pages = rights_tables()
    vcpu = Vcpu(GuestMemory.from_pages(gpas, pages), cpu=CpuModel(conformance=conformance))
    before = snapshot(vcpu.mem)
    gva = rights_gvas()
    configs = [rights_config(row) for row in rights["cfg"].tolist()]

    if way == "one batch":
        t = vcpu.gva_walk.translate(
            np.tile(gva, len(configs)), np.repeat(np.array([access for _, access in configs], np.uint8), 4096),
            regs=[Regs(**registers) for registers, _ in configs],
            ctx=np.repeat(np.arange(len(configs), dtype=np.uint32), 4096))
        status, error, gpa = (getattr(t, name).reshape(-1, 4096) for name in ("status", "error_code", "gpa"))
    else:
        parts = []
        for registers, access in configs:
            vcpu.set_regs(**registers)
            parts.append(vcpu.gva_walk.translate(gva, access))
        status, error, gpa = (np.array([getattr(t, name) for t in parts]) for name in ("status", "error_code", "gpa"))

    assert (144, 4096) == rights["out"].shape == status.shape
    ok = rights["out"] == 0xFF
    assert np.array_equal(ok, status == Status.OK)
    assert np.array_equal(np.where(ok, 0, rights["out"]), error)
    assert np.array_equal(np.where(ok, np.uint64(LEAF), np.uint64(INVALID_GPA)), gpa)
    assert before == snapshot(vcpu.mem), "A and D were set already: nothing is to be written"


def test_all_rights_by_scalar_calls(rights):
    """Every 7th of the 589,824 cases as an exception with its error code."""
    gpas, pages = rights_tables()
    vcpu = Vcpu(GuestMemory.from_pages(gpas, pages))
    gva = rights_gvas().tolist()
    for row, expected in zip(rights["cfg"].tolist(), rights["out"].tolist(), strict=True):
        registers, access = rights_config(row)
        vcpu.set_regs(**registers)
        for i in range(0, 4096, 7):
            status, _, error_code, _, _ = scalar(vcpu.gva_walk, gva[i], access)
            assert (expected[i] if expected[i] != 0xFF else 0) == error_code, f"configuration {row}, combination {i}"
            assert (expected[i] == 0xFF) == (status == Status.OK)


def test_all_rights_differ_from_a_live_guest_in_64_cells(rights):
    """The recording of a live guest differs where SMAP without SMEP faults its fetches (row D21), nowhere else."""
    assert 64 == int((rights["out"] != rights["live"]).sum())
