# SPDX-License-Identifier: Apache-2.0
"""The package against oracle_nested.py: two-stage translation of random cases, and of identity second stages.

The judge is itself compared with recorded answers by test_oracle_nested.py.  KVMMU_NESTED_CASES sets the number of
cases of the nested matrix, in images of CHUNK.
"""

import os

import nested_matrix as matrix
import numpy as np
import oracle
import oracle_nested
import pytest
from builders import random_tables, words_to_pages
from nested_matrix import random_controls

from kvmmu import Access, CpuModel, Ept, GeneralProtection, GuestMemory, Npt, Regs, Status, Vcpu

CASES = int(os.environ.get("KVMMU_NESTED_CASES", "20000"))
CHUNK = 2000
FIELDS = ("gpa", "status", "error_code", "ngpa", "fault_gpa", "exit_qualification", "refs", "level")
STATUS = (Status.OK, Status.PAGE_FAULT, Status.NON_CANONICAL, Status.EPT_VIOLATION, Status.EPT_MISCONFIG,
          Status.NESTED_PAGE_FAULT)
MODELS = [{"conformance": conformance, **model} for model in (
    {"maxphyaddr": 48}, {"maxphyaddr": 52, "vendor": "amd"}, {"maxphyaddr": 46, "gbpages": False},
    {"maxphyaddr": 42, "pse36": False}, {"maxphyaddr": 40, "vendor": "amd"}) for conformance in ("sdm", "kvm")]


def package_stage(stage):
    """The package's description of an oracle's stage."""
    if isinstance(stage, oracle_nested.Ept):
        return Ept(stage.eptp, mbec=stage.mbec, execonly=stage.execonly, advanced_info=stage.advanced_info,
                   page_2m=stage.page_2m, page_1g=stage.page_1g)
    return Npt(stage.ncr3, cr4=stage.cr4, efer=stage.efer, gmet=stage.gmet)


def package_regs(regs):
    return Regs(cr0=regs.cr0, cr3=regs.cr3, cr4=regs.cr4, efer=regs.efer, pkru=regs.pkru, pdptrs=regs.pdptrs)


def memory_of(mem, gpas):
    """uint64[n, 512]: the contiguous pages `gpas` as they are now."""
    data = mem.read(int(gpas[0]), 0x1000 * len(gpas))
    return np.frombuffer(data, np.uint64).reshape(-1, 512)


def differences(answers, t):
    """{field: rows} in which a Translation and the answers differ."""
    wrong = {}
    for name in FIELDS:
        rows = np.flatnonzero(getattr(answers, name) != getattr(t, name))
        if rows.size:
            wrong[name] = rows
    return wrong


def describe(batch, answers, t, wrong):
    """Count of differences per field, and the first of each in full."""
    lines = []
    for name, rows in wrong.items():
        row = int(rows[0])
        case = batch.cases[row]
        lines.append(f"{name} differs in {rows.size} of {len(batch.cases)} cases, first case {row}: {case}")
        for source, columns in (("expected", answers), ("actual", t)):
            lines.append(f"  {source}: " + " ".join(f"{field}={int(getattr(columns, field)[row]):#x}" for field in FIELDS))
    return "\n".join(lines)


def run_chunk(seed, count, model):
    """Generate, translate and compare `count` cases, and the image they leave."""
    batch = matrix.generate(np.random.default_rng(seed), count, oracle.Cpu(**model))
    answers = matrix.expected(batch)
    mem = GuestMemory.from_pages(batch.gpas, batch.pages())
    walk = Vcpu(mem, cpu=CpuModel(**model)).gva_walk
    contexts = walk.prepare([(package_regs(case.regs), package_stage(case.stage)) for case in batch.cases])

    t = walk.translate(batch.gva(), batch.access(), regs=contexts, ctx=np.arange(count, dtype=np.uint32), fields=FIELDS)

    wrong = differences(answers, t)
    assert not wrong, f"{model} seed {seed}: {describe(batch, answers, t, wrong)}"
    words = np.argwhere(answers.pages != memory_of(mem, batch.gpas))
    assert words.size == 0, (f"{model} seed {seed}: {len(words)} words of memory differ, first at "
                             f"{int(batch.gpas[words[0][0]]) + 8 * int(words[0][1]):#x}")


