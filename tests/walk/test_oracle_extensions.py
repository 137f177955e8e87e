# SPDX-License-Identifier: Apache-2.0
"""The judges of tests/support against recorded answers about extensions: without this, they could not be trusted."""

import extension_vectors as ev
import numpy as np
import oracle
import oracle_nested
import pytest

INVALID = 2**64 - 1
VECTOR = {"ok": 0, "page_fault": ev.PAGE_FAULT, "non_canonical": ev.GENERAL_PROTECTION, "lass_violation": ev.GENERAL_PROTECTION,
          "virt_exception": ev.VIRT_EXCEPTION}
REASON = {"ept_violation": 48, "ept_misconfig": 49, "spp_event": 66, "nested_page_fault": 1024}
RARE = 3                                # of two-stage files every third case: the judge is Python


def judged(z, rows):
    """Outcome of these cases by the judges, and their memory."""
    memory = oracle.Memory(dict(zip(z["words_gpa"].tolist(), z["words_val"].tolist(), strict=True)), size=1 << 52)
    cpu = oracle.Cpu(vendor="amd" if z["amd"] else "intel", maxphyaddr=int(z["maxpa"]), gbpages=bool(z["gbpages"]),
                     c_bit=int(z["cbit"]) if "cbit" in z else None)
    got = {name: np.zeros(rows.size, np.uint64) for name in ("vec", "err", "reason", "qual", "xgpa")}
    got["gpa"] = np.full(rows.size, INVALID, np.uint64)
    for at, i in enumerate(rows.tolist()):
        registers = {name: int(z[name][i]) for name in ev.REGISTERS}
        kind = int(z["kind"][i])
        access = {"write": kind in (1, 4), "fetch": kind == 2, "shadow_stack": kind > 2, "user": bool(z["user"][i]),
                  "ac": bool(z["ac"][i]), "implicit": bool(z["implicit"][i])}
        regs = oracle.Regs(**registers)
        pae = regs.cr4 & oracle.CR4_PAE and not regs.efer & oracle.EFER_LMA
        if pae:
            regs = oracle.Regs(**registers, pdptrs=oracle.load_pdptrs(memory, cpu, regs))
            if regs.pdptrs is None:
                got["vec"][at] = ev.GP_AT_LOAD
                continue
        gva = int(z["gva"][i])
        if "root2" in z:
            control = int(z["ctl2"][i])
            stage = oracle_nested.Ept(
                int(z["root2"][i]), mbec=bool(control & ev.MBEC), execonly=not control & ev.NO_EXECONLY,
                spptp=int(z["spptp"][i]) if control & ev.SUB_PAGES else None,
                ve=int(z["ve_area"][i]) if control & ev.VE else None)
            if z["mode2"][i] != 1:
                stage = oracle_nested.Npt(stage.eptp, int(z["hcr4"][i]), int(z["hefer"][i]), bool(control & ev.GMET))
            result = oracle_nested.translate_nested(memory, cpu, regs, stage, gva, **access)
            if result.status in REASON:
                got["reason"][at], got["qual"][at] = REASON[result.status], result.exit_qualification
                got["xgpa"][at] = result.fault_gpa
        else:
            result = oracle.translate(memory, cpu, regs, gva, **access)
        got["vec"][at], got["err"][at] = VECTOR.get(result.status, ev.VM_EXIT), result.error_code
        if result.gpa is not None:
            got["gpa"][at] = result.gpa
    return got, memory


@pytest.mark.parametrize("name", ev.names(two_stage=False))
def test_one_stage(name):
    """Answers, and the accessed and dirty bits that are left."""
    z = ev.load(name)
    rows = np.flatnonzero(ev.can_be_said(z))
    got, memory = judged(z, rows)
    known = {key: got[key] for key in ("vec", "err", "gpa")}
    ev.check(z, rows, known)
    words = np.array([memory.read(gpa, 8) for gpa in z["words_gpa"].tolist()], np.uint64)
    assert np.array_equal(words, ev.final_words(z))


@pytest.mark.parametrize("name", ev.names(two_stage=True))
def test_two_stages(name):
    z = ev.load(name)
    rows = np.arange(0, z["gva"].size, RARE)
    got, _ = judged(z, rows)
    ev.check(z, rows, got)
