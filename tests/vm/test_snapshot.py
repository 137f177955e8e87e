# SPDX-License-Identifier: Apache-2.0
"""Snapshots and clones of machines go on exactly as the machine would have.

KVMMU_SNAPSHOT_OPERATIONS is the number of random operations before each snapshot and behind it, KVMMU_SNAPSHOT_ROUNDS how often.
"""

import contextlib
import copy
import gc
import os
import pickle
import re
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from driver_l2 import L2_CONFIGURATIONS, L2Driver
from driver_nested import NESTED_CONFIGURATIONS, NestedDriver
from driver_shadow import SHADOW_CONFIGURATIONS, ShadowDriver
from driver_smm import SMM_CONFIGURATIONS, SmmDriver
from driver_smp import SMP_CONFIGURATIONS, NestedTwoProcessors, ShadowTwoProcessors
from machine_driver import CONFIGURATIONS, Driver
from machine_states import GVA, PAGE, check_equal, machine, state

import kvmmu
from kvmmu import Access, Ept, GuestMemory, Host, Pml, Tracepoints, Vcpu, Vm

OPERATIONS = int(os.environ.get("KVMMU_SNAPSHOT_OPERATIONS", "40"))
ROUNDS = int(os.environ.get("KVMMU_SNAPSHOT_ROUNDS", "1"))
DRIVERS = [(Driver, name, value) for name, value in CONFIGURATIONS.items()]
DRIVERS += [(L2Driver, name, value) for name, value in L2_CONFIGURATIONS.items()]
DRIVERS += [(ShadowDriver, name, value) for name, value in SHADOW_CONFIGURATIONS.items()]
DRIVERS += [(SmmDriver, name, value) for name, value in SMM_CONFIGURATIONS.items()]
DRIVERS += [(NestedDriver, name, value) for name, value in NESTED_CONFIGURATIONS.items()]
DRIVERS += [(NestedTwoProcessors if "nested" in name else ShadowTwoProcessors, name, value)
            for name, value in SMP_CONFIGURATIONS.items()]
MODES = ("4l", "pae", "32")
CASES = [(*case, "4l" if "nested ept" in case[1] or "five" in case[1] else MODES[i % 3]) for i, case in enumerate(DRIVERS)]


class Kept:
    """A driver without its machine: what it knows of it, to be tied to that machine again, or to a clone."""

    def __init__(self, driver):
        self.fixed = {"vm": driver.vm, "vcpu": driver.vcpu, "mem": vars(driver).get("mem", vars(driver).get("main_mem"))}
        walkers = [*getattr(driver, "walkers", ()), *(getattr(driver, "other", None) or {}).get("walkers", ())]
        self.walkers = {id(walker): (walker, walker._guest.save()) for walker in walkers}
        self.high = driver.high.copy()
        self.there = any(gpa == driver.high_at for gpa, _, _ in driver.vm.mem.slots)
        self.driver = self.tied(driver, {vcpu: vcpu for vcpu in driver.vm.vcpus}, driver.vm)

    def tied(self, driver, vcpus, vm):
        """A copy of a driver for a machine."""
        memo = {id(driver.vm): vm}
        for old, new in ((driver.vm.mem, vm.mem), (driver.vm.smm_mem, vm.smm_mem)):
            memo[id(old)] = new
        for old, new in vcpus.items():
            memo[id(old)] = new
        own = vm is driver.vm
        for key, (walker, guest) in self.walkers.items():
            memo[key] = walker
            if not own:
                memo[key] = Vcpu(vm.mem, walker.cpu, walker.tdp, smm_mem=vm.smm_mem)
                memo[key]._guest.put(guest, own=False)
        memo[id(driver.high)] = driver.high
        if not own:
            memo[id(driver.high)] = self.high.copy()
            if self.there:
                memo[id(driver.high)] = next(iter(vm.mem._pieces(driver.high_at, 8 * PAGE)))[2]
        return copy.deepcopy(driver, memo)

    def again(self):
        """The driver, for the machine that was restored."""
        if not self.there:
            self.driver.high[:] = self.high
        for walker, guest in self.walkers.values():
            walker._guest.put(guest, own=True)
        return self.tied(self.driver, {vcpu: vcpu for vcpu in self.driver.vm.vcpus}, self.driver.vm)


