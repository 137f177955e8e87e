# SPDX-License-Identifier: Apache-2.0
"""Nothing that a caller does with the machine may crash it, hang it, or leave it half changed."""

import copy
import gc
import importlib
import itertools
import pickle
import weakref

import numpy as np
import pytest
from children import outcome
from internals import damage, memslot, pte_lists

import kvmmu
from kvmmu import Access, CpuModel, Ept, GuestMemory, Host, Npt, PageFault, RetPf, ShadowMmu, TdpMmu, Tlb, Tracepoints, Vcpu, Vm
from kvmmu.walk._vcpu_arch import new_arch
from kvmmu.walk.pagewalk import new_walk

PAGE = 4096
LONG = {"cr0": 0x80010001, "cr3": 0x1000, "cr4": 0x20, "efer": 0xD00}
MODULES = ("memory._lock", "tlb._tlb", "machine._modes", "machine._mmus", "machine._machine", "machine._audit_tlb",
           "mmu.core._spte", "mmu.kvm._memslots", "mmu.kvm._state", "mmu.audit._leaf",
           "mmu.audit._shadow")
ODD = (None, 0, 1, -1, 1 << 63, 1 << 64, -(1 << 70), 0.5, "x", b"\xff" * 9, [], (), {}, True, object())
ODD_ARRAYS = (np.zeros(1, np.uint64), np.zeros(3, np.uint8), np.zeros((2, 2), np.uint64))


def compiled_classes():
    for name in MODULES:
        module = importlib.import_module(f"kvmmu.{name}")
        for value in vars(module).values():
            if isinstance(value, type) and value.__module__ == module.__name__:
                yield value


CLASSES = list(dict.fromkeys(compiled_classes()))


def tables_of(mem, pages=512):
    """4-level tables at 0x1000 that map linear addresses from 0 on to themselves, in pages of 4K."""
    for at, entry in ((0x1000, 0x2067), (0x2000, 0x3067), (0x3000, 0x4067)):
        mem.write_u64(at, entry)
    mem.write(0x4000, ((np.arange(pages, dtype=np.uint64) << np.uint64(12)) | np.uint64(0x67)).tobytes())


def long_mode_vm(host=None, size=1 << 22, **options):
    mem = GuestMemory(size)
    tables_of(mem)
    vm = Vm(mem, host=host, **options)
    vcpu = vm.create_vcpu()
    vcpu.set_regs(**LONG)
    return vm, vcpu


# ---- objects made by hand ------------------------------------------------------------------------------------------------

def try_all(make, name, values):
    """Call a method of fresh objects with every combination of up to two values, and with one value in every place of more."""
    done = 0
    for combination in itertools.chain(
            *(itertools.product(values, repeat=n) for n in range(3)),
            *((((value,) * n) for value in values) for n in range(3, 9))):
        try:
            thing = make()
            member = getattr(thing, name)
            if callable(member):
                member(*combination)
        except Exception:
            pass
        done += 1
    return done


def members(cls):
    skipped = {"__class__", "__init_subclass__", "__subclasshook__", "__getattribute__", "__setattr__", "__delattr__", "__dir__",
               "__reduce_ex__", "__sizeof__", "__format__", "__doc__", "__new__"}
    return [name for name in dir(cls) if name not in skipped and (name not in dir(object) or name in ("__init__", "__repr__"))]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_bare_objects(cls):
    """`__new__` with anything, and every member of what it makes: an exception or a result."""
    makers = []
    for arguments in [(), *((value,) * n for value in (None, 0, 1, -5, [], "x") for n in range(1, 7))]:
        number, text = outcome(lambda arguments=arguments: cls.__new__(cls, *arguments))
        assert number == 0, f"{cls.__name__}.__new__ with {arguments} ended by signal {number}"
        if text.startswith("ok"):
            makers.append(arguments)
    for arguments in makers[:2]:
        for name in members(cls):
            number, _ = outcome(lambda name=name, arguments=arguments: try_all(lambda: cls.__new__(cls, *arguments), name, ODD))
            assert number == 0, f"{cls.__name__}{arguments}.{name} ended by signal {number}"


