# SPDX-License-Identifier: Apache-2.0
"""kvmmu.h: extensions of the architecture, and second stages."""

import ctypes
import dataclasses
from collections import Counter

import c_table
import extension_vectors as vectors
import numpy as np
import pytest
import random_guests as guests
from c_table import CallFailed, Cpu, Machine, SecondStage, bytes_of, copy_of

import kvmmu
from kvmmu import Access, Ept, GuestMemory, Npt, Status, Vcpu

COLUMNS = ("gpa", "status", "error_code", "level")


def assert_equal(expected, found):
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(expected, name), getattr(found, name), err_msg=name)


def load_case(machine, z, i):
    """Load the second stage and the registers of a case. False if they are illegal."""
    if "root2" in z:
        machine.enter(vectors.stage_of(z, i))
    try:
        machine.load(**{name: int(z[name][i]) for name in vectors.REGISTERS})
    except CallFailed as failed:
        assert str(failed) == "-8"
        return False
    return True


@pytest.mark.parametrize("callbacks", [False, True])
@pytest.mark.parametrize("name", vectors.names(two_stage=False) + vectors.names(two_stage=True))
def test_extensions(name, callbacks):
    """The cases of a file one by one: vector, error code, CR2, address and exit, and the words afterwards."""
    z = vectors.load(name)
    flags = int(bool(z["amd"])) | (0 if "gbpages" not in z or z["gbpages"] else 4)
    cpu = Cpu(int(z["maxpa"]), flags, c_bit=int(z["cbit"]) if "cbit" in z else 0)
    machine = Machine(copy_of(vectors.memory(z)), {"cr0": 0x10}, cpu=cpu, callbacks=callbacks)
    asked = vectors.accesses(z)
    _, ctx = vectors.register_sets(z)
    rows = np.flatnonzero(vectors.can_be_said(z))
    got = {column: np.zeros(rows.size, np.uint64) for column in ("vec", "err", "gpa", "reason", "qual", "xgpa")}
    known = 2**57 - 1 if "_uai_" in name else 2**64 - 1             # of CR2: it need not hold the tag, nor lack it
    loaded = None
    for at in np.argsort(ctx[rows], kind="stable").tolist():
        row = int(rows[at])
        if ctx[row] != loaded:
            loaded, legal = ctx[row], load_case(machine, z, row)
        if not legal:
            got["vec"][at], got["gpa"][at] = vectors.GP_AT_LOAD, 2**64 - 1
            continue
        end = machine.nested(int(z["gva"][row]), int(asked[row]))
        got["vec"][at] = vectors.VECTOR.get(Status(end.status), vectors.VM_EXIT)
        got["err"][at], got["gpa"][at], got["reason"][at] = end.error_code, end.gpa, end.exit_reason
        got["qual"][at], got["xgpa"][at] = end.exit_qualification, end.fault_gpa
        if end.status == Status.PAGE_FAULT:
            assert (end.linear ^ int(z["expect_cr2"][row])) & known == 0, f"case {row}: {end.linear:#x}"
    machine.close()
    vectors.check(z, rows, got if "root2" in z else {column: got[column] for column in ("vec", "err", "gpa")})
    now = {gpa + 8 * i: word for gpa, data in machine.slots for i, word in enumerate(data.view(np.uint64).tolist())}
    assert [now[gpa] for gpa in z["words_gpa"].tolist()] == vectors.final_words(z).tolist()


def nested_twin(seed, **options):
    """A Python vCPU in L2 over random tables, the same behind handles, addresses and accesses; None if they cannot be."""
    rng = np.random.default_rng(seed)
    mode, width = str(rng.choice(["nopg", "32", "pae", "4l", "5l"])), int(rng.choice([36, 40, 52]))
    mem, frames = guests.random_memory(kvmmu, rng, mode, width, Counter(), ("plain",))
    while sum(size for _, size, _ in mem.slots) > 1 << 24:          # sparse, too large to be copied
        mem, frames = guests.random_memory(kvmmu, rng, mode, width, Counter(), ("plain",))
    regs, stage = guests.random_regs(kvmmu, rng, mode, frames, width), guests.random_stage(kvmmu, rng, frames, width)
    vcpu = Vcpu(mem, kvmmu.CpuModel(maxphyaddr=width))
    names = ("cr0", "cr3", "cr4", "efer", "pkru", "pdptrs")
    if isinstance(stage, Npt):
        regs = dataclasses.replace(regs, pdptrs=None)
    slots = copy_of(mem)                            # before PDPTEs are loaded through the second stage
    registers = {name: getattr(regs, name) for name in names}
    try:
        vcpu.enter_nested(stage, **registers)
    except kvmmu.GuestFault:
        with pytest.raises(CallFailed, match="-8"):
            Machine(slots, registers, cpu=Cpu(width), stage=stage, **options)
        return None
    machine = Machine(slots, registers, cpu=Cpu(width), stage=stage, **options)
    return vcpu, machine, guests.random_gvas(rng, 60, mode), guests.random_accesses(rng, 60)