def run(driver, operations):
    """The logs of random operations."""
    logs = []
    try:
        for _ in range(operations):
            driver.step()
            logs.append(driver.log[-1])
    except Exception as error:
        error.add_note("\n".join(driver.log))
        raise
    return logs


@pytest.mark.parametrize(("kind", "name", "configuration", "mode"), CASES, ids=[f"{case[1]}-{case[3]}" for case in CASES])
def test_random_machines_go_on_as_they_would(kind, name, configuration, mode):
    """N operations, a snapshot, M more; a clone made between does the same M, and so does the machine when it is restored, twice
    and from whatever state it was in; all that the machine tells is equal then."""
    for seed in range(ROUNDS):
        driver = kind(configuration, mode, [seed, zlib.crc32(name.encode())])
        if (seed + len(name)) % 2:
            driver.vm.trace = Tracepoints(capacity=1000)
        run(driver, OPERATIONS)
        vm = driver.vm
        snapshot = vm.snapshot()
        kept = Kept(driver)
        clone, counterparts = vm._clone()
        cloned = kept.tied(kept.driver, counterparts, clone)
        expected = run(driver, OPERATIONS)
        after = state(vm)
        assert run(cloned, OPERATIONS) == expected
        check_equal(after, state(clone))
        for more in (OPERATIONS, 3, 0):
            run(driver, more)
            vm.restore(snapshot)
            driver = kept.again()
            assert run(driver, OPERATIONS) == expected
            check_equal(after, state(vm))


# ---- what is in a snapshot -------------------------------------------------------------------------------------------------


def test_a_snapshot_of_a_machine_that_did_not_run():
    """What comes is a first run again; MMUs that somebody holds begin anew with it."""
    vm = machine()
    vcpu, = vm.vcpus
    before = vm.snapshot()
    first = vcpu.access(GVA, Access.WRITE)
    mmu, after = vcpu.tdp_mmu, state(vm)
    assert mmu.root_hpa is not None
    vm.restore(before)
    assert mmu.root_hpa is None
    assert vm.stats["pf_taken"] == len(vm.sptes()["sp"]) == 0
    vcpu.invlpg(int(GVA[0]))                            # nothing ran: nothing is counted
    assert vm.stats["invlpg"] == 0
    again = vcpu.access(GVA, Access.WRITE)
    assert again.hpa.tolist() == first.hpa.tolist()
    check_equal(after, state(vm))
    assert vcpu.tdp_mmu is mmu
    vm.restore(before)
    assert mmu.page_fault(0x100000, 0) == kvmmu.RetPf.FIXED     # joins the machine again


def test_vcpus_that_were_made_since():
    vm = machine()
    vm.vcpus[0].access(GVA)
    snapshot = vm.snapshot()
    regs = vm.vcpus[0].regs
    second = vm.create_vcpu()
    second.set_regs(regs)
    second.access(GVA, Access.WRITE)
    assert [vcpu.id for vcpu in vm.vcpus] == [0, 1]
    vm.restore(snapshot)
    assert [vcpu.id for vcpu in vm.vcpus] == [0]
    assert len(second.tlb) == 0
    assert vm.audit(True) == []
    assert second.access(int(GVA[5])).gpa == int(GVA[5]) - 0x300000
    assert vm.create_vcpu().id == 1
    del second
    gc.collect()
    assert vm.vcpus[0].access(int(GVA[6])).gpa == int(GVA[6]) - 0x300000
    assert vm.audit(True) == []


def test_vcpus_that_are_gone_since():
    """The snapshot holds them, and brings them back; one that was taken from the list before is kept, too."""
    vm = machine(vcpus=3)
    for vcpu in vm.vcpus:
        vcpu.access(GVA, Access.WRITE)
    apart = vm.vcpus.pop()
    snapshot = vm.snapshot()
    apart_after, hits = apart.access(GVA).hpa.tolist(), apart.tlb.hits
    after = state(vm)
    vm.vcpus.clear()
    gc.collect()
    vm.zap_all()
    vm.restore(snapshot)
    assert [vcpu.id for vcpu in vm.vcpus] == [0, 1]
    assert (apart.access(GVA).hpa.tolist(), apart.tlb.hits) == (apart_after, hits)
    check_equal(after, state(vm))
    clone = vm.vcpus[0].clone().vm
    assert [vcpu.id for vcpu in clone.vcpus] == [0, 1]
    assert apart.clone().id == 2
    check_equal(after, state(clone))