def live_objects():
    for host in (Host(tdp="ept", pml=True), Host(tdp=None, maxphyaddr=46), Host(tdp="npt", maxphyaddr=46)):
        vm, vcpu = long_mode_vm(host)
        vcpu.access(np.arange(4, dtype=np.uint64) << np.uint64(12), Access.WRITE)
        yield from ((f"{host.tdp} {type(thing).__name__}", thing) for thing in (
            vm.kvm, vcpu._machine(), vcpu.tlb, vcpu.mmu, vcpu.shadow_mmu, vm.kvm.lock))


LIVE = list(live_objects())


@pytest.mark.parametrize(("name", "thing"), LIVE, ids=[name for name, _ in LIVE])
def test_members_of_a_live_machine_take_anything(name, thing):
    """Each member with wrong arguments, in a child: an exception, or a result, never the end of the process."""
    for member in members(type(thing)):
        number, text = outcome(lambda member=member: try_all(lambda: thing, member, ODD + ODD_ARRAYS))
        assert number == 0, f"{name}.{member} ended by signal {number}"
        assert text.startswith("ok"), text


def test_functions_of_the_machine_refuse_none():
    from kvmmu.machine._audit_tlb import audit_tlb
    from kvmmu.mmu.audit._audit import audit
    from kvmmu.mmu.kvm._inspect import clear_stats, pages, set_trace, stats, trace_events
    for function in (audit_tlb, audit, clear_stats, pages, stats, trace_events):
        with pytest.raises(TypeError):
            function(None)
    with pytest.raises(TypeError):
        set_trace(None, 1, 1)


@pytest.mark.parametrize("cls", [TdpMmu, ShadowMmu])
@pytest.mark.parametrize("arguments", [(), (None,), (object(),)])
def test_an_mmu_is_made_by_a_vcpu_alone(cls, arguments):
    with pytest.raises(TypeError, match=f"{cls.__name__} is made by a Vcpu"):
        cls(*arguments)
    with pytest.raises(TypeError, match="is made by a Vcpu"):
        cls.__new__(cls, *arguments)


def test_a_subclass_of_tlb_need_not_call_its_constructor():
    class Mine(Tlb):
        def __init__(self):
            self.n = 0

    assert Mine().lookup(0) is None
    assert Tlb.__new__(Tlb).lookup(0) is None


def test_a_machine_of_a_walk_without_registers_says_so():
    """A Machine by itself, over walks that nobody has given registers: nothing to run."""
    vm, vcpu = long_mode_vm()
    kind = type(vcpu._machine())
    walk = new_walk(vm.mem, new_arch(), lambda regs, second: regs)
    with pytest.raises(RuntimeError, match="no processor model"):
        kind(vm.kvm, 5, Tlb(), walk, vcpu.ngpa_walk)
    walk._set_cpu(CpuModel())
    machine = kind(vm.kvm, 5, Tlb(), walk, vcpu.ngpa_walk)
    for call in (lambda: machine.access_one(0, 0, 0), machine.vm_enter, lambda: machine.emulate(0, 0),
                 lambda: machine.active_mmu().page_fault(0, 0), machine.flush_guest, lambda: machine.invlpg(0)):
        with pytest.raises(RuntimeError, match="not in use"):
            call()
    assert vm.audit() == []
    vcpu.access(0)
    assert vm.audit() == []


def test_a_kept_mmu_follows_the_registers():
    """Registers that changed since `vcpu.mmu` was asked for count for its page_fault()."""
    _, vcpu = long_mode_vm(Host(tdp=None, maxphyaddr=46))
    mmu = vcpu.mmu
    vcpu.set_regs(cr0=1, cr4=0, efer=0, cr3=0)
    with pytest.raises(ValueError, match="32 bits"):
        mmu.page_fault(1 << 32, 0)
    vcpu.set_regs(**LONG)
    assert mmu.page_fault(0x5000, 0) == RetPf.FIXED


def test_a_vcpu_has_the_memory_of_its_machine():
    vm = Vm(GuestMemory(PAGE))
    with pytest.raises(ValueError, match="another memory"):
        Vcpu(GuestMemory(PAGE), vm=vm)
    with pytest.raises(ValueError, match="another tdp"):
        Vcpu(vm.mem, tdp="npt", vm=vm)
    with pytest.raises(TypeError, match="vm: want a Vm, got int"):
        Vcpu(vm.mem, vm=1)
    assert vm.vcpus == []


