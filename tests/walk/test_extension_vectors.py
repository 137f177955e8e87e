# SPDX-License-Identifier: Apache-2.0
"""Recorded answers about LAM, shadow stacks, supervisor keys, LASS, UAI, the encryption bit, and extensions of EPT.

Every case runs in one batch, in batches of equal registers, shuffled, and alone; with the kernels of each instruction set.
"""

import extension_vectors as ev
import numpy as np
import pytest

from kvmmu import Ept, GeneralProtection, GuestFault, NestedFault, PageFault, Regs, Vcpu, VirtualizationException
from kvmmu.walk.batch._kernels import instruction_sets, use_instruction_set

ONE_STAGE = ev.names(two_stage=False)
TWO_STAGES = ev.names(two_stage=True)
NOWHERE = 2**64 - 1
EXITS = ("gpa", "status", "error_code", "fault_gpa", "exit_qualification")


def cases(name):
    """(file, memory, vCPU, register sets, set of each case, cases that are legal)."""
    z = ev.load(name)
    mem = ev.memory(z)
    vcpu = Vcpu(mem, cpu=ev.cpu_of(z))
    sets, ctx = ev.register_sets(z)
    sets, legal = ev.admitted(vcpu.gva_walk, sets)
    assert np.array_equal(legal[ctx], z["expect_vec"] != ev.GP_AT_LOAD)
    return z, mem, vcpu, sets, ctx, np.flatnonzero(legal[ctx] & ev.can_be_said(z))


@pytest.mark.usefixtures("same_instruction_set")
@pytest.mark.parametrize("kernels", instruction_sets())
@pytest.mark.parametrize("name", ONE_STAGE)
def test_all_cases_in_one_batch(name, kernels):
    z, mem, vcpu, sets, ctx, rows = cases(name)
    use_instruction_set(kernels)
    t = vcpu.gva_walk.translate(z["gva"][rows], ev.accesses(z)[rows], regs=sets, ctx=ctx[rows])
    ev.check(z, rows, ev.columns_of(t))
    assert np.array_equal(ev.words_now(z, mem), ev.final_words(z))


