# SPDX-License-Identifier: Apache-2.0
"""Every public callable that takes integers or flags: how to call it, and what each of them may be."""

import ast
import functools
import importlib
import inspect
import re
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path

import numpy as np
from builders import PageTables
from machines import vcpu_over

import kvmmu
import kvmmu.traces
from kvmmu import (
    Accesses,
    CpuModel,
    CpuRole,
    Ept,
    EptViolation,
    GuestFault,
    GuestMemory,
    Host,
    Intercepts,
    Npt,
    PageFault,
    PageFormat,
    Pml,
    Regs,
    Tlb,
    TlbHierarchy,
    TlbLevel,
    Tracepoints,
    Translation,
    Vcpu,
    Vm,
)
from kvmmu.mmu.core._spte import SpteFormat
from kvmmu.traces import Chunk, Header, Recording, RegisterSet, Stage, bundled
from kvmmu.walk.mapped import Mappings

PAGE = 4096
MB2 = 2 << 20
TOP = 1 << 52
U16, U32, U63, U64 = 0xFFFF, 0xFFFFFFFF, (1 << 63) - 1, (1 << 64) - 1
EPTP = 0x1E


# ---- what is called, and with which arguments ------------------------------------------------------------------------------

def memory():
    mem = GuestMemory(4 * PAGE)
    mem.write(0, bytes(range(256)) * (4 * PAGE // 256))
    return mem


def paging_off(tdp="ept"):
    vcpu = Vcpu(GuestMemory(2 * MB2), tdp=tdp)
    vcpu.set_regs(cr0=1)
    return vcpu


def entered():
    vcpu = paging_off()
    vcpu.vm_enter()
    return vcpu


def walk():
    return paging_off().gva_walk


def nested():
    mem = GuestMemory(64 * PAGE)
    vcpu = Vcpu(mem)
    vcpu.set_regs(cr0=1)
    vcpu.enter_nested(Ept(EPTP | 0x1040, pml=Pml(0x3000)))
    return vcpu


def machine():
    vm = paging_off().vm
    vm.add_slot(1 << 30, 4 * PAGE)
    vm.set_dirty_log(1 << 30)
    return vm


def spte_format():
    return SpteFormat(Host(maxphyaddr=46))


def filled_tlb():
    tlb = Tlb()
    tlb.use(3, 2)
    tlb.fill(0x1000, 0x5000)
    return tlb


def used_hierarchy():
    tlb = TlbHierarchy([TlbLevel("a", 4, 2, "random")])
    tlb.use(3, 2)
    tlb.access([PAGE, 0x5000])
    return tlb


def some_details():
    tlb = TlbHierarchy([], details=True)
    tlb.access([PAGE, 0x5000, 0x9000], ip=[1, 2, 3])
    return tlb.stats().details


def hierarchy_state(tlb):
    """What it holds once it has seen some pages more."""
    tlb.access([0x9000, 0xD000, 0x11000])
    return tlb._core.keys(0).tolist(), tlb.stats().to_dict()


def walk_format():
    return vcpu_over(PageTables("4l")).gva_walk.fmt


GVAS = np.arange(4, dtype=np.uint64)
BITS = np.array([2], np.uint64)
PTE_BITS = {"pte_access": (3, 0, 15), "access": (2, 0, 255)}
FORMAT_FLAGS = {name: True for name in ("nx", "gbpages", "pse", "amd")}
REGISTERS = {"cr0": (1, 0, U64), "cr3": (0, 0, U64), "cr4": (0, 0, U64), "efer": (0, 0, U64)}


class Call:
    """One callable. make() gives it anew, or (its object, it); ints: good value and limits by name; flags: a good value by name;
    others: what it needs besides; state: what of the object shows the effect of a call without a result."""

    def __init__(self, make, ints=(), flags=(), others=(), state=None, arrays=(), optional=()):
        self.make, self.ints, self.flags, self.others = make, dict(ints), dict(flags), others
        self.state, self.arrays, self.optional = state, arrays, optional

    def good(self, made):
        others = self.others(made) if callable(self.others) else dict(self.others)
        return others | {name: value for name, (value, _, _) in self.ints.items()} | self.flags

    def run(self, **changed):
        """What comes of a call with some arguments changed; faults of the guest are results."""
        made = self.make()
        owner, function = made if isinstance(made, tuple) else (made, made)
        arguments = self.good(owner) | changed
        try:
            result = function(**arguments)
        except GuestFault as fault:
            result = (type(fault), str(fault))
        return plain(result), self.state(owner) if self.state else None


def plain(value):
    """A result as something that == compares."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, (Translation, Accesses, kvmmu.Span)):
        return {name: plain(getattr(value, name)) for name in value.__slots__}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, CpuRole):
        return value.word
    if isinstance(value, PageFormat):
        return value.permissions.tolist(), value.rsvd_bits_mask.tolist(), value.bad_mt_xwr
    if isinstance(value, (Chunk, Tracepoints, GuestMemory, Tlb, kvmmu.PageTables)):
        return repr(value.op.tolist() if isinstance(value, Chunk) else value)
    if isinstance(value, Mappings):
        return [list(row) for row in value]
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    return value


def method(make, name):
    def both():
        owner = make()
        return owner, getattr(owner, name)
    return both


def vcpu_state(vcpu):
    return plain(vcpu.regs), vcpu.smm, vcpu.vm.stats, vcpu.tlb.misses


def vm_state(vm):
    return plain(vm.slots), vm.stats, vm.mem.read(0, 2 * PAGE), plain(vm.get_dirty_log(1 << 30, False)) if any(
        slot["dirty_log"] for slot in vm.slots) else None


def tlb_state(tlb):
    return len(tlb), [tlb.lookup(gva) for gva in (0, 0x1000, 0x2000)]


def set_smm(vcpu):
    def call(smm):
        vcpu.smm = smm
    return call


def range_call(name, **others):
    return Call(method(machine, name), {"gpa": (PAGE, 0, TOP - PAGE), "size": (PAGE, PAGE, TOP)}, others=others, state=vm_state)


def invalidated(vm):
    def call(gpa, size):
        with vm.invalidation(gpa, size):
            pass
    return vm, call


def with_slot(mem):
    mem.add_slot(MB2, PAGE)
    return mem


def logged():
    vm = machine()
    vm.set_dirty_log(0)
    return vm


def tables():
    """Page tables that map a page."""
    made = kvmmu.PageTables(GuestMemory(1 << 20))
    made.map(0, 0)
    return made


def tables_state(made):
    return [made.mem.read(frame, PAGE) for frame in made.table_frames]


def vmcs():
    """KVM's VMCS with EPT on: revision, EPTP, controls."""
    mem = GuestMemory(4 * PAGE)
    for offset, value in ((0, 0x11E57ED0), (748, 1 << 31), (804, 1 << 1)):
        mem.write(PAGE + offset, value.to_bytes(4, "little"))
    mem.write_u64(PAGE + 120, EPTP)
    return mem


def vmcb():
    mem = GuestMemory(4 * PAGE)
    mem.write_u64(PAGE + 0x90, 1)                                   # NP_ENABLE
    return mem


@cache
def recorded():
    return Recording.open(bundled())


CALLS = {
    "GuestMemory": Call(lambda: GuestMemory, {"size_or_buffer": (PAGE, PAGE, TOP)}),
    "GuestMemory.from_callbacks": Call(lambda: GuestMemory.from_callbacks, {
        "size": (1 << 20, 0, 1 << 52), "cache_pages": (16, 1, 1 << 32)}, others={"read": bytes}, optional=("size",)),
    "GuestMemory.add_slot": Call(method(memory, "add_slot"), {"gpa": (MB2, 0, TOP - PAGE), "size_or_buffer": (PAGE, PAGE, TOP)},
                                 {"readonly": True}, state=repr),
    "GuestMemory.remove_slot": Call(method(lambda: with_slot(memory()), "remove_slot"), {"gpa": (0, 0, TOP - 1)}, state=repr),
    "GuestMemory.read": Call(method(memory, "read"), {"gpa": (16, 0, TOP - 1), "n": (8, 0, TOP)}),
    "GuestMemory.is_backed": Call(method(memory, "is_backed"), {"gpa": (16, 0, TOP - 1), "n": (8, 0, TOP)}),
    "GuestMemory.write": Call(method(memory, "write"), {"gpa": (16, 0, TOP - 1)}, others={"data": b"new"},
                              state=lambda mem: mem.read(0, 64)),
    "GuestMemory.read_u64": Call(method(memory, "read_u64"), {"gpa": (16, 0, TOP - 8)}),
    "GuestMemory.write_u64": Call(method(memory, "write_u64"), {"gpa": (16, 0, TOP - 8), "value": (5, 0, U64)},
                                  state=lambda mem: mem.read(0, 64)),
    "Accesses.empty": Call(lambda: lambda n: Accesses.empty(n).gpa.size, {"n": (3, 0, 1 << 48)}),
    "Accesses.check": Call(lambda: lambda n: Accesses.empty(3).check(n).gpa.size, {"n": (3, 0, 1 << 48)}),
    "Translation.empty": Call(lambda: lambda n: Translation.empty(n).gpa.size, {"n": (3, 0, 1 << 48)}),
    "CpuModel": Call(lambda: CpuModel, {"maxphyaddr": (40, 32, 52), "c_bit": (47, 32, 51)}, {name: True for name in (
        "gbpages", "pse36", "la57", "nx", "smep", "smap", "pku", "pcid", "lam", "shstk", "pks", "lass", "uai")},
        optional=("c_bit",)),
    "CpuRole": Call(lambda: CpuRole, {"word": (7, 0, U64)}),
    "CpuRole.from_regs": Call(lambda: CpuRole.from_regs, {"cr0": (1, 0, U64), "cr4": (32, 0, U64), "efer": (0, 0, U64)},
                              {"smm": True, "guest_mode": True}),
    "calc_cpu_roles": Call(lambda: kvmmu.calc_cpu_roles, {"cr0": (1, 0, U64), "cr4": (32, 0, U64), "efer": (0, 0, U64)},
                           {"smm": True, "guest_mode": True}, arrays=("cr0", "cr4", "efer")),
    "Ept": Call(lambda: Ept, {"eptp": (EPTP, 0, U64), "spptp": (PAGE, 0, TOP - 1), "ve": (PAGE, 0, TOP - 1)}, {
        name: True for name in ("mbec", "execonly", "advanced_info", "page_2m", "page_1g")}, optional=("page_1g", "spptp", "ve")),
    "Ept.huge_page_level": Call(lambda: Ept(EPTP).huge_page_level, flags={"gbpages": True}),
    "Npt": Call(lambda: Npt, {"ncr3": (64, 0, U64), "cr4": (32, 0, U64), "efer": (0, 0, U64)}, {"gmet": True}),
    "Pml": Call(lambda: Pml, {"address": (PAGE, 0, TOP - 1), "index": (7, 0, U16)}),
    "Intercepts": Call(lambda: Intercepts, {name: (2, 0, U32) for name in ("exception_bitmap", "pfec_mask", "pfec_match")}),
    "Intercepts.wants_page_fault": Call(lambda: Intercepts(1 << 14).wants_page_fault, {"error_code": (2, 0, U32)}),
    "Host": Call(lambda: Host, {"maxphyaddr": (40, 36, 52)}, {name: True for name in (
        "mbec", "ad", "pml", "nx_huge_pages", "eager_split", "l1tf")} | {"gmet": False}),
    "PageFormat.permission_bitmask": Call(lambda: PageFormat.permission_bitmask, flags={name: True for name in (
        "tdp", "ept", "smep", "smap", "wp", "nx")}),
    "PageFormat.pkru_bitmask": Call(lambda: PageFormat.pkru_bitmask, flags={"pke": True, "wp": True, "pks": True}),
    "PageFormat.guest_rsvd_bits": Call(lambda: PageFormat.guest_rsvd_bits, {
        "level": (4, 2, 5), "maxphyaddr": (40, 32, 52), "pse36_bits": (8, 0, 8)}, FORMAT_FLAGS),
    "PageFormat.ept_rsvd_bits": Call(lambda: PageFormat.ept_rsvd_bits, {"maxphyaddr": (40, 32, 52), "huge_page_level": (2, 1, 3)},
                                     {"execonly": True}),
    "PageFormat.is_fault": Call(lambda: walk_format().is_fault, PTE_BITS, arrays=("pte_access", "access")),
    "PageFormat.is_rsvd_bits_set": Call(lambda: walk_format().is_rsvd_bits_set, {"pte": (7, 0, U64), "level": (1, 1, 5)},
                                        arrays=("pte", "level")),
    "PageFormat.permission_fault": Call(lambda: walk_format().permission_fault, PTE_BITS | {
        "pkey": (1, 0, 15), "pkru": (12, 0, U32), "pkrs": (12, 0, U32)}, arrays=("pte_access", "access", "pkey")),
    "PageFormat.rule": Call(lambda: walk_format().rule, PTE_BITS, {"pkey_denied": True, "shadow_stack": True}),
    "PageTables": Call(lambda: kvmmu.PageTables, {"direct_map": (PAGE, 0, U64)}, others=lambda _: {"mem": GuestMemory(1 << 20)}),
    "PageTables.for_addresses": Call(lambda: kvmmu.PageTables.for_addresses, {"gva": (PAGE, 0, U64), "seed": (3, 0, U64)},
                                     others={"mem": None}, arrays=("gva",)),
    "PageTables.map": Call(method(tables, "map"), {"gva": (PAGE, 0, U64), "gpa": (PAGE, 0, TOP - 1), "size": (PAGE, 0, U64),
                                                   "pkey": (3, 0, 15)},
                           {name: True for name in ("write", "user", "exec", "global_", "accessed", "dirty")},
                           state=tables_state, arrays=("gva", "gpa", "size", "pkey")),
    "PageTables.unmap": Call(method(tables, "unmap"), {"gva": (0, 0, U64), "size": (PAGE, 0, U64)}, state=tables_state,
                             arrays=("gva", "size")),
    "PageTables.protect": Call(method(tables, "protect"), {"gva": (0, 0, U64), "size": (PAGE, 0, U64), "pkey": (3, 0, 15)},
                               {name: True for name in ("write", "user", "exec", "global_", "accessed", "dirty")},
                               state=tables_state, arrays=("gva", "size", "pkey"), optional=("pkey", "write", "user", "exec",
                                                                                             "global_", "accessed", "dirty")),
    "Pager": Call(lambda: kvmmu.Pager, {"seed": (3, 0, U64), "maxphyaddr": (40, 32, 52)}),
    "Pager.touch": Call(method(kvmmu.Pager, "touch"), {"gva": (PAGE, 0, U64)}, arrays=("gva",)),
    "PageWalk.inject_page_fault": Call(lambda: nested().ngpa_walk.inject_page_fault, {"from_hardware": (2, 0, U64)}, others={
        "fault": EptViolation("by hand", fault_gpa=PAGE)}, optional=("from_hardware",)),
    "PageWalk.get_pdptr": Call(lambda: walk().get_pdptr, {"i": (2, 0, 3)}),
    "PageWalk.permission_fault": Call(lambda: walk().permission_fault, PTE_BITS | {"pkey": (1, 0, 15)},
                                      arrays=("pte_access", "access", "pkey")),
    "PageWalk.translate": Call(lambda: walk().translate, {"access": (2, 0, 255), "threads": (2, 1, 1024)}, {"set_ad": True},
                               others={"gva": GVAS}, arrays=("access",)),
    "PageWalk.translate_span": Call(lambda: walk().translate_span, {
        "size": (8, 1, 4096), "access": (2, 0, 255), "threads": (2, 1, 1024)}, {"set_ad": True}, others={"gva": GVAS},
        arrays=("access", "size")),
    "PageWalk.gva_to_gpa": Call(lambda: walk().gva_to_gpa, {"gva": (77, 0, U64), "access": (2, 0, 255)}),
    "PageWalk.span": Call(lambda: walk().span, {"gva": (77, 0, U64), "size": (8, 1, 4096), "access": (2, 0, 255)}),
    "TableQueries.mappings": Call(lambda: walk().mappings, {"start": (0, 0, U64), "stop": (1 << 47, 0, 1 << 64),
                                                            "limit": (1 << 20, 1, 1 << 40)}, {"merge": True},
                                   optional=("stop",)),
    "TableQueries.lookup": Call(lambda: walk().lookup, {"gva": (77, 0, U64), "access": (2, 0, 255)}),
    "TableQueries.who_maps": Call(lambda: walk().who_maps, {"gpa": (0, 0, (1 << 52) - 1), "size": (1, 1, 1 << 52)}),
    "PageWalk.walk_record": Call(lambda: walk().walk_record, {"gva": (77, 0, U64), "access": (2, 0, 255)}),
    "Regs": Call(lambda: Regs, REGISTERS | {"pkru": (3, 0, U32), "pkrs": (3, 0, U32), "rflags": (2, 0, U64)}),
    "Tlb.use": Call(method(filled_tlb, "use"), {"space": (3, 0, U64), "pcid": (2, 0, 4095)}, state=tlb_state),
    "Tlb.fill": Call(method(filled_tlb, "fill"), {"gva": (0, 0, U64), "hpa": (64, 0, U64), "level": (2, 1, 3),
                                                  "page_shift": (22, 21, 30)}, {"is_global": True}, state=tlb_state,
                     optional=("page_shift",)),
    "Tlb.lookup": Call(lambda: filled_tlb().lookup, {"gva": (0, 0, U64)}),
    "Tlb.invlpg": Call(method(filled_tlb, "invlpg"), {"gva": (PAGE, 0, U64)}, state=tlb_state),
    "Tlb.invpcid": Call(method(filled_tlb, "invpcid"), {"type": (0, 0, 3), "pcid": (2, 0, 4095), "gva": (PAGE, 0, U64)},
                        state=tlb_state),
    "TlbLevel": Call(lambda: functools.partial(TlbLevel, "a"), {"sets": (3, 1, 1 << 24), "ways": (1, 1, 1 << 24)}),
    "TlbDetails.top_pages": Call(lambda: some_details().top_pages, {"count": (2, 0, 1 << 48)}),
    "TlbDetails.top_ips": Call(lambda: some_details().top_ips, {"count": (2, 0, 1 << 48)}),
    "TlbHierarchy": Call(lambda: lambda **given: hierarchy_state(TlbHierarchy([TlbLevel("a", 1, 2, "random")], **given)),
                         {"seed": (5, 0, U64)}, {"details": True, "curve": True}),
    "TlbHierarchy.page_fault": Call(method(used_hierarchy, "page_fault"), {"gva": (PAGE, 0, U64)}, state=hierarchy_state),
    "TlbHierarchy.use": Call(method(used_hierarchy, "use"), {"space": (3, 0, U64), "pcid": (2, 0, 4095)}, state=hierarchy_state),
    "TlbHierarchy.mov_cr3": Call(method(used_hierarchy, "mov_cr3"), {"pcid": (2, 0, 4095)}, {"keep": True},
                                 state=hierarchy_state),
    "TlbHierarchy.invlpg": Call(method(used_hierarchy, "invlpg"), {"gva": (PAGE, 0, U64)}, state=hierarchy_state),
    "TlbHierarchy.invpcid": Call(method(used_hierarchy, "invpcid"),
                                 {"type": (0, 0, 3), "pcid": (2, 0, 4095), "gva": (PAGE, 0, U64)}, state=hierarchy_state),
    "TlbHierarchy.flush_space": Call(method(used_hierarchy, "flush_space"), {"space": (3, 0, U64)}, state=hierarchy_state),
    "TlbHierarchy.access": Call(method(used_hierarchy, "access"),
                                {"gva": (PAGE, 0, U64), "access": (4, 0, 255), "level": (2, 0, 255), "ip": (0x400000, 0, U64)},
                                {"is_global": True}, state=hierarchy_state, arrays=("gva", "access", "level", "is_global", "ip"),
                                optional=("is_global", "ip")),
    "Tracepoints": Call(lambda: Tracepoints, {"capacity": (8, 1, 1 << 32)}),
    "Vcpu.smm": Call(lambda: set_smm(paging_off()), flags={"smm": True}),
    "Vcpu.set_regs": Call(method(paging_off, "set_regs"), REGISTERS | {"pkru": (3, 0, U32), "pkrs": (3, 0, U32),
                                                                          "rflags": (2, 0, U64)}, state=vcpu_state),
    "Vcpu.mov_cr": Call(method(paging_off, "mov_cr"), {"n": (3, 0, 4), "value": (64, 0, U64)}, state=vcpu_state),
    "Vcpu.wrmsr_efer": Call(method(paging_off, "wrmsr_efer"), {"value": (1, 0, U64)}, state=vcpu_state),
    "Vcpu.wrpkru": Call(method(paging_off, "wrpkru"), {"value": (1, 0, U32)}, state=vcpu_state),
    "Vcpu.wrmsr_pkrs": Call(method(paging_off, "wrmsr_pkrs"), {"value": (1, 0, U64)}, state=vcpu_state),
    "Vcpu.invlpg": Call(method(paging_off, "invlpg"), {"gva": (64, 0, U64)}, state=vcpu_state),
    "Vcpu.invpcid": Call(method(paging_off, "invpcid"), {"type": (2, 0, U64), "pcid": (0, 0, 4095), "gva": (64, 0, U64)},
                         state=vcpu_state),
    "Vcpu.invalidate_addr": Call(method(paging_off, "invalidate_addr"), {"addr": (64, 0, U64)}, state=vcpu_state,
                                 others=lambda vcpu: {"walk": vcpu.gva_walk}),
    "Vcpu.enter_nested": Call(method(paging_off, "enter_nested"), REGISTERS | {"cr0": (1, 0, U64), "pkru": (3, 0, U32)},
                              state=vcpu_state, others={"stage": None}),
    "Vcpu.translate_gpa": Call(method(nested, "translate_gpa"), {
        "gpa": (64, 0, U64), "access": (2, 0, 255), "pte_access": (15, 0, 15)}, others=lambda vcpu: {"walk": vcpu.gva_walk}),
    "Vcpu.inject": Call(method(nested, "inject"), {"from_hardware": (2, 0, U64)}, optional=("from_hardware",), others={
        "fault": EptViolation("by hand", fault_gpa=PAGE)}),
    "Vcpu.access": Call(method(paging_off, "access"), {"gva": (64, 0, U64), "access": (2, 0, 255)}, state=vcpu_state,
                        arrays=("gva", "access")),
    "Vcpu.hw_walk_record": Call(method(entered, "hw_walk_record"),
                                {"gva": (64, 0, U64), "access": (2, 0, 255)}, state=vcpu_state),
    "Vcpu.store": Call(method(paging_off, "store"), {"gva": (64, 0, U64), "access": (0, 0, 255)}, {"page_table_writing": True},
                       state=vcpu_state, others={"data": b"8 bytes."}),
    "Vcpu.write_guest": Call(method(paging_off, "write_guest"), {"gva": (64, 0, U64), "access": (0, 0, 255)}, state=vcpu_state,
                             others={"data": b"8 bytes."}),
    "Vcpu.read_guest": Call(method(paging_off, "read_guest"), {"gva": (64, 0, U64), "n": (8, 0, 1 << 32), "access": (0, 0, 255)},
                            state=vcpu_state),
    "Mmu.page_fault": Call(lambda: paging_off().mmu.page_fault, {"addr": (64, 0, U64), "error_code": (2, 0, U64)}),
    "Vm": Call(lambda: lambda slot_zap_all: Vm(GuestMemory(PAGE), slot_zap_all=slot_zap_all).stats, flags={"slot_zap_all": True}),
    "Vm.audit": Call(lambda: machine().audit, flags={"guest_tables": True}),
    "Vm.add_slot": Call(method(machine, "add_slot"), {"gpa": (MB2 * 2, 0, TOP - PAGE), "size_or_buffer": (PAGE, PAGE, TOP)},
                        {"readonly": True, "dirty_log": True}, state=vm_state),
    "Vm.delete_slot": Call(method(machine, "delete_slot"), {"gpa": (1 << 30, 0, TOP - 1)}, state=vm_state),
    "Vm.move_slot": Call(method(machine, "move_slot"), {"gpa": (0, 0, TOP - 1), "to": (2 * MB2, 0, TOP - PAGE)}, state=vm_state),
    "Vm.write_guest_physical": Call(method(machine, "write_guest_physical"), {"gpa": (64, 0, TOP - 1)}, others={"data": b"new"},
                                    state=vm_state),
    "Vm.host_write": Call(method(machine, "host_write"), {"gpa": (64, 0, TOP - 1)}, others={"data": b"new"}, state=vm_state),
    "Vm.set_nr_mmu_pages": Call(method(machine, "set_nr_mmu_pages"), {"n": (100, 1, U32)}, state=vm_state),
    "Vm.set_dirty_log": Call(method(machine, "set_dirty_log"), {"gpa": (64, 0, TOP - 1)}, {"on": True, "initially_set": True},
                             state=vm_state),
    "Vm.clear_dirty_log": Call(method(logged, "clear_dirty_log"), {"gpa": (PAGE, 0, TOP - PAGE), "size": (PAGE, 0, TOP)},
                               state=vm_state),
    "Vcpu.invept": Call(method(paging_off, "invept"), {"type": (2, 0, U64), "eptp": (EPTP, 0, U64)}, state=vcpu_state),
    "Vcpu.invvpid": Call(method(paging_off, "invvpid"), {
        "type": (1, 0, U64), "vpid": (3, 0, U64), "gva": (64, 0, U64)}, state=vcpu_state),
    "Vm.get_dirty_log": Call(method(machine, "get_dirty_log"), {"gpa": (1 << 30, 0, TOP - 1)}, {"clear": True}),
    "Vm.set_backing": range_call("set_backing", level="4k"),
    "Vm.invalidate": range_call("invalidate"),
    "Vm.invalidation": Call(lambda: invalidated(machine()), {"gpa": (PAGE, 0, TOP - PAGE), "size": (PAGE, PAGE, TOP)},
                            state=vm_state),
    "Vm.age": range_call("age"),
    "Vm.test_age": range_call("test_age"),
    "Vm.recover_nx_huge_pages": Call(method(machine, "recover_nx_huge_pages"), {"ratio": (60, 1, U32)}),
    "Vm.split_huge_pages": range_call("split_huge_pages"),
    "deliver_nested_fault": Call(lambda: kvmmu.deliver_nested_fault, {"from_hardware": (2, 0, U64)}, optional=("from_hardware",),
                                 others={"fault": EptViolation("by hand", fault_gpa=PAGE), "stage": Ept(EPTP)}),
    "deliver_page_fault": Call(lambda: kvmmu.deliver_page_fault, flags={"in_l2": True}, others={
        "fault": PageFault("by hand", address=PAGE), "stage": None}),
    "ept_from_vmcs12": Call(lambda: kvmmu.ept_from_vmcs12, {"vmcs_gpa": (PAGE, 0, TOP - 1)}, others=lambda _: {"mem": vmcs()}),
    "npt_from_vmcb": Call(lambda: kvmmu.npt_from_vmcb, {"vmcb_gpa": (PAGE, 0, TOP - 1), "cr4": (32, 0, U64), "efer": (0, 0, U64)},
                          others=lambda _: {"mem": vmcb()}),
    "regs_from_vmcb": Call(lambda: kvmmu.regs_from_vmcb, {"vmcb_gpa": (PAGE, 0, TOP - 1)}, others=lambda _: {"mem": vmcb()}),
    "Chunk.checked": Call(lambda: Chunk.checked, {"first": (7, 0, U63)}, others=lambda _: {
        "columns": {"op": np.zeros(1, np.uint8), "addr": np.zeros(1, np.uint64), "access": np.zeros(1, np.uint8)},
        "header": Header(registers=(RegisterSet(1, 0, 0, 0),))}),
    "Header": Call(lambda: Header, {"pdpte_clear": (32, 0, U64), "accesses": (5, 0, U63), "rows": (6, 0, U63),
                                            "vcpus": (1, 0, 65536)},
                   others={"registers": (RegisterSet(1, 0, 0, 0),)}, optional=("accesses", "rows")),
    "RegisterSet": Call(lambda: RegisterSet, REGISTERS | {"pkru": (3, 0, U32), "pkrs": (3, 0, U32)}),
    "Stage": Call(lambda: Stage, {"ncr3": (64, 0, U64), "cr4": (32, 0, U64), "efer": (0, 0, U64)}, {"gmet": True},
                  optional=("gmet", "ncr3", "cr4", "efer")),
    "Stage of EPT": Call(lambda: Stage, {"eptp": (EPTP, 0, U64)}, {name: True for name in (
        "mbec", "execonly", "advanced_info", "page_2m", "page_1g")}, optional=(
        "eptp", "mbec", "execonly", "advanced_info", "page_2m", "page_1g")),
    "Recording.columns": Call(lambda: recorded().columns, {"start": (3, -U63, U63), "stop": (5, -U63, U63)}, optional=("stop",)),
    "Recording.access_bytes": Call(lambda: recorded().access_bytes, {"start": (3, -U63, U63), "stop": (5, -U63, U63)},
                                   optional=("stop",)),
    "SpteFormat.tdp_format": Call(lambda: spte_format().tdp_format, {"level": (4, 1, 5)}, {"smep": True}),
    "SpteFormat.shadow_format": Call(lambda: spte_format().shadow_format, {"level": (4, 1, 5)}, {name: True for name in (
        "smep", "nested", "execonly", "gbpages")}),
    "SpteFormat.make_spte": Call(lambda: spte_format().make_spte, {
        "pfn": (5, 0, (1 << 40) - 1), "access": (15, 0, 15), "role": (1, 0, U32)}, {name: True for name in (
            "host_writable", "may_write", "prefetch", "synchronizing")}),
    "SpteFormat.make_nonleaf_spte": Call(lambda: spte_format().make_nonleaf_spte, {"hpa": (PAGE, 0, TOP - PAGE)},
                                         {"ad_disabled": True}),
    "SpteFormat.make_mmio_sptes": Call(lambda: spte_format().make_mmio_sptes, {"access": (7, 0, 15), "gen": (5, 0, U64)},
                                       others={"gfn": BITS}),
    "SpteFormat.permission_fault": Call(lambda: spte_format().permission_fault, {"error_code": (2, 0, U64)}, others={
        "fmt": PageFormat(), "spte": BITS}),
    "SpteFormat.split": Call(lambda: spte_format().split, {"huge": (0x87, 0, U64), "role": (1, 0, U32)}),
    "SpteFormat.make_huge_spte": Call(lambda: spte_format().make_huge_spte, {"small": (7, 0, U64), "level": (2, 2, 3)}),
    "SpteFormat.audit_page": Call(lambda: spte_format().audit_page, {"level": (1, 1, 5), "role": (1, 0, U32)}, others={
        "fmt": PageFormat(), "spte": BITS}),
}
# Records that the package makes and callers read. Faults may be made by hand: deliver_page_fault() and its kin check them.
RECORDS = ("Chunk", "Comparison", "ExceptionInjected", "ExitToL1", "GuestFault", "NestedFault", "Recording", "Report", "SvmExit",
           "TlbDetails", "TlbStats", "TraceEvent", "VmFail", "VmxExit", "WalkRecord", "WalkStep")
ELSEWHERE = {"convert", "ParquetTrace", "replay"}                   # tests of their own, below


# ---- nothing is forgotten --------------------------------------------------------------------------------------------------

def source_of(module):
    """The stub of a compiled module, the source of any other."""
    path = Path(importlib.import_module(module).__file__)
    stub = path.with_name(path.name.split(".")[0] + ".pyi")
    return stub if stub.exists() else path


def definition(thing):
    tree = ast.parse(source_of(thing.__module__).read_text())
    return next(node for node in tree.body if getattr(node, "name", None) == thing.__name__)


def parameters_of(thing):
    """(name of the callable, name of the parameter, annotation) of a public function, or of a class and its public methods."""
    node = definition(thing)
    if isinstance(node, ast.FunctionDef):
        functions = [(thing.__name__, node)]
    else:
        if is_dataclass(thing):
            yield from ((thing.__name__, part.target.id, ast.unparse(part.annotation)) for part in node.body
                        if isinstance(part, ast.AnnAssign))
        functions = [(thing.__name__ if part.name == "__init__" else f"{thing.__name__}.{part.name}", part) for part in node.body
                     if isinstance(part, ast.FunctionDef) and (part.name == "__init__" or not part.name.startswith("_"))]
    for name, function in functions:
        arguments = function.args
        for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
            if argument.annotation is not None:
                yield name, argument.arg, ast.unparse(argument.annotation).strip("'")


def public_things():
    """Classes with their bases, and functions, of the package's public face."""
    for package in (kvmmu, kvmmu.traces):
        for name in package.__all__:
            thing = getattr(package, name)
            if inspect.isclass(thing):
                yield from (base for base in thing.__mro__ if base.__module__.startswith("kvmmu."))
            elif callable(thing):
                yield thing
    yield SpteFormat


def expected_parameters():
    """{(callable, parameter): "int" or "bool"} of everything public."""
    found = {}
    for thing in public_things():
        if issubclass(thing, int) if inspect.isclass(thing) else False:
            continue                                                # enums
        for name, parameter, annotation in parameters_of(thing):
            name = re.sub(r"^VirtualMachine\b", "Vm", name)
            words = set(re.findall(r"\w+", re.sub(r"\w+\[.*\]", "", annotation)))
            if words & {"int", "ArrayLike"} and parameter not in ("gpas",):
                found[name, parameter] = "int"
            elif "bool" in words:
                found[name, parameter] = "bool"
    return {key: kind for key, kind in found.items() if key[0] not in RECORDS and key[0] not in ELSEWHERE}