# ---- sizes ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("geometry", [
    ((1 << 63, 2), (4, 4), (4, 4)), ((1 << 32, 1 << 32), (4, 4), (4, 4)), ((4, 4), (4, 1 << 70), (4, 4)), ((1 << 25, 1),) * 3,
    ((3, 4), (4, 4), (4, 4)), ((0, 4),) * 3, ((4, 0),) * 3, ((-4, 4),) * 3, ((4, 4),) * 2, ((4, 4),) * 4, ((4, 4, 4),) * 3,
    ((4,),) * 3, ((4.0, 4),) * 3, (("4", 4),) * 3, 5, None, "abc"], ids=str)
def test_a_tlb_of_no_possible_shape(geometry):
    """The message says what is allowed."""
    with pytest.raises(ValueError, match="geometry: want (sets a power of two, ways at least 1, and at most 16777216 entries"
                                         "|three pairs of integers)"):
        Tlb(geometry)
    if geometry is not None:                            # which is the default
        with pytest.raises(ValueError, match="geometry: want"):
            Vcpu(GuestMemory(PAGE), tlb=geometry)


def test_the_largest_tlb_and_a_new_shape():
    tlb = Tlb(((1 << 20, 16), (1, 1), (1, 1)))
    tlb.fill(0x123000, 0x5000)
    assert (0x5000, 1) == tlb.lookup(0x123000)
    tlb.__init__(((1, 1), (1, 1), (1, 1)))
    assert tlb.lookup(0x123000) is None
    assert len(tlb) == 0


@pytest.mark.parametrize(("gfn", "npages", "pfn"), [(0, 1 << 41, 0), ((1 << 40) - 1, 2, 0), (512, (1 << 64) - 1, 0), (-1, 1, 0),
                                                    (1 << 64, 1, 0), (0, 1, 1 << 63), (0, 0, 0)])
def test_a_memslot_of_no_possible_size(gfn, npages, pfn):
    with pytest.raises(ValueError, match="want"):
        memslot(gfn, npages, pfn=pfn)


def test_numbers_of_sptes_are_bounded():
    lists = pte_lists(1)
    for sptep in (1 << 62, 1 << 63, (1 << 64) - 1, -1):
        with pytest.raises(ValueError, match="62 bits"):
            lists.add(0, sptep)
        assert not lists.remove(0, sptep)
    assert lists.entries(0) == []


def test_counts_of_a_vm_are_bounded():
    vm, vcpu = long_mode_vm()
    with pytest.raises(ValueError, match="n: want 1 to "):
        vm.set_nr_mmu_pages(1 << 64)
    with pytest.raises((ValueError, MemoryError, OverflowError)):
        vm.trace = Tracepoints(capacity=1 << 80)
    for call in (vm.invalidate, vm.age, vm.test_age, vm.split_huge_pages):
        with pytest.raises(ValueError, match="gpa: want 0 to"):
            call(1 << 63, PAGE)
        with pytest.raises(ValueError, match="size: want 0x1000 to"):
            call(0, 1 << 80)
    with pytest.raises(ValueError, match="gpa: want 0 to"), vm.invalidation(1 << 52, PAGE):
        pass
    with pytest.raises(ValueError, match="gpa: want 0 to"):
        vm.set_backing(1 << 52, PAGE, "4k")
    for gpa in (1 << 52, -PAGE):
        with pytest.raises(ValueError, match="gpa"):
            vm.host_write(gpa, b"12")
        with pytest.raises(ValueError, match="gpa"):
            vm.write_guest_physical(gpa, b"12")
    vcpu.access(0)
    assert vm.audit(True) == []


def test_internal_calls_are_bounded():
    """What a Vm never says: address spaces that are none, pages beyond a slot, ranges beyond memory."""
    kvm = Vm(GuestMemory(1 << 20)).kvm
    for call in (lambda: kvm.set_dirty_log(0, True, as_id=7), lambda: kvm.dirty_log(0, True, as_id=2),
                 lambda: kvm.host_page(0, -1), lambda: kvm.note_write(0, 8, as_id=9), lambda: kvm.track_write(0, 8, as_id=9),
                 lambda: kvm.write_protect_gfn(0, 3)):
        with pytest.raises(ValueError, match="as_id"):
            call()
    with pytest.raises(ValueError, match="dirty: page 256 of a slot of 256"):
        kvm.set_dirty_log(0, True, created=True, dirty=[0, 256])
    kvm.note_write(0, 1 << 52)                          # the slots of it alone
    kvm.track_write(0, 1 << 52)


