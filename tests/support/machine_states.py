# SPDX-License-Identifier: Apache-2.0
"""Machines of 64 pages, and all that a machine tells of itself."""

import numpy as np

from kvmmu import GuestMemory, Host, PageTables, Vm

PAGE = 4096


def state(vm):
    """All that a machine tells of itself."""
    vcpus = [(vcpu.id, vcpu.regs, vcpu.pdptrs, vcpu.cr2, vcpu.smm, vcpu.mmu_is_nested, vcpu.gva_walk.init_count,
              vcpu.ngpa_walk.init_count, None if vcpu.gva_walk.second is None else vcpu.gva_walk.second.pml_index,
              vcpu.tlb.hits, vcpu.tlb.misses, vcpu.tlb.evictions, len(vcpu.tlb), vcpu.mmu.root_hpa, vcpu.mmu.root_role)
             for vcpu in vm.vcpus]
    sptes = {name: column.tobytes() for name, column in vm.sptes().items()}
    logs = [vm.get_dirty_log(slot["gpa"], clear=False).tolist() for slot in vm.slots if slot["dirty_log"] and slot["as_id"] == 0]
    spaces = (vm.mem,) if vm.smm_mem is vm.mem else (vm.mem, vm.smm_mem)
    memory = [mem.read(gpa, size) for mem in spaces for gpa, size, _ in mem.slots]
    return {"vcpus": vcpus, "sptes": sptes, "logs": logs, "memory": memory, "slots": vm.slots, "stats": vm.stats,
            "trace": None if vm.trace is None else vm.trace.text(), "audit": vm.audit(True)}


def check_equal(first, second):
    for name, value in first.items():
        assert value == second[name], name


GVA = np.arange(64, dtype=np.uint64) * np.uint64(PAGE) + np.uint64(0x400000)


def machine(host=None, vcpus=1, **options):
    """A machine of 4 MiB with 64 mapped pages."""
    mem = GuestMemory(1 << 22)
    tables = PageTables(mem, "4l")
    for gva in GVA.tolist():
        tables.map(gva, gva - 0x300000)
    vm = Vm(mem, host=Host() if host is None else host, **options)
    for _ in range(vcpus):
        vm.create_vcpu().set_regs(tables.regs())
    return vm