@pytest.mark.parametrize("zap_all", [True, False])
def test_slots_that_changed_since(zap_all):
    """Slots come back over their own bytes, deleted, moved or added ones, with dirty log and generation."""
    vm = machine(Host(tdp=None), slot_zap_all=zap_all)
    vcpu, = vm.vcpus
    extra = bytearray(16 * PAGE)
    vm.add_slot(0x800000, extra, dirty_log=True)
    vcpu.access(GVA, Access.WRITE)
    vm.write_guest_physical(0x800000, b"before")
    snapshot = vm.snapshot()

    def use():
        vm.write_guest_physical(0x801000, b"x")
        out = vcpu.access(GVA, Access.WRITE)
        return out.hpa.tolist(), out.ret.tolist(), state(vm)

    expected = use()
    vm.delete_slot(0x800000)
    with pytest.raises(BufferError):
        extra.extend(b"x")                              # the snapshot reads it
    vm.mem.add_slot(0x900000, 4 * PAGE)
    vm.restore(snapshot)
    assert vm.mem.slots == [(0, 1 << 22, False), (0x800000, 16 * PAGE, False)]
    assert bytes(extra[:6]) == b"before"
    assert vm.get_dirty_log(0x800000, clear=False).tolist() == [0x800]
    got = use()
    assert got[:2] == expected[:2]
    check_equal(expected[2], got[2])
    vm.move_slot(0x800000, 0xA00000)
    vm.host_write(vcpu.regs.cr3, bytes(8))
    vm.restore(snapshot)
    got = use()
    assert got[:2] == expected[:2]
    check_equal(expected[2], got[2])
    vm.delete_slot(0x800000)
    del snapshot
    gc.collect()
    vcpu.access(GVA)
    extra.extend(b"x")


def test_l1_logs_and_second_stages():
    """L1's page-modification log goes on where it was, under the very same Ept; so does a clone's."""
    vm = machine()
    vcpu, = vm.vcpus
    eptp = 0x200000
    mem = vm.mem
    mem.write_u64(eptp, 0x201007)
    mem.write_u64(0x201000, 0x202007)
    for i in range(2):
        mem.write_u64(0x202000 + 8 * i, (i << 21) | 0xB7)
    stage = Ept(eptp | 0x5E, pml=Pml(0x210000, 511))
    vcpu.enter_nested(stage)
    vcpu.gva_walk.translate(GVA[:3], int(Access.WRITE))
    vcpu.access(GVA[:3], Access.WRITE)
    index = vcpu.gva_walk.second.pml_index
    assert index < 511
    prepared = vcpu.gva_walk.prepare([vcpu.regs])
    snapshot = vm.snapshot()
    mem.write_u64(0x202000, 0xB7)                        # D is clear again: the next write is logged
    vcpu.gva_walk.translate(GVA[5:6], int(Access.WRITE))
    moved = vcpu.gva_walk.second.pml_index
    vcpu.leave_nested()
    vm.restore(snapshot)
    assert vcpu.gva_walk.second.pml_index == index
    assert vcpu.gva_walk.translate(GVA[:1], regs=prepared, ctx=np.zeros(1, np.uint32)).status[0] == 0
    vcpu.enter_nested(stage)                            # the same one: no work, and the log goes on
    assert vcpu.gva_walk.second.pml_index == index
    clone = vcpu.clone()
    clone.enter_nested(stage)
    for each in (vcpu, clone):
        each.mem.write_u64(0x202000, 0xB7)
        each.gva_walk.translate(GVA[5:6], int(Access.WRITE))
        assert each.gva_walk.second.pml_index == moved
    assert clone.mem.read(0x210000, PAGE) == mem.read(0x210000, PAGE)
    vcpu.leave_nested()
    assert clone.mmu_is_nested
    clone.leave_nested()
    assert clone.access(int(GVA[9])).gpa == int(GVA[9]) - 0x300000