def test_columns_that_are_too_short_are_refused():
    _, vcpu = long_mode_vm()
    columns = vcpu.access(np.zeros(3, np.uint64)).arrays()
    with pytest.raises(ValueError, match="want 4 rows"):
        vcpu._machine().access(np.zeros(4, np.uint64), 0, columns)


def test_bytes_of_an_access_stay_within_a_page():
    vm, vcpu = long_mode_vm()
    machine = vcpu._machine()
    for call in (lambda data: machine.access_one(0x5FFE, Access.WRITE, 0, data),
                 lambda data: machine.emulate(0x5FFE, Access.WRITE, data)):
        with pytest.raises(ValueError, match="end of a page"):
            call(b"123")
    assert vm.mem.read(0x5FF0, 16) == bytes(16)


# ---- faults beyond the tables ----------------------------------------------------------------------------------------------

WIDTHS = [(Host(tdp="ept"), 48, LONG, 48), (Host(tdp="ept"), 52, LONG, 52), (Host(tdp="npt", maxphyaddr=46), 40, LONG, 48),
          (Host(tdp=None, maxphyaddr=46), 40, {"cr0": 1, "cr3": 0, "cr4": 0, "efer": 0}, 32),
          (Host(tdp=None, maxphyaddr=46), 40, {"cr0": 0x80010001, "cr3": 0x1000, "cr4": 0, "efer": 0}, 32)]


@pytest.mark.parametrize(("host", "guest_bits", "regs", "width"), WIDTHS)
def test_a_fault_beyond_the_width_of_the_tables(host, guest_bits, regs, width):
    """Refused with the width, and the last address below it is taken."""
    mem = GuestMemory(1 << 20)
    tables_of(mem, 256)
    vm = Vm(mem, cpu=CpuModel(maxphyaddr=guest_bits), host=host)
    vcpu = vm.create_vcpu()
    vcpu.set_regs(**regs)
    vcpu.access(0)
    for addr in (1 << width, (1 << 64) - PAGE, (1 << 52) | (1 << width)):
        for code in (0, 2, 0x599F25207, 0x10):
            with pytest.raises(ValueError, match=f"addr: this MMU's tables translate {width} bits"):
                vcpu.mmu.page_fault(addr, code)
    vcpu.mmu.page_fault((1 << width) - PAGE, 0)
    assert vm.audit(True) == []
    mem.add_slot(0x10000000, PAGE)
    vm.move_slot(0, 0x1000000)                          # never ended, once a list of parents was corrupt
    assert vm.audit() == []


def test_a_fault_of_an_address_that_is_not_canonical():
    vm, vcpu = long_mode_vm(Host(tdp=None, maxphyaddr=46))
    with pytest.raises(ValueError, match="0x800000000000 is not canonical for the 48 bits"):
        vcpu.mmu.page_fault(1 << 47, 0)
    vcpu.mmu.page_fault((1 << 64) - PAGE, 0)            # canonical
    assert vm.audit(True) == []


def test_a_nested_fault_beyond_the_width_of_l1s_tables():
    vm, vcpu = long_mode_vm()
    vcpu.enter_nested(Ept(0x1000 | 0x1E))
    with pytest.raises(ValueError, match="translate 48 bits"):
        vcpu.mmu.page_fault(1 << 48, 0)
    vcpu.mmu.page_fault(1 << 47, 0)
    assert vm.audit() == []


def test_an_invalidation_beyond_the_width_of_l1s_tables_does_nothing():
    vm, vcpu = long_mode_vm()
    vcpu.enter_nested(Ept(0x1000 | 0x1E))
    vcpu.vm_enter()
    flushes = vm.stats["tlb_flush"]
    vcpu.invalidate_addr(vcpu.ngpa_walk, 1 << 48)
    vcpu.vm_enter()
    assert flushes == vm.stats["tlb_flush"]
    vcpu.invalidate_addr(vcpu.ngpa_walk, (1 << 48) - PAGE)
    vcpu.vm_enter()
    assert flushes + 1 == vm.stats["tlb_flush"]


