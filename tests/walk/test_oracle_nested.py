# SPDX-License-Identifier: Apache-2.0
"""The two-stage judge against recorded answers: without this, oracle_nested.py could not be trusted.

Conformance "sdm" must give what Bochs with its bugs fixed gave, "kvm" what the model of KVM's walkers gave, in every
two-stage file of data/vectors, and the public tests of EPT and nested paging their expectations.  Bochs has no guest
mode execute trap; those cases rest on the public tests alone.
"""


import numpy as np
import oracle
import oracle_nested
import pytest
from paths import DATA

VECTORS = DATA / "vectors"
FILES = ("ept_rand_pa39", "ept_kut_nombec_noxo", "npt_rand_5l", "npt_rand_pae", "npt_exh_perm", "npt_kut")
RECORDED_BY = {"sdm": "bochs", "kvm": "kmodel"}
INVALID = 2**64 - 1
VM_EXIT, GP_AT_LOAD = 256, 253
VECTOR = {"ok": 0, "page_fault": 14, "non_canonical": 13}
REASON = {"ept_violation": 48, "ept_misconfig": 49, "nested_page_fault": 1024}
MBEC, NO_EXECONLY, NO_ADVANCED_INFO, GMET = 1 << 0, 1 << 2, 1 << 3, 1 << 4
ADVANCED_INFO = 7 << 9


class Recorded:
    """A file's cases, and host-physical memory to run them on."""

    def __init__(self, name, conformance):
        with np.load(VECTORS / f"{name}.npz") as data:
            self.data = dict(data)
        self.columns = {key: column.tolist() for key, column in self.data.items() if column.ndim == 1}
        self.size = len(self.columns["gva"])
        words = dict(zip(self.columns["words_gpa"], self.columns["words_val"], strict=True))
        self.memory = oracle.Memory(words, size=int(self.data["memsize"]))
        self.cpu = oracle.Cpu(maxphyaddr=int(self.data["maxpa"]), gbpages=bool(self.data["gbpages"]),
                              conformance=conformance)

    def row(self, *names):
        """Rows of these columns; a column the file does not have is zero."""
        zeros = [0] * self.size
        return zip(*(self.columns.get(name, zeros) for name in names), strict=True)

    def stages(self):
        for mode, root, controls, cr4, efer in self.row("mode2", "root2", "ctl2", "hcr4", "hefer"):
            if mode == 1:
                yield oracle_nested.Ept(root, mbec=bool(controls & MBEC), execonly=not controls & NO_EXECONLY,
                                        advanced_info=not controls & NO_ADVANCED_INFO)
            else:
                yield oracle_nested.Npt(root, cr4, efer, bool(controls & GMET))

    def results(self):
        """Result of every case, or None where loading the PDPTEs is a #GP; under EPT they are loaded "at the access"."""
        names = ("cr0", "cr3", "cr4", "efer", "pkru", "gva", "kind", "user", "ac", "implicit")
        for stage, (*registers, gva, kind, user, ac, implicit) in zip(self.stages(), self.row(*names), strict=True):
            regs = oracle.Regs(*registers)
            ept = isinstance(stage, oracle_nested.Ept)
            if ept and regs.cr0 & oracle.CR0_PG and regs.cr4 & oracle.CR4_PAE and not regs.efer & oracle.EFER_LMA:
                loaded = oracle_nested.load_pdptrs_nested(self.memory, self.cpu, regs, stage)
                if not isinstance(loaded, tuple):
                    yield loaded
                    continue
                regs = oracle.Regs(*registers, loaded)
            yield oracle_nested.translate_nested(
                self.memory, self.cpu, regs, stage, gva, write=kind == 1, fetch=kind == 2, user=bool(user), ac=bool(ac),
                implicit=bool(implicit))


def as_recorded(result):
    """(vector, error code, gpa, reason, qualification, fault address) in the files' terms."""
    if result is None:
        return GP_AT_LOAD, 0, INVALID, 0, 0, 0
    gpa = INVALID if result.gpa is None else result.gpa
    return (VECTOR.get(result.status, VM_EXIT), result.error_code, gpa, REASON.get(result.status, 0),
            result.exit_qualification, result.fault_gpa or 0)


@pytest.mark.parametrize("conformance", RECORDED_BY)
@pytest.mark.parametrize("name", FILES)
def test_every_recorded_answer(name, conformance):
    """Outcome, error code, exit, qualification, addresses, and the final A and D of both stages."""
    recorded = Recorded(name, conformance)
    which = RECORDED_BY[conformance]
    expected = recorded.row(*(f"{which}_{field}" for field in ("vec", "err", "gpa", "reason", "qual", "xgpa")))
    trap = [bool(controls & GMET) and conformance == "sdm" for controls in recorded.columns["ctl2"]]

    for row, (result, answer) in enumerate(zip(recorded.results(), expected, strict=True)):
        assert trap[row] or answer == as_recorded(result), f"{name} case {row}"

    final = recorded.data["words_val"].copy()
    final[recorded.data[f"{which}_final_idx"]] ^= recorded.data[f"{which}_final_xor"]
    assert dict(zip(recorded.columns["words_gpa"], final.tolist(), strict=True)) == recorded.memory.words


def test_public_tests_of_ept():
    """Exits that ept_access_test of the public tests expects; it does not look at the advanced information."""
    recorded = Recorded("ept_kut_nombec_noxo", "sdm")
    expected = recorded.row("kut_reason", "kut_qual", "kut_gpa")
    for row, (result, (reason, qualification, gpa)) in enumerate(zip(recorded.results(), expected, strict=True)):
        assert REASON.get(result.status, 0) == reason, f"case {row}"
        assert result.exit_qualification & ~ADVANCED_INFO == qualification, f"case {row}"
        assert not reason or result.fault_gpa == gpa, f"case {row}"


def test_public_tests_of_nested_paging():
    """EXITINFO1 that svm_npt of the public tests expects, the guest mode execute trap included."""
    recorded = Recorded("npt_kut", "sdm")
    for row, (result, info) in enumerate(zip(recorded.results(), recorded.columns["kut_info1"], strict=True)):
        assert result.exit_qualification == info, f"case {row}: {recorded.data['test_name']}"


def test_set_ad_off_leaves_memory_alone():
    """The A/D updates of both stages are listed in order, and taken back."""
    recorded = Recorded("npt_rand_5l", "sdm")
    before = dict(recorded.memory.words)
    names = ("cr0", "cr3", "cr4", "efer", "pkru", "gva")
    listed = 0
    for stage, (*registers, gva) in zip(recorded.stages(), recorded.row(*names), strict=True):
        regs = oracle.Regs(*registers, pdptrs=(0, 0, 0, 0))
        result = oracle_nested.translate_nested(recorded.memory, recorded.cpu, regs, stage, gva, set_ad=False)
        listed += len(result.writes)
    assert listed
    assert before == recorded.memory.words
