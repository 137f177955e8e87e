# SPDX-License-Identifier: Apache-2.0
"""The access matrix: one bit per condition, sampled, in all four paging modes.

Each case is run in a batch with the registers of its own; the judge is access_matrix.expected_array(), which is itself
compared with the oracle.  KVMMU_MATRIX_CASES sets the number of cases, in chunks of CHUNK.
"""

import os

import access_layout
import access_matrix as matrix
import numpy as np
import oracle
import pytest

from kvmmu import INVALID_GPA, Access, CpuModel, GuestMemory, Regs, Status, Vcpu

CASES = int(os.environ.get("KVMMU_MATRIX_CASES", "200000"))
CHUNK = 100_000
BASE = 0x1000000


def access_of(cases):
    access = np.zeros(len(cases), np.uint8)
    for name in ("write", "fetch", "user", "ac", "implicit", "shadow_stack"):
        access |= getattr(cases, name).astype(np.uint8) * np.uint8(getattr(Access, name.upper()))
    return access


def contexts_of(cases, placed):
    """(register sets, ctx): equal rows of registers share a context."""
    columns = [cases.cr0, placed.cr3, cases.cr4, cases.efer, cases.pkru, cases.pkrs, *placed.pdptrs.T]
    rows = np.ascontiguousarray(np.stack(columns, axis=1).astype(np.uint64))
    keys = rows.view([("", np.uint64)] * rows.shape[1]).ravel()
    _, first, ctx = np.unique(keys, return_index=True, return_inverse=True)
    regs = []
    for row, levels in zip(rows[first].tolist(), cases.levels[first].tolist(), strict=True):
        regs.append(Regs(*row[:5], pkrs=row[5], pdptrs=tuple(row[6:]) if levels == 3 else None))
    return regs, ctx.astype(np.uint32).ravel()


def first_difference(cases, wrong):
    row = int(np.flatnonzero(wrong)[0])
    flags = [name for name, value in matrix.flags_of(int(cases.bits[row])).items() if value]
    return f"{int(wrong.sum())} of {len(cases)} cases, the first with {int(cases.levels[row])} levels: {' '.join(flags)}"


def run_chunk(rng, count, cpu, model, why):
    """Generate, lay out, translate and compare `count` cases."""
    cases = matrix.generate(rng, count, cpu)
    placed = access_layout.layout(cases, BASE)
    expected = matrix.expected_array(cases, cpu)
    slot = placed.pages.copy()
    mem = GuestMemory(0x1000)
    mem.add_slot(BASE, slot)
    walk = Vcpu(mem, cpu=model).gva_walk
    regs, ctx = contexts_of(cases, placed)

    t = walk.translate(placed.gva, access_of(cases), regs=regs, ctx=ctx, fields=("gpa", "status", "error_code", "level"))

    assert set(np.unique(t.status).tolist()) <= {Status.OK, Status.PAGE_FAULT}
    for name, wrong in (
        ("fault", expected.fault != (t.status == Status.PAGE_FAULT)),
        ("error code", expected.error_code != t.error_code),
        ("level", expected.level != t.level),
        ("gpa", np.where(expected.fault, np.uint64(INVALID_GPA), placed.gpa) != t.gpa),
    ):
        assert not wrong.any(), f"{why}: {name} differs in {first_difference(cases, wrong)}"
    image = access_layout.image_after(placed, expected)
    wrong = np.argwhere(image != slot)
    assert wrong.size == 0, (f"{why}: {len(wrong)} words of memory differ, first at "
                             f"{int(placed.page_gpas[wrong[0][0]]) + 8 * int(wrong[0][1]):#x}")
    assert not any(mem.read(0, 0x1000))
    return cases, expected


def test_sampled_combinations():
    """Fault, error code, level, gpa, the A/D bits written, and every other byte of memory untouched."""
    done = 0
    while done < CASES:
        count = min(CHUNK, CASES - done)
        run_chunk(np.random.default_rng([done, 1]), count, matrix.CPU, CpuModel(maxphyaddr=40), f"seed [{done}, 1]")
        done += count
    assert done == CASES


MODELS = [
    {"conformance": "kvm", "maxphyaddr": 40}, {"vendor": "amd", "maxphyaddr": 36}, {"gbpages": False, "maxphyaddr": 46},
    {"pse36": False, "maxphyaddr": 32}, {"maxphyaddr": 51}, {"maxphyaddr": 52},
]


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_sampled_combinations_of_other_processors(model):
    """The same for other vendors, conformances and widths, a tenth of the cases."""
    run_chunk(np.random.default_rng(2), min(max(CASES // 10, 1000), CHUNK), oracle.Cpu(**model), CpuModel(**model),
              f"{model} seed 2")


@pytest.mark.parametrize("model", [{"maxphyaddr": 40}, {"maxphyaddr": 40, "conformance": "kvm", "vendor": "amd"}], ids=str)
def test_the_judges_agree(model):
    """The array judge of the matrix and the oracle, case by case; else neither could be trusted."""
    cpu = oracle.Cpu(**model)
    cases = matrix.generate(np.random.default_rng(3), 4000, cpu)
    expected = matrix.expected_array(cases, cpu)
    for row, case in enumerate(cases):
        one = matrix.expected(case, cpu)
        assert (one.status == "page_fault", one.error_code, one.level, one.ad) == (
            bool(expected.fault[row]), int(expected.error_code[row]), int(expected.level[row]),
            tuple(expected.ad[row].tolist())), f"seed 3 case {row}"


def test_every_condition_is_sampled():
    """Each condition is met and not met, each rule of the manuals allows and denies, in every mode."""
    cases = matrix.generate(np.random.default_rng(4), 50_000)
    expected = matrix.expected_array(cases)
    for position, name in enumerate(matrix.FLAGS):
        assert 0 < int((cases.bits >> np.uint64(position) & np.uint64(1)).sum()) < len(cases), name
    for levels in (2, 3, 4, 5):
        codes = set(expected.error_code[cases.levels == levels].tolist())
        assert {0, 2, 4, 6, 1, 3, 5, 7, 9, 13} <= codes
        assert (0x21 in codes) == (levels > 3)
        assert {0x42, 0x43, 0x45, 0x47} <= codes
        assert {0x23, 0x63} <= codes or levels < 4


def test_illegal_combinations_have_a_reason():
    """What generate() drops is dropped for one of the stated reasons, and what it makes has none."""
    rng = np.random.default_rng(5)
    bits = matrix.random_bits(rng, 2000)
    legal = matrix.legal_array(bits)
    for combination, good in zip(bits.tolist(), legal.tolist(), strict=True):
        reason = matrix.illegal(combination)
        assert good == (reason is None)
        assert good or reason in [text for text, _ in matrix.RULES]
    assert matrix.legal_array(matrix.generate(rng, 2000).bits).all()