@pytest.mark.parametrize("what", ["parent is made up", "rmap has a foreign entry", "rmap has an entry twice", "gfn"])
def test_lists_that_are_wrong_still_end(what):
    """A zap of page tables ends, whatever an earlier fault has done to lists of parents and reverse maps; it counts a bug."""
    def zap():
        vm, vcpu = long_mode_vm(Host(tdp=None, maxphyaddr=46), backing="4k")
        vcpu.access(np.arange(64, dtype=np.uint64) << np.uint64(12))
        pages = vm.sptes()
        leaf = next(i for i, role in enumerate(pages["role"].tolist()) if role & 0xF == 1)
        index = int(np.flatnonzero(pages["sptes"][leaf])[0])
        empty = int(pages["sp"][leaf]) * 512 + 511
        value = {"parent is made up": empty, "gfn": 0x77}.get(what, 0x33)
        damage(vm.kvm, what, int(pages["sp"][leaf]), index, value)
        assert vm.audit() != []
        vm.invalidate(0, 1 << 22)
        vm.zap_all()
        vcpu.access(0)
        return vm.stats["bugs"]

    number, text = outcome(zap)
    assert (number, text) == (0, "ok int")


@pytest.mark.parametrize("tdp", ["ept", "npt"])
def test_a_cr3_beyond_the_tables_of_the_host(tdp):
    """L1's registers wait while the processor model becomes a narrower one: its CR3 is an address without memory then."""
    mem = GuestMemory(1 << 20)
    vm = Vm(mem, cpu=CpuModel(maxphyaddr=52), host=Host(tdp=tdp))
    vcpu = vm.create_vcpu()
    vcpu.set_regs(**LONG | {"cr3": 0xFFFFFFFFFF000})
    vcpu.enter_nested(None, cr3=0x1000)
    vcpu.cpu = CpuModel(maxphyaddr=48)
    vcpu.leave_nested()
    for _ in range(2):
        with pytest.raises(PageFault) as fault:
            vcpu.access(0x1000)
        assert fault.value.error_code == 0
    assert vm.audit() == []


# ---- lifetimes -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("host", [Host(tdp=None, maxphyaddr=46), Host(tdp="ept", pml=True), Host(tdp="npt", maxphyaddr=46)],
                         ids=["shadow", "ept", "npt"])
def test_a_vcpu_that_dies_leaves_its_machine(host):
    """Its roots, its special pages and its log are freed; what it wrote is in the dirty log."""
    vm, vcpu = long_mode_vm(host)
    other = vm.create_vcpu()
    other.set_regs(cr0=1)
    other.access(0x7000)
    vm.set_dirty_log(0)
    vm.zap_all()
    other.access(0x8000)
    before = vm.sptes()["sp"].size
    vcpu.set_regs(**LONG)
    vcpu.access(np.arange(400, dtype=np.uint64) << np.uint64(12), Access.WRITE)
    if host.tdp is not None:
        vcpu.enter_nested(Ept(0x1000 | 0x1E) if host.tdp == "ept" else Npt(0x1000))
        vcpu.access(np.arange(4, dtype=np.uint64) << np.uint64(12))
    died = weakref.ref(vcpu)
    vm.vcpus.remove(vcpu)
    del vcpu
    gc.collect()
    assert died() is None
    junk = [bytearray(b"\xff" * n) for n in range(4000, 60000, 64)]
    assert vm.audit(True) == []
    assert len(junk) == 875
    written = set(vm.get_dirty_log(0).tolist())
    assert set(range(400)) - {1, 2, 3, 4} <= written
    other.access(0x8000)
    vm.zap_all()
    other.access(0x8000)
    assert vm.audit(True) == []
    assert vm.sptes()["sp"].size <= before
    again = vm.create_vcpu()
    assert again.id == 2
    again.set_regs(**LONG)
    again.access(0)
    assert vm.audit(True) == []


def test_all_vcpus_of_a_machine_may_go():
    vm, vcpu = long_mode_vm(Host(tdp=None, maxphyaddr=46))
    vcpu.access(np.arange(400, dtype=np.uint64) << np.uint64(12), Access.USER)
    vm.vcpus.clear()
    del vcpu
    gc.collect()
    assert vm.audit(True) == []
    vm.zap_all()
    assert vm.audit(True) == []
    assert vm.sptes()["sp"].size == 0