@pytest.mark.parametrize("callbacks", [False, True])
def test_two_stages_are_those_of_python(callbacks):
    """Every column of random L2 guests under EPT and NPT, what is left in memory, look-ups, records, and the stage."""
    fields = (*COLUMNS, "ngpa", "pte", "pte_gpa", "fault_gpa", "exit_qualification", "pte_access", "refs")
    seen = Counter()
    for seed in range(150):
        twins = nested_twin(seed, callbacks=callbacks, cache_pages=64)
        if twins is None:
            seen["illegal"] += 1
            continue
        vcpu, machine, gva, access = twins
        for address, how in zip(gva.tolist(), access.tolist(), strict=True):
            expected = vcpu.gva_walk.translate(np.array([address], np.uint64), how, fields=fields)
            mine = machine.nested(address, how)
            assert [int(getattr(expected, name)[0]) for name in fields] == [
                mine.gpa, mine.status, mine.error_code, mine.level, mine.ngpa, mine.pte, mine.pte_gpa, mine.fault_gpa,
                mine.exit_qualification, mine.rights, mine.reads]
            seen[Status(mine.status).name] += 1
            record, own = vcpu.gva_walk.walk_record(address, how), machine.record(address, how)
            assert [(step.entry, step.index) for step in record.steps] == [(s.entry, s.index) for s in own.steps[:own.count]]
            own = machine.lookup(address, int(Access.PROBE))
            try:
                there = vcpu.gva_walk.lookup(address, Access.PROBE)
            except kvmmu.GuestFault:
                assert own.status != Status.OK
            else:
                assert (there.gpa, there.size, there.pte_access, there.pkey, there.accessed, there.dirty, there.global_) == (
                    own.gpa, own.size, own.rights, own.pkey, own.accessed, own.dirty, own.global_)
        assert bytes_of(copy_of(vcpu.mem)) == bytes_of(machine.slots)
        found = SecondStage(size=ctypes.sizeof(SecondStage))
        machine.table.get_second_stage(machine.vcpu, ctypes.byref(found))
        stage = c_table.second_stage(vcpu.gva_walk.second.stage)
        assert (stage.flags, stage.root) == (found.flags, found.root)
        if stage.flags & c_table.PML:
            assert vcpu.gva_walk.second.pml_index == found.pml_index
        again = machine.translate_many(gva, access, flags=0x100)
        expected = vcpu.gva_walk.translate(gva, access, fields=COLUMNS, set_ad=False)
        assert_equal(expected, again)
        machine.close()
    assert {"OK", "PAGE_FAULT", "EPT_VIOLATION", "EPT_MISCONFIG", "NESTED_PAGE_FAULT", "illegal"} <= set(seen)