def test_registers_models_and_tracepoints():
    vm = machine()
    vcpu, = vm.vcpus
    vcpu.access(GVA)
    vm.trace = trace = Tracepoints("kvm_tdp_mmu_spte_changed", capacity=8)
    vcpu.cr2, vcpu.rip = 0x1234, 0x5678
    vcpu.access(GVA, Access.WRITE)
    snapshot, cpu, text = vm.snapshot(), vcpu.cpu, trace.text()
    vm.trace = None
    vcpu.cr2 = vcpu.rip = 0
    vcpu.mov_cr(4, int(vcpu.regs.cr4) | 1 << 7)
    vcpu.cpu = kvmmu.CpuModel(maxphyaddr=40)
    vcpu.smm = True
    vcpu.tlb.__init__(((4, 2), (4, 2), (1, 1)))
    vm.clear_stats()
    vm.restore(snapshot)
    assert (vcpu.cr2, vcpu.rip, vcpu.cpu, vcpu.smm) == (0x1234, 0x5678, cpu, False)
    assert vm.trace is trace
    assert trace.text() == text
    clone = vm.clone()
    assert clone.trace is not trace
    assert clone.trace.text() == text
    clone.zap_all()
    clone.vcpus[0].access(GVA)
    assert trace.text() == text != clone.trace.text()


def test_every_pointer_is_known():
    """Whoever adds a pointer to the state of a machine says here that copies of it are right.

    `mmu/core/_copy.pyx` copies the arrays, `machine/_saved.pyx` sets the pointers of walks and MMUs anew.
    """
    root = Path(kvmmu.__file__).parent
    found = {}
    for path in ("mmu/core/_kvm.pxd", "mmu/core/_slots.pxd", "mmu/core/_pte_list.pxd", "mmu/core/_trace.pxd",
                 "mmu/core/_spte.pxd", "machine/_state.pxd", "machine/_rights.pxd", "tlb/_tlb.pxd", "_walk.pxd"):
        for name, body in re.findall(r"^cdef struct (\w+):\n((?:    .*\n|\n)+)", (root / path).read_text(), re.MULTILINE):
            fields = [line.split("#")[0].strip() for line in body.splitlines()]
            found[name] = [field for field in fields if "*" in field or re.search(r"_fn \w+$", field)]
    assert {name: fields for name, fields in found.items() if fields} == {
        "kvm_mmu_page": ["uint64_t *shadowed_translation"],
        "kvm": ["uint64_t *sptes", "kvm_mmu_page *pages", "kvm_vcpu **vcpus", "unmap_gfns_fn unmap_gfns",
                "write_protect_gfn_fn write_protect_gfn"],
        "kvm_page_fault": ["kvm_memory_slot *slot"],
        "kvm_mmu": ["page_fault_fn page_fault", "const kvm_page_format *fmt", "const kvm_pagewalk *w"],
        "kvm_vcpu": ["kvm *kvm", "kvm_mmu *mmu"],
        "kvm_memory_slot": ["uint8_t *hva", "uint8_t *host_page", "uint64_t *dirty_bitmap", "uint16_t *write_track",
                            "int32_t *disallow_lpage[2]", "uint64_t *rmap[3]"],
        "slot_table": ["kvm_memory_slot **slots", "kvm_memory_slot *last"],
        "pte_list_pool": ["pte_list_desc *descs"],
        "trace_ring": ["trace_event *events"],
        "cached_stage": ["gva_to_gpa_fn walk"],
        "machine": ["kvm *k", "kvm_vcpu *vcpu", "kvm_mmu *mmu", "tlb *tlb", "guest_slot *arena", "vcpu_arch *arch",
                    "const uint8_t *data"],
        "tlb_array": ["uint64_t *keys", "tlb_entry *entries"],
        "kvm_pagewalk": ["gva_to_gpa_fn gva_to_gpa", "walk_steps_fn walk_steps", "walk_addr_fn walk_addr", "const guest_mem *mem",
                         "const vcpu_arch *vcpu", "const kvm_page_format *fmt", "const kvm_pagewalk *ngpa", "pml_log *pml"],
    }