def test_an_mmu_outlives_its_vcpu():
    vm, vcpu = long_mode_vm()
    mmu = vcpu.mmu
    vcpu.access(0)
    vm.vcpus.clear()
    del vcpu
    gc.collect()
    assert isinstance(mmu.root_hpa, int)
    assert mmu.page_fault(0x6000, 0) in list(RetPf)
    assert vm.audit() == []


# ---- all or nothing ----------------------------------------------------------------------------------------------------------

def brim_vm():
    """A machine that has not enough physical addresses for one more large slot."""
    vm = Vm(GuestMemory(1 << 20), host=Host(maxphyaddr=36), backing="1g")
    vcpu = vm.create_vcpu()
    vcpu.set_regs(cr0=1)
    vcpu.access(0x1000)
    return vm, vcpu


def test_a_slot_that_cannot_be_backed_is_not_there():
    vm, vcpu = brim_vm()
    before = vm.slots, vm.mem.slots, vm.kvm.generation
    for _ in range(2):
        with pytest.raises(ValueError, match="36 bits of host-physical address are too few"):
            vm.add_slot(1 << 32, 9 << 30, dirty_log=True)
        assert before == (vm.slots, vm.mem.slots, vm.kvm.generation)
    assert vcpu.access(0x2000).hpa == vcpu.access(0x1000).hpa + 0x1000
    vm.add_slot(1 << 32, PAGE)
    assert vm.audit() == []


def test_a_slot_that_cannot_be_backed_in_the_memory_itself():
    """The machine says so until it is taken away again, and keeps what it had."""
    vm, vcpu = brim_vm()
    hpa = vcpu.access(0x1000).hpa
    vm.mem.add_slot(1 << 32, 9 << 30)
    for call in (lambda: vcpu.access(0x2000), lambda: vm.slots, vm.audit, lambda: vm.add_slot(1 << 40, PAGE)):
        with pytest.raises(ValueError, match="slot .0x100000000, 0x340000000.: 36 bits"):
            call()
    vm.mem.remove_slot(1 << 32)
    assert hpa == vcpu.access(0x1000).hpa
    assert vm.audit() == []


def test_a_slot_that_cannot_be_moved_stays():
    vm = Vm(GuestMemory(1 << 20), host=Host(maxphyaddr=40), backing="1g")
    vcpu = vm.create_vcpu()
    vcpu.set_regs(cr0=1)
    vm.add_slot(1 << 30, 1 << 30, dirty_log=True)
    vm.write_guest_physical((1 << 30) + 5 * PAGE, b"abc")
    dirty = vm.get_dirty_log(1 << 30, clear=False).tolist()
    for to in (0, 0x1001, 1 << 60):
        with pytest.raises(ValueError, match="slots overlap|not a multiple|to: want 0 to"):
            vm.move_slot(1 << 30, to)
        assert [0, 1 << 30] == [slot["gpa"] for slot in vm.slots]
    while True:                                         # each move takes new physical addresses
        try:
            vm.move_slot(1 << 30, 1 << 30)
        except ValueError as error:
            assert "too few" in str(error)
            break
        assert dirty == vm.get_dirty_log(1 << 30, clear=False).tolist()
    assert [0, 1 << 30] == [slot[0] for slot in vm.mem.slots]
    assert vm.mem.read((1 << 30) + 5 * PAGE, 3) == b"abc"


def test_writes_beyond_memory_change_nothing():
    vm, vcpu = long_mode_vm()
    vcpu.access(np.arange(4, dtype=np.uint64) << np.uint64(12), Access.WRITE)
    vm.invalidate(0x3FF000, PAGE, "protect")
    pages = [vm.kvm.host_page(gpa) for gpa in (0x3FF000, 0x3FE000)]
    for call in (vm.host_write, vm.write_guest_physical):
        with pytest.raises(ValueError, match="hole"):
            call((1 << 22) - 4, b"12345678")
    assert vm.mem.read((1 << 22) - 4, 4) == bytes(4)
    assert pages == [vm.kvm.host_page(gpa) for gpa in (0x3FF000, 0x3FE000)]


# ---- bytes, copies -----------------------------------------------------------------------------------------------------------