@pytest.mark.parametrize("callbacks", [False, True])
def test_a_second_stage_comes_and_goes(callbacks):
    """The registers stay, their walk changes; a log goes on where it is when registers are loaded, until it is full."""
    ram = np.zeros(1 << 14, np.uint64)
    for gpa, entry in ((0x1000, 0x2027), (0x2000, 0x3027), (0x3010, 0x6027), (0x6000, 0x4027), (0x6008, 0x5027),
                       (0x8000, 0x9007), (0x9000, 0xA007), (0xA000, 0xB007)):
        ram[gpa // 8] = entry
    for page in range(16):
        ram[0xB000 // 8 + page] = (page ^ 1 if page in (4, 5) else page) << 12 | 0x37
    machine = Machine([(0, ram.view(np.uint8))], {"cr0": 0x80010001, "cr3": 0x1000, "cr4": 0x20, "efer": 0xD00},
                      callbacks=callbacks)
    assert 0x4000 == machine.lookup(0x400000, 0).gpa
    machine.enter(Ept(0x8000 | 0x5E, pml=kvmmu.Pml(0xC000, 7)))
    mapping = machine.lookup(0x400000, 0)
    assert (0x5000, 4096) == (mapping.gpa, mapping.size)
    logged = [0x1000, 0x2000, 0x3000, 0x6000]               # tables of the guest are written to
    assert logged == ram[0xC000 // 8 + 4:0xC000 // 8 + 8][::-1].tolist()
    machine.load(cr0=0x80000001, cr3=0x1000, cr4=0x20, efer=0xD00)
    assert 0x5000 == machine.nested(0x400000, 2).gpa
    found = SecondStage(size=ctypes.sizeof(SecondStage))
    machine.table.get_second_stage(machine.vcpu, ctypes.byref(found))
    assert (2, 0x4000) == (found.pml_index, ram[0xC000 // 8 + 3])
    machine.enter(Ept(0x8000 | 0x1E, pml=None, ve=0xD000))  # the page is read-only now, and the guest is told
    ram[0xB000 // 8 + 4] &= ~np.uint64(2)
    machine.table.invalidate(machine.vcpu, 0, 0)
    for status in (Status.VIRT_EXCEPTION, Status.EPT_VIOLATION):                # the second time the area is taken
        end = machine.nested(0x400000, 2)
        assert (status, 0x7AA, 0x4000) == (end.status, end.exit_qualification, end.fault_gpa)
        assert end.exit_reason == (0 if status == Status.VIRT_EXCEPTION else 48)
        assert [48 | 0xFFFFFFFF << 32, 0x7AA, 0x400000, 0x4000, 0] == ram[0xD000 // 8:0xD000 // 8 + 5].tolist()
    machine.enter(Ept(0x8000 | 0x5E, pml=kvmmu.Pml(0xC000, 512)))
    ram[0xB000 // 8 + 4] = 0x5037
    machine.table.invalidate(machine.vcpu, 0, 0)
    end = machine.nested(0x400000, 2)
    assert (Status.PML_FULL, 62) == (end.status, end.exit_reason)
    machine.enter(Npt(0x1000))                              # the guest's own tables, which do not map 0x1000
    end = machine.nested(0x400000, 0)
    assert (Status.NESTED_PAGE_FAULT, 0x400, 0x1000) == (end.status, end.exit_reason, end.fault_gpa)
    machine.enter(None)
    assert 0x4000 == machine.nested(0x400000, 2).gpa
    machine.close()


def test_entries_of_an_address_with_a_tag():
    """LAM48 under 5-level paging overwrites bits that choose the entry of the root table."""
    ram = np.zeros(1 << 14, np.uint64)
    for gpa, entry in ((0x1000, 0x2027), (0x1000 + 8 * 0x55, 0x7027), (0x2000, 0x3027), (0x3000, 0x4027), (0x4010, 0x6027),
                       (0x6000, 0x5027)):
        ram[gpa // 8] = entry
    machine = Machine([(0, ram.view(np.uint8))], {"cr0": 0x80010001, "cr3": 0x1000 | 1 << 62, "cr4": 0x1020, "efer": 0xD00})
    record = machine.record(0x55 << 48 | 0x400000, 0)
    assert (Status.OK, 0x5000, 5) == (record.end.status, record.end.gpa, record.count)
    assert (0, 0x1000, 0x2027) == (record.steps[0].index, record.steps[0].entry_gpa, record.steps[0].entry)
    machine.close()


def test_accesses_to_shadow_stacks_without_cet():
    """They are judged as with CR4.CET set, in every call; and a probe passes LASS."""
    ram = np.zeros(1 << 14, np.uint64)
    for gpa, entry in ((0x1000, 0x2027), (0x2000, 0x3027), (0x3010, 0x6027), (0x6000, 0x4065), (0x6008, 0x5067)):
        ram[gpa // 8] = entry
    mem = GuestMemory(ram.view(np.uint8))
    regs = {"cr0": 0x80010001, "cr3": 0x1000, "cr4": 0x20, "efer": 0xD00}
    vcpu, machine = Vcpu(mem), Machine([(0, ram.view(np.uint8))], regs)
    gva = np.array([0x400000, 0x401000, 0x402000], np.uint64)
    for access in (0x44, 0x46, 0x40, 0x42):
        how, answers = np.full(3, access, np.uint8), []
        for cr4 in (0x20, 0x800020):
            machine.load(**regs | {"cr4": cr4})
            vcpu.set_regs(**regs | {"cr4": cr4})
            t = vcpu.gva_walk.translate(gva, access, fields=COLUMNS)
            for found in (machine.translate(gva, how), machine.translate_many(gva, how)):
                assert_equal(t, found)
            answers.append((t.status.tolist(), t.error_code.tolist()))
            for row, address in enumerate(gva.tolist()):
                end = (t.status[row], t.error_code[row])
                record, nested = vcpu.gva_walk.walk_record(address, access), machine.nested(address, access)
                assert end == (record.status, record.error_code) == (nested.status, nested.error_code)
                mapping, steps = machine.lookup(address, access), machine.record(address, access)
                assert end == (mapping.status, mapping.error_code) == (steps.end.status, steps.end.error_code)
                if t.status[row]:
                    with pytest.raises(kvmmu.PageFault):
                        vcpu.gva_walk.gva_to_gpa(address, access)
                else:
                    assert t.gpa[row] == vcpu.gva_walk.gva_to_gpa(address, access)
        assert answers[0] == answers[1]
        user = access & 4
        assert answers[0] == ([0 if user else 1, 1, 1], [0 if user else access & 0x46 | 1, access & 0x46 | 1, access & 0x46])
    machine.load(**regs | {"cr4": 0x8000020})
    assert 0x40 | 1 == machine.lookup(0x400000, 0x40).error_code
    assert Status.LASS_VIOLATION == machine.lookup(0x400000, 0x10).status
    for access in (0x80, 0x90):
        assert 0x4000 == machine.lookup(0x400000, access).gpa == machine.nested(0x400000, access).gpa
    machine.close()