def test_sampled_cases():
    """Every field of every case, and A and D of both stages, for all processor models and both conformances."""
    assert [*range(len(STATUS))] == list(STATUS)
    done = 0
    while done < CASES:
        count = min(CHUNK, CASES - done)
        model = MODELS[done // CHUNK % len(MODELS)]
        run_chunk([done, 11], count, model)
        done += count
    assert done == CASES


def test_cases_alone():
    """A batch of one row at a time gives the same as the whole batch."""
    model = MODELS[0]
    batch = matrix.generate(np.random.default_rng(12), 300, oracle.Cpu(**model))
    answers = matrix.expected(batch)
    mem = GuestMemory.from_pages(batch.gpas, batch.pages())
    walk = Vcpu(mem, cpu=CpuModel(**model)).gva_walk
    gva, access = batch.gva(), batch.access()
    for row in np.random.default_rng(13).permutation(len(batch.cases)).tolist():
        case = batch.cases[row]
        contexts = walk.prepare([(package_regs(case.regs), package_stage(case.stage))])
        t = walk.translate(gva[row:row + 1], access[row:row + 1], regs=contexts, ctx=np.zeros(1, np.uint32), fields=FIELDS)
        for name in FIELDS:
            assert getattr(answers, name)[row] == getattr(t, name)[0], f"case {row} {name}: {case}"
    assert np.array_equal(answers.pages, memory_of(mem, batch.gpas))


def test_the_matrix_covers_what_it_says():
    """Every guest mode, nested format, outcome, failing stage, level and combination of rights that can occur."""
    batch = matrix.generate(np.random.default_rng(14), 8000, oracle.Cpu(maxphyaddr=48))
    answers = matrix.expected(batch)
    outcomes = set(zip((case.host for case in batch.cases), answers.status.tolist(), strict=True))
    for host in matrix.HOST_LEVELS:
        failures = {3, 4} if host.startswith("ept") else {5}
        assert {status for name, status in outcomes if name == host} == {0, 1} | failures, host
    assert {case.guest for case in batch.cases} == set(matrix.GUEST_LEVELS)
    violations = answers.exit_qualification[answers.status == 3]
    assert {0, 1} == set((violations >> np.uint64(8) & np.uint64(1)).tolist())
    assert {0, 1, 3, 4, 5, 7} == set((violations >> np.uint64(3) & np.uint64(7)).tolist())
    faults = answers.exit_qualification[answers.status == 5]
    assert {1, 2} == set((faults >> np.uint64(32)).tolist())
    assert {1, 2, 3, 4, 5} == set(answers.level[answers.status == 3].tolist())


def test_the_cases_of_an_image_are_independent():
    """In reverse order every case gets the same answer, and the image ends up the same."""
    batch = matrix.generate(np.random.default_rng(15), 3000, oracle.Cpu(maxphyaddr=46))
    forward = matrix.expected(batch)
    backward = matrix.expected(matrix.Batch(batch.cpu, batch.cases[::-1], batch.words, batch.gpas))
    for name in FIELDS:
        assert np.array_equal(getattr(forward, name), getattr(backward, name)[::-1]), name
    assert np.array_equal(forward.pages, backward.pages)


# ---- an identity second stage changes nothing -----------------------------------------------------------------------

IDENTITY = 0x40000000
IDENTITY_GIGABYTES = 64


def identity_tables(ept, large):
    """({gpa: u64}, root): 64 GBytes mapped to themselves in `large` pages ("1g" or "2m"), with all rights, A and D."""
    table = 0x7 if ept else 0x67
    leaf = 0xF7 if ept else 0xE7
    words = {IDENTITY: IDENTITY + 0x1000 | table}
    for gigabyte in range(IDENTITY_GIGABYTES):
        if large == "1g":
            words[IDENTITY + 0x1000 + 8 * gigabyte] = gigabyte << 30 | leaf
            continue
        directory = IDENTITY + 0x2000 + 0x1000 * gigabyte
        words[IDENTITY + 0x1000 + 8 * gigabyte] = directory | table
        for index in range(512):
            words[directory + 8 * index] = gigabyte << 30 | index << 21 | leaf
    return words, IDENTITY


@pytest.mark.parametrize("large", ["1g", "2m"])
@pytest.mark.parametrize("kind", ["ept", "npt"])
@pytest.mark.parametrize("mode", ["32", "pae", "4l", "5l"])
def test_an_identity_second_stage_equals_one_stage(mode, kind, large):
    """Status, error code, gpa and level of adversarial tables with and without it, and the A and D they leave."""
    stage_words, root = identity_tables(kind == "ept", large)
    stage = Ept(root | 0x1E) if kind == "ept" else Npt(root, cr4=1 << 5, efer=0xD00)
    compared = 0
    for number in range(6):
        rng = np.random.default_rng([number, 15])
        cpu = CpuModel(maxphyaddr=36, conformance=("sdm", "kvm")[number % 2])
        tables = random_tables(rng, mode, gvas=400, maxphyaddr=36)
        registers = random_controls(rng, mode, tables.cr3)
        access = rng.choice([0, 2, 4, 6, 8, 10, 16, 20, 32, 34], len(tables.gvas)).astype(np.uint8)
        gva = np.array(tables.gvas, np.uint64)
        results = []
        for words, second in ((tables.words, None), (tables.words | stage_words, stage)):
            mem = GuestMemory.from_pages(*words_to_pages(words))
            walk = Vcpu(mem, cpu=cpu, tdp=kind).gva_walk      # the kind says where PDPTEs are
            try:
                contexts = walk.prepare([(Regs(**registers), second) if second else Regs(**registers)])
            except GeneralProtection as fault:
                results.append(fault.rule)
                continue
            parts = [walk.translate(gva[row:row + 1], access[row:row + 1], regs=contexts, ctx=np.zeros(1, np.uint32),
                                    fields=("gpa", "status", "error_code", "level")) for row in range(gva.size)]
            columns = {name: np.concatenate([getattr(part, name) for part in parts])
                       for name in ("gpa", "status", "error_code", "level")}
            results.append((columns, {gpa: mem.read_u64(gpa) for gpa in tables.words}))
        one, two = results
        if isinstance(one, str):
            assert one == two
            continue
        for name, column in one[0].items():
            rows = np.flatnonzero(column != two[0][name])
            assert rows.size == 0, (f"seed {number}: {name} differs in {rows.size} rows, first {rows[0]}: "
                                    f"{column[rows[0]]:#x} and {two[0][name][rows[0]]:#x}")
        assert one[1] == two[1]
        compared += 1
    assert compared


def test_access_bits_are_the_packages():
    """The access bits of the matrix are the package's."""
    assert (Access.WRITE, Access.USER, Access.AC, Access.FETCH, Access.IMPLICIT) == (
        matrix.ACCESS_WRITE, matrix.ACCESS_USER, matrix.ACCESS_AC, matrix.ACCESS_FETCH, matrix.ACCESS_IMPLICIT)