@pytest.mark.usefixtures("same_instruction_set")
@pytest.mark.parametrize("kernels", instruction_sets())
@pytest.mark.parametrize("name", ONE_STAGE)
def test_equal_registers_and_shuffled(name, kernels):
    """Once by register set, then a thousand at a time in random order, with more columns."""
    z, mem, vcpu, sets, ctx, rows = cases(name)
    use_instruction_set(kernels)
    access = ev.accesses(z)
    for number in np.unique(ctx[rows]).tolist():
        part = rows[ctx[rows] == number]
        vcpu.set_regs(sets[number])
        ev.check(z, part, ev.columns_of(vcpu.gva_walk.translate(z["gva"][part], access[part])))
    assert np.array_equal(ev.words_now(z, mem), ev.final_words(z))
    prepared = vcpu.gva_walk.prepare(sets)
    order = np.random.default_rng(7).permutation(rows)
    for part in np.array_split(order, max(1, order.size // 1000)):
        t = vcpu.gva_walk.translate(z["gva"][part], access[part], regs=prepared, ctx=ctx[part],
                                    fields=("gpa", "status", "error_code", "pte", "pte_access"))
        ev.check(z, part, ev.columns_of(t))


@pytest.mark.parametrize("name", ONE_STAGE)
def test_each_case_alone(name):
    """By scalar calls, with the address that CR2 takes, and every seventh one as a record."""
    z, mem, vcpu, sets, ctx, rows = cases(name)
    access = ev.accesses(z)
    got = {"vec": np.zeros(rows.size, np.int64), "err": np.zeros(rows.size, np.int64),
           "gpa": np.full(rows.size, NOWHERE, np.uint64)}
    known = (1 << 57) - 1 if "_uai_" in name else NOWHERE       # of CR2: it need not hold the tag, nor lack it
    loaded = None
    for at in np.argsort(ctx[rows], kind="stable").tolist():
        row = int(rows[at])
        if ctx[row] != loaded:
            loaded = ctx[row]
            vcpu.set_regs(sets[loaded])
        gva, a = int(z["gva"][row]), int(access[row])
        record = vcpu.gva_walk.walk_record(gva, a) if row % 7 == 0 else None
        try:
            got["gpa"][at] = vcpu.gva_walk.gva_to_gpa(gva, a)
            rule = None
        except PageFault as fault:
            got["vec"][at], got["err"][at], rule = ev.PAGE_FAULT, fault.error_code, fault.rule
            assert (fault.address ^ int(z["expect_cr2"][row])) & known == 0, f"case {row}: CR2 {fault.address:#x}"
        except GeneralProtection as fault:
            got["vec"][at], rule = ev.GENERAL_PROTECTION, fault.rule
            assert rule in ("lass", "non-canonical")
        if record is not None:
            assert (record.error_code, record.rule) == (got["err"][at], rule), f"case {row}"
            assert record.gpa == (None if rule else got["gpa"][at])
    ev.check(z, rows, got)
    assert np.array_equal(ev.words_now(z, mem), ev.final_words(z))


@pytest.mark.parametrize("name", TWO_STAGES)
def test_two_stages_in_one_batch(name):
    """Outcome, reason, qualification, addresses and final words; the words of #VE information areas too."""
    z, mem, vcpu, sets, ctx, rows = cases(name)
    access = ev.accesses(z)
    t = vcpu.gva_walk.translate(z["gva"][rows], access[rows], regs=sets, ctx=ctx[rows], fields=EXITS)
    ev.check(z, rows, ev.columns_of(t))
    assert np.array_equal(ev.words_now(z, mem), ev.final_words(z))


@pytest.mark.usefixtures("same_instruction_set")
@pytest.mark.parametrize("kernels", instruction_sets())
@pytest.mark.parametrize("name", TWO_STAGES)
def test_two_stages_shuffled(name, kernels):
    """The three columns that blocks know, in random order."""
    z, mem, vcpu, sets, ctx, rows = cases(name)
    use_instruction_set(kernels)
    access = ev.accesses(z)
    order = np.random.default_rng(3).permutation(rows)
    prepared = vcpu.gva_walk.prepare(sets)
    for part in np.array_split(order, max(1, order.size // 500)):
        t = vcpu.gva_walk.translate(z["gva"][part], access[part], regs=prepared, ctx=ctx[part])
        ev.check(z, part, ev.columns_of(t))
    assert np.array_equal(ev.words_now(z, mem), ev.final_words(z))


@pytest.mark.parametrize("name", TWO_STAGES)
def test_two_stages_each_case_alone(name):
    """By scalar calls of a vCPU that has entered L2."""
    z, mem, vcpu, sets, ctx, rows = cases(name)
    access = ev.accesses(z)
    got = {key: np.zeros(rows.size, np.uint64) for key in ("vec", "err", "reason", "qual", "xgpa")}
    got["gpa"] = np.full(rows.size, NOWHERE, np.uint64)
    loaded = None
    for at in np.argsort(ctx[rows], kind="stable").tolist():
        row = int(rows[at])
        if ctx[row] != loaded:
            loaded = ctx[row]
            regs, stage = sets[loaded]
            vcpu.leave_nested()
            vcpu.enter_nested(stage, **{key: getattr(regs, key) for key in ev.REGISTERS})
        try:
            got["gpa"][at] = vcpu.gva_walk.gva_to_gpa(int(z["gva"][row]), int(access[row]))
        except PageFault as fault:
            got["vec"][at], got["err"][at] = ev.PAGE_FAULT, fault.error_code
        except GeneralProtection:
            got["vec"][at] = ev.GENERAL_PROTECTION
        except VirtualizationException:
            got["vec"][at] = ev.VIRT_EXCEPTION
        except NestedFault as fault:
            got["vec"][at], got["qual"][at], got["xgpa"][at] = ev.VM_EXIT, fault.exit_qualification, fault.fault_gpa
            got["reason"][at] = {"EptViolation": 48, "EptMisconfig": 49, "SppEvent": 66, "NestedPageFault": 1024}[
                type(fault).__name__]
    ev.check(z, rows, got)
    assert np.array_equal(ev.words_now(z, mem), ev.final_words(z))


# ---- matrices -----------------------------------------------------------------------------------------------------------

MATRICES = ev.names(two_stage=False, matrices=True) + ev.names(two_stage=True, matrices=True)


def row_of(z, j, n):
    """Arguments of one row of a matrix: (accesses, registers of each cell, second stage of each cell or None)."""
    config = dict(zip(str(z["columns"]).split(), z["cfg"][j].tolist(), strict=True))
    access = int(ev.accesses({key: np.array([value]) for key, value in config.items()})[0])
    regs = [Regs(cr0=int(z["cr0"][j]), cr4=int(z["cr4"][j]), efer=int(z["efer"][j]),
                 cr3=int(z["cr3"][i] if z["cr3"].size == n else z["cr3"][j]),
                 pkru=int(z["pkru"][i]) if "pkru" in z else 0, pkrs=int(z["pkrs"][i]) if "pkrs" in z else 0) for i in range(n)]
    stages = None
    if "root2" in z:
        flags = config["eptp_bit7"] << 7 | config["eptp_ad"] << 6
        stages = [Ept(int(root) | flags) for root in z["root2"].tolist()]
    return config, access, regs, stages


@pytest.mark.parametrize("name", MATRICES)
def test_matrix(name):
    """Every cell of every row, over the memory as it was."""
    z = ev.load(name)
    n = z["gva"].size
    for j in range(z["cfg"].shape[0]):
        config, access, regs, stages = row_of(z, j, n)
        if "_uai" in name and config.get("stack"):
            continue
        vcpu = Vcpu(ev.memory(z), cpu=ev.cpu_of(z))
        sets = regs if stages is None else list(zip(regs, stages, strict=True))
        t = vcpu.gva_walk.translate(z["gva"], access, regs=sets, ctx=np.arange(n, dtype=np.uint32), fields=EXITS)
        got = ev.columns_of(t)
        out = z["out"][j].astype(np.int64)
        vector = np.where(out >> 8 == ev.STACK_FAULT, ev.GENERAL_PROTECTION, out >> 8)
        ev.differ(f"row {j}: vector", range(n), vector, got["vec"])
        sure = 0xFF & ~(ev.PK * (z["doubt"][j] == 1)) if "doubt" in z else 0xFF
        ev.differ(f"row {j}: error code", range(n), out & sure, got["err"] & sure)
        if stages is not None:
            ev.differ(f"row {j}: reason", range(n), z["reason"][j], got["reason"])
            ev.differ(f"row {j}: qualification", range(n), z["qual"][j], got["qual"])
        if "cr2" not in z:
            continue
        for i in np.flatnonzero(vector == ev.PAGE_FAULT).tolist():
            vcpu.set_regs(regs[i])
            with pytest.raises(GuestFault) as fault:
                vcpu.gva_walk.gva_to_gpa(int(z["gva"][i]), access)
            known = (1 << 57) - 1 if "_uai" in name else NOWHERE
            assert (fault.value.address ^ int(z["cr2"][j, i])) & known == 0, f"row {j}, cell {i}"


def test_there_are_files():
    assert len(ONE_STAGE) >= 5
    assert len(TWO_STAGES) >= 2
    assert len(MATRICES) == 6