# ---- what cannot be, and what must not crash -------------------------------------------------------------------------------

def test_refusals():
    vm, other = machine(), machine()
    snapshot = vm.snapshot()
    with pytest.raises(ValueError, match="of another machine"):
        other.restore(snapshot)
    for wrong in (None, 1, vm):
        with pytest.raises(TypeError, match="want a Snapshot"):
            vm.restore(wrong)
    with pytest.raises(TypeError, match=r"made by Vm\.snapshot"):
        kvmmu.Snapshot()
    for thing in (vm, vm.vcpus[0], snapshot, vm.mem, vm.vcpus[0].gva_walk):
        for copied in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="copied|pickle"):
                copied(thing)
    with vm.invalidation(0, PAGE):
        for call in (vm.snapshot, vm.clone, vm.vcpus[0].clone):
            with pytest.raises(RuntimeError, match="invalidation is under way"):
                call()
    with vm._lock:                                      # as within another call of this thread
        for call in (vm.snapshot, vm.clone, lambda: vm.restore(snapshot)):
            with pytest.raises(RuntimeError, match="within another call"):
                call()
    vm.restore(snapshot)


def test_a_machine_and_its_snapshots_go_when_nobody_holds_them():
    freed = []

    class Buffer(bytearray):
        def __del__(self):
            freed.append(self)

    vm = Vm(GuestMemory(Buffer(1 << 20)))
    vm.create_vcpu().access(0)
    clone, snapshot = vm.clone(), vm.snapshot()
    vm.restore(snapshot)
    del vm
    gc.collect()
    assert not freed
    del snapshot
    gc.collect()
    assert len(freed) == 1
    assert clone.vcpus[0].access(0).gpa == 0


def test_a_call_that_is_under_way_while_its_vcpu_is_taken_back():
    """A thread has the vCPU on its host, another one restores to a time before it ran: it runs again, and all know of it."""
    vm, gva = machine(vcpus=2), int(GVA[0])
    vcpu, snapshot = vm.vcpus[1], vm.snapshot()
    vcpu.access(gva)
    for _ in range(2):
        taken = vcpu._made
        vm.restore(snapshot)
        assert vm.snapshot()._vcpus[1].machine is None
        taken.access_one(gva, 0, 0)
        assert vm.snapshot()._vcpus[1].machine is not None
        assert vcpu.tlb.lookup(gva) is not None
        vcpu.invlpg(gva)
        assert vcpu.tlb.lookup(gva) is None
        assert vm.audit(True) == []


def test_threads_that_run_meanwhile():
    """Accesses, walks, slots and invalidations of other threads wait, or see a state of before or behind."""
    vm = machine(vcpus=2)
    snapshots, stop, errors = [vm.snapshot()], threading.Event(), []

    def work(body):
        try:
            while not stop.is_set():
                body()
        except BaseException as error:
            errors.append(error)

    def slots():
        vm.add_slot(0x1000000, 4 * PAGE)
        with contextlib.suppress(ValueError):           # restored meanwhile
            vm.delete_slot(0x1000000)

    bodies = [lambda: vm.vcpus[0].access(GVA, Access.WRITE), lambda: vm.vcpus[1].gva_walk.translate(GVA),
              lambda: (vm.invalidate(0x100000, 8 * PAGE), vm.vcpus[1].invlpg(0x400000)), slots]
    threads = [threading.Thread(target=work, args=(body,)) for body in bodies]
    for thread in threads:
        thread.start()
    clones = []
    for i in range(60):
        snapshots = [*snapshots[-3:], vm.snapshot()]
        vm.restore(snapshots[i % len(snapshots)])
        if i % 20 == 0:
            clones.append(vm.clone())
    stop.set()
    for thread in threads:
        thread.join()
    assert [error for error in errors if not (isinstance(error, ValueError) and "overlap" in str(error))] == []
    vm.restore(snapshots[0])
    assert vm.audit() == []
    for clone in clones:
        assert clone.audit() == []
        assert clone.vcpus[0].access(GVA).status.any() == np.False_