def test_an_int_is_no_data():
    vm, vcpu = long_mode_vm()
    vm.mem.write(0x20000, b"\xff" * 16)
    for call in (vcpu.store, vcpu.write_guest, vm.write_guest_physical, vm.host_write):
        for data in (5, 1 << 40, None, 1.5, "abc", [1, 2]):
            with pytest.raises(TypeError, match="data: want bytes or another object with the buffer protocol, got"):
                call(0x20000, data)
    assert vm.mem.read(0x20000, 16) == b"\xff" * 16


def test_every_buffer_is_data_and_nothing_is_data_too():
    vm, vcpu = long_mode_vm()
    for data in (b"ab", bytearray(b"ab"), memoryview(b"ab"), np.frombuffer(b"ab", np.uint8),
                 np.frombuffer(b"a-b-", np.uint8)[::2]):
        for at, call in enumerate((vcpu.store, vcpu.write_guest, vm.write_guest_physical, vm.host_write)):
            vm.mem.write(0x20000 + 0x100 * at, b"..")
            call(0x20000 + 0x100 * at, data)
            assert vm.mem.read(0x20000 + 0x100 * at, 2) == b"ab"
            call(0x20000 + 0x100 * at, b"")
            assert vm.mem.read(0x20000 + 0x100 * at, 2) == b"ab"
    assert vcpu.read_guest(0x20000, 0x102) == b"ab" + bytes(0xFE) + b"ab"
    with pytest.raises(ValueError, match="n: want 0 to "):
        vcpu.read_guest(0, -1)


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, pickle.dumps], ids=["copy", "deepcopy", "pickle"])
def test_parts_of_a_machine_are_not_copied(how):
    """Half of a copy would be shared with the original."""
    vm, vcpu = long_mode_vm()
    vcpu.access(0)
    for thing in (vm, vcpu, vcpu.tlb, vcpu.tdp_mmu, vcpu.shadow_mmu, vm.kvm, vcpu._machine(), vm.kvm.lock):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            how(thing)


# ---- address spaces and widths ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("tdp", "stage"), [("ept", Ept(0x180000 | 0x1E)), ("npt", Npt(0x180000))])
def test_a_nested_guest_in_smm_stays_in_one_address_space(tdp, stage):
    """L1's second stage and all that it reaches are those of SMM."""
    mem, smm = GuestMemory(0x100000), GuestMemory(0x200000)
    vm = Vm(mem, host=Host(tdp=tdp, maxphyaddr=46), smm_mem=smm)
    vcpu = vm.create_vcpu()
    vcpu.set_regs(cr0=1)
    vcpu.enter_nested(stage, cr0=1)
    vcpu.smm = True
    with pytest.raises(kvmmu.NestedFault):
        vcpu.access(0x1000)                             # the table is there, and empty
    assert vm.audit(True) == []
    flags = 0x7 if tdp == "ept" else 0x67
    for at in (0x180000, 0x181000, 0x182000):
        smm.write_u64(at, (at + 0x1000) | flags)
    smm.write_u64(0x183008, 0x1F0000 | flags | (0x30 if tdp == "ept" else 0))
    result = vcpu.access(0x1000, Access.WRITE)
    assert result.gpa == 0x1F0000
    assert result.hpa // PAGE == next(slot["pfn"] for slot in vm.slots if slot["as_id"] == 1) + 0x1F0
    assert vcpu.ngpa_walk.gva_to_gpa(0x1000) == 0x1F0000
    assert repr(kvmmu.Accesses(result.gpa, result.hpa, 0, 0, 0, 0)) == repr(vcpu.access(0x1000, Access.WRITE))      # a TLB hit
    assert vm.audit(True) == []
    vcpu.smm = False
    with pytest.raises(kvmmu.NestedFault):
        vcpu.access(0x1000)                             # a hole, here
    assert vm.audit(True) == []
    vcpu.smm = True
    assert vcpu.access(0x1000).gpa == 0x1F0000
    vcpu.leave_nested()
    vcpu.smm = False
    vm.zap_all()
    vcpu.access(0)
    assert vm.audit(True) == []
    assert vm.stats["bugs"] == 0


def test_pml_entries_are_of_the_address_space_that_wrote_them():
    vm = Vm(GuestMemory(1 << 20), host=Host(pml=True), smm_mem=GuestMemory(1 << 20), backing="4k")
    vcpu = vm.create_vcpu()
    vcpu.set_regs(cr0=1)
    vcpu.access(0x5000)
    vcpu.smm = True
    vcpu.access(0x6000)
    vcpu.smm = False
    vm.set_dirty_log(0)
    vcpu.access(0x5000, Access.WRITE)                   # logged by the processor, without an exit
    vcpu.smm = True
    vcpu.access(0x6000)
    assert [5] == vm.get_dirty_log(0).tolist()


@pytest.mark.parametrize("tdp", [None, "ept", "npt"])
@pytest.mark.parametrize("l1tf", [False, True])
@pytest.mark.parametrize(("host_bits", "guest_bits"), [(40, 52), (40, 48), (36, 52), (46, 48), (46, 52), (51, 52)])
def test_a_guest_that_is_wider_than_its_host(tdp, l1tf, host_bits, guest_bits):
    """MMIO and memory beyond the host's width: the addresses of the guest's tables, each time."""
    mem = GuestMemory(0x10000)
    top = (1 << guest_bits) - PAGE
    if guest_bits > 47:
        mem.add_slot(1 << 47, PAGE)
    vm = Vm(mem, cpu=CpuModel(maxphyaddr=guest_bits), host=Host(tdp=tdp, maxphyaddr=host_bits, l1tf=l1tf), backing="4k")
    vcpu = vm.create_vcpu()
    mapped = (top, 1 << host_bits, (1 << host_bits) - PAGE, 0x20000, 1 << 47, top - PAGE)
    for at, entry in ((0x1000, 0x2007), (0x2000, 0x3007), (0x3000, 0x4007)):
        mem.write_u64(at, entry)
    for i, gpa in enumerate(mapped):
        mem.write_u64(0x4000 + 8 * i, gpa | 7)
    vcpu.set_regs(**LONG)
    for _ in range(3):
        for i, gpa in enumerate(mapped):
            result = vcpu.access(i * PAGE)
            assert gpa == result.gpa == vcpu.gva_walk.gva_to_gpa(i * PAGE)
            assert (result.hpa == kvmmu.INVALID_GPA) == (gpa != 1 << 47)
    vm.age(0, 0x10000)
    vcpu.invlpg(0)
    assert vm.audit(True) == []
    assert vm.stats["bugs"] == 0
    assert vm.stats["mmio_exits"] >= 12


def test_access_bytes_that_change_under_a_batch_stay_within_the_tables():
    """Bytes that the check has seen may be changed by another thread: bits beyond those of Access are dropped."""
    _, vcpu = long_mode_vm()
    gva = np.zeros(8, np.uint64)
    access = np.zeros(8, np.uint8)

    class Columns(dict):
        def __getitem__(self, name):
            access[:] = 0xFF                            # after the check, before the run
            return super().__getitem__(name)

    columns = kvmmu.Accesses.empty(8)
    vcpu._machine().access(gva, access, Columns(columns.arrays()))
    assert set(columns.status.tolist()) <= {int(status) for status in kvmmu.Status}


def test_many_slots():
    """Work at the first access grows with the number of slots, not with its square: 20,000 within a second, here."""
    n = 20000
    gpas = np.arange(n, dtype=np.uint64) * np.uint64(2 * PAGE)
    vm = Vm(GuestMemory.from_pages(gpas, np.zeros((n, PAGE), np.uint8)), backing="4k")
    vcpu = vm.create_vcpu()
    vcpu.set_regs(cr0=1)
    result = vcpu.access(gpas & np.uint64(0xFFFFFFFF))
    slots = vm.slots
    assert [slot["gpa"] for slot in slots] == gpas.tolist()
    assert result.hpa.tolist() == [slot["pfn"] * PAGE for slot in slots]
    assert vm.kvm.generation == n
    for at in (3, 0, n - 1):
        vm.delete_slot(int(gpas[at]))
        with pytest.raises(ValueError, match="no memory slot"):
            vm.kvm.host_page(int(gpas[at]))
        assert vm.kvm.host_page(int(gpas[at + (1 if at < n - 1 else -1)]))[1] == 1
    assert len(vm.slots) == n - 3


def test_the_sweep_finds_the_classes_of_the_machine():
    assert {"Tlb", "Machine", "Modes", "Mmu", "TdpMmu", "ShadowMmu", "Kvm", "Memslots", "SpteFormat",
            "MachineLock"} <= {cls.__name__ for cls in CLASSES}
