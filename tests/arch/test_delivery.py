# SPDX-License-Identifier: Apache-2.0
"""Delivery of translation faults: a #PF to the guest that runs or to L1, and the exits of a second stage.

Sources: SDM vol. 3, "Exit Qualification for EPT Violations", "Information for VM Exits Due to Vectored Events",
"Page-Modification Logging"; APM vol. 2, "Nested versus Guest Page Faults, Fault Ordering".
"""

import itertools
import warnings
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from builders import PageTables

import kvmmu
from kvmmu import (
    Access,
    CpuModel,
    Ept,
    EptMisconfig,
    EptViolation,
    ExceptionInjected,
    GeneralProtection,
    GuestMemory,
    Intercepts,
    NestedPageFault,
    Npt,
    PageFault,
    Pml,
    PmlFull,
    SvmExit,
    Vcpu,
    VmxExit,
    deliver_nested_fault,
    deliver_page_fault,
)

PF = 1 << 14
P, W, U, RSVD, FETCH = (1 << bit for bit in (0, 1, 2, 3, 4))
READ, WRITE, INSTR, GVA_VALID, TRANSLATED, NMI = (1 << bit for bit in (0, 1, 2, 7, 8, 12))
ADVANCED = 7 << 9
FINAL, TABLE = 1 << 32, 1 << 33
PF_INFO = 0x80000B0E                                    # valid, error code, hardware exception, vector 14
EXCEPTION_OR_NMI, EPT_VIOLATION, EPT_MISCONFIG, PML_FULL, PF_EXCEPTION, NPF = 0, 48, 49, 62, 0x4E, 0x400
EPT = Ept(0x1000 | 3 << 3 | 6)
NPT = Npt(0x1000)

# Where things lie: tables of the second stage, tables of the guest, a page of the guest's, the log.
ROOT, GUEST_ROOT, PAGE, HOST_PAGE, LOG = 0x100000, 0x400000, 0x500000, 0x600000, 0x700000
GVA = 0x7000_0000
WB = 6 << 3
EPT_A, EPT_D = 1 << 8, 1 << 9
OFF = {"cr0": 0x11, "cr3": 0, "cr4": 0, "efer": 0}


def page_fault(error_code=P, address=0x1234):
    return PageFault("by hand", address=address, error_code=error_code)


def violation(qualification=0, address=0x7654, **more):
    return EptViolation("by hand", fault_gpa=0x9876, exit_qualification=qualification, address=address, **more)


def nested_page_fault(info):
    return NestedPageFault("by hand", fault_gpa=0x9876, exit_qualification=info, address=0x7654)


def machine(tables, stage, guest=None, **registers):
    """A vCPU that runs L2 under `stage`; `tables` and `guest` are builders' tables, `guest` None is paging off."""
    mem = GuestMemory(1 << 24)
    for table in (tables, guest):
        for gpa, value in {} if table is None else table.words().items():
            mem.write_u64(gpa, value)
    vcpu = Vcpu(mem, cpu=CpuModel(vendor="amd" if isinstance(stage, Npt) else "intel"))
    vcpu.enter_nested(stage, **(OFF if guest is None else guest.regs()), **registers)
    return vcpu


def guest_tables(flags="p w u"):
    guest = PageTables("4l", GUEST_ROOT)
    guest.map(GVA, PAGE, flags)
    return guest


def second_tables(guest, raw=0, page="p w u", table="p w u"):
    """Second-stage tables for the page and, with other rights, the guest's tables; "p w u" is R, W, X to EPT."""
    tables = PageTables("4l", ROOT)
    tables.map(PAGE, HOST_PAGE, page, raw=raw)
    for gpa in guest.tables():
        tables.map(gpa, gpa, table, raw=raw)
    return tables


def ept(root=ROOT, ad=True, **more):
    return Ept(root | 3 << 3 | 6 | ad << 6, **more)


def fault_of(walk, gva, access=0):
    with pytest.raises(kvmmu.GuestFault) as caught:
        walk.gva_to_gpa(gva, access)
    return caught.value


# -- page faults ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("stage", [None, EPT, NPT])
@pytest.mark.parametrize("in_l2", [False, True])
def test_a_page_fault_goes_to_the_guest_that_runs(stage, in_l2):
    event = deliver_page_fault(page_fault(W | U), stage, in_l2)
    assert event == ExceptionInjected(error_code=W | U, cr2=0x1234, into="L2" if in_l2 else "L1", vector=14)


def stages(intercepts):
    return (Ept(EPT.eptp, intercepts=intercepts), EXCEPTION_OR_NMI), (Npt(NPT.ncr3, intercepts=intercepts), PF_EXCEPTION)


@pytest.mark.parametrize("bitmap", [0, PF, ~PF & 0xFFFFFFFF, 0xFFFFFFFF])
def test_intercepts(bitmap):
    """VMX: bit 14, turned over where the masked error code is not the match. SVM: bit 14 alone."""
    masks = (0, P, W, P | W, U | FETCH, 0xFFFF)
    for mask, match, error_code in itertools.product(masks, masks, range(32)):
        intercepts = Intercepts(bitmap, mask, match)
        (vmx, _), (svm, _) = stages(intercepts)
        fault = page_fault(error_code)
        wanted = bitmap in (PF, 0xFFFFFFFF)
        injected = ExceptionInjected(error_code, 0x1234, "L2")
        exits = wanted if error_code & mask == match else not wanted
        vmx_exit = VmxExit(EXCEPTION_OR_NMI, 0x1234, interruption_info=PF_INFO, interruption_error_code=error_code)
        assert deliver_page_fault(fault, vmx, True) == (vmx_exit if exits else injected), intercepts
        svm_exit = SvmExit(PF_EXCEPTION, error_code, 0x1234)
        assert deliver_page_fault(fault, svm, True) == (svm_exit if wanted else injected), intercepts


def test_l1_takes_its_own_page_faults():
    """What L1 intercepts is of L2."""
    for stage, _ in stages(Intercepts(PF)):
        assert deliver_page_fault(page_fault(), stage, False) == ExceptionInjected(P, 0x1234, "L1")


@pytest.mark.parametrize(("vendor", "expected"), [
    ("intel", VmxExit(EXCEPTION_OR_NMI, 0x1234, interruption_info=PF_INFO, interruption_error_code=P)),
    ("amd", SvmExit(PF_EXCEPTION, P, 0x1234))])
def test_without_nested_paging_intercepts_are_given_by_hand(vendor, expected):
    event = deliver_page_fault(page_fault(), None, True, vendor=vendor)
    assert event == ExceptionInjected(P, 0x1234, "L2")
    event = deliver_page_fault(page_fault(), None, True, intercepts=Intercepts(PF), vendor=vendor)
    assert event == expected


# -- EPT ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("fault", "from_hardware", "expected"), [
    (violation(READ | GVA_VALID), None, VmxExit(EPT_VIOLATION, READ | GVA_VALID, 0x9876, 0x7654)),
    (violation(READ), None, VmxExit(EPT_VIOLATION, READ, 0x9876, None)),
    (violation(READ | GVA_VALID | TRANSLATED), 0, VmxExit(EPT_VIOLATION, READ, 0x9876, None)),
    (violation(WRITE), GVA_VALID | READ | 0x78, VmxExit(EPT_VIOLATION, WRITE | GVA_VALID, 0x9876, 0x7654)),
    (violation(READ | GVA_VALID, error_code=P | RSVD), 0xFFFF, VmxExit(EPT_MISCONFIG, 0, 0x9876)),
    (EptMisconfig("by hand", fault_gpa=0x9876, address=1), None, VmxExit(EPT_MISCONFIG, 0, 0x9876)),
    (EptMisconfig("by hand", fault_gpa=0x9876, exit_qualification=7), 0xFFFF, VmxExit(EPT_MISCONFIG, 0, 0x9876)),
    (PmlFull("by hand", fault_gpa=0x9876, exit_qualification=0xFFFF), None, VmxExit(PML_FULL, 0, 0x9876)),
    (PmlFull("by hand", fault_gpa=0x9876, exit_qualification=READ), 0xFFFF, VmxExit(PML_FULL, NMI, 0x9876)),
    (PmlFull("by hand", fault_gpa=0x9876, exit_qualification=NMI), 0xFFFF & ~NMI, VmxExit(PML_FULL, 0, 0x9876))])
def test_exits_of_ept(fault, from_hardware, expected):
    assert deliver_nested_fault(fault, EPT, from_hardware) == expected


@pytest.mark.parametrize("advanced", [False, True])
def test_which_bits_of_a_qualification_come_from_hardware(advanced):
    """Bit by bit, both values on both sides: 7, 8 and 12, and 11:9 where L1 sees them."""
    stage = Ept(EPT.eptp, advanced_info=advanced)
    hardware = {7, 8, 12} | ({9, 10, 11} if advanced else set())
    for bit, ours, theirs in itertools.product(range(64), (0, 1), (0, 1)):
        event = deliver_nested_fault(violation(ours << bit), stage, theirs << bit)
        assert event.exit_qualification == (theirs if bit in hardware else ours) << bit, bit
        event = deliver_nested_fault(violation(ours << bit), stage)
        assert event.exit_qualification == ours << bit


# -- NPT ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ours", [FINAL, TABLE])
@pytest.mark.parametrize("theirs", [None, FINAL, TABLE])
def test_stage_bits(ours, theirs):
    """One of them, from hardware if it is given; the error code is always of the fault."""
    hardware = None if theirs is None else theirs | RSVD | FETCH | 1 << 40
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        event = deliver_nested_fault(nested_page_fault(P | W | U | ours), NPT, hardware)
    assert event == SvmExit(NPF, P | W | U | (ours if theirs is None else theirs), 0x9876)


@pytest.mark.parametrize(("ours", "theirs", "word"), [
    (0, None, "none"), (FINAL | TABLE, None, "both"), (TABLE, 0, "none"), (TABLE, FINAL | TABLE, "both"), (0, P | W, "none")])
def test_not_exactly_one_stage_bit_is_taken_for_the_final_access(ours, theirs, word):
    with pytest.warns(RuntimeWarning, match=word):
        event = deliver_nested_fault(nested_page_fault(P | U | ours), NPT, theirs)
    assert event == SvmExit(NPF, P | U | FINAL, 0x9876)


# -- errors of the caller -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("fault", "stage", "wanted"), [
    (nested_page_fault(FINAL), EPT, "EptViolation or EptMisconfig or PmlFull"), (violation(), NPT, "NestedPageFault"),
    (PmlFull("by hand", fault_gpa=0), NPT, "NestedPageFault"), (page_fault(), EPT, "EptViolation"),
    (GeneralProtection("by hand"), NPT, "NestedPageFault"), (None, EPT, "EptViolation")])
def test_a_stage_has_faults_of_its_own(fault, stage, wanted):
    with pytest.raises(TypeError, match=wanted):
        deliver_nested_fault(fault, stage)


@pytest.mark.parametrize("fault", [violation(), GeneralProtection("by hand", address=1), None])
def test_what_is_no_page_fault(fault):
    with pytest.raises(TypeError, match="want a PageFault"):
        deliver_page_fault(fault, None, False)


def test_other_errors():
    with pytest.raises(ValueError, match="needs an address"):
        deliver_page_fault(page_fault(address=None), None, False)
    with pytest.raises(ValueError, match="no second stage"):
        deliver_nested_fault(violation(), None)
    for value in (-1, 1 << 64):
        with pytest.raises(ValueError, match="from_hardware: want 0 to 0xffffffffffffffff"):
            deliver_nested_fault(violation(), EPT, value)
    with pytest.raises(TypeError, match="from_hardware"):
        deliver_nested_fault(violation(), EPT, "7")
    assert deliver_nested_fault(violation(), EPT, np.uint64(NMI)).exit_qualification == NMI


@pytest.mark.parametrize("event", [ExceptionInjected(0, 0, "L1"), VmxExit(0, 0), SvmExit(0, 0, 0)])
def test_events_are_frozen_data(event):
    with pytest.raises(FrozenInstanceError):
        event.reason = 1
    assert hash(event) == hash(type(event)(**vars(event)))


def test_walks_deliver_their_own_kind():
    """gva_walk a #PF, ngpa_walk a fault of the second stage; inject() chooses."""
    guest = guest_tables()
    vcpu = machine(second_tables(guest, WB), ept(), guest)
    with pytest.raises(TypeError, match="gva_walk delivers a PageFault, got EptViolation"):
        vcpu.gva_walk.inject_page_fault(violation())
    with pytest.raises(TypeError, match="ngpa_walk delivers a NestedFault, got PageFault"):
        vcpu.ngpa_walk.inject_page_fault(page_fault())
    for other in (GeneralProtection("by hand"), None, 14):
        with pytest.raises(TypeError, match=f"PageFault, got {type(other).__name__}"):
            vcpu.inject(other)
    assert vcpu.inject(page_fault()) == vcpu.gva_walk.inject_page_fault(page_fault())
    assert vcpu.inject(violation(), NMI) == vcpu.ngpa_walk.inject_page_fault(violation(), from_hardware=NMI)
    vcpu.leave_nested()
    with pytest.raises(ValueError, match="no second stage"):
        vcpu.inject(violation())


# -- end to end -----------------------------------------------------------------------------------------------------------

def test_a_page_fault_of_l1_sets_cr2():
    vcpu = Vcpu(GuestMemory(1 << 24))
    vcpu.set_regs(**guest_tables().regs())              # tables of zeros
    assert vcpu.cr2 == 0
    event = vcpu.inject(fault_of(vcpu.gva_walk, GVA + 8, Access.WRITE))
    assert (event, vcpu.cr2) == (ExceptionInjected(W, GVA + 8, "L1"), GVA + 8)


@pytest.mark.parametrize("kind", ["ept", "npt", None])
def test_a_page_fault_of_l2(kind):
    """Into L2 without an intercept; to L1 with one, CR2 and the nested guest being left alone."""
    guest = guest_tables("p u")
    for intercepts in (Intercepts(), Intercepts(PF)):
        stage = {"ept": ept(intercepts=intercepts), "npt": Npt(ROOT, intercepts=intercepts), None: None}[kind]
        tables = second_tables(guest, WB if kind == "ept" else 0)
        vcpu = machine(tables, stage, guest)
        vcpu.cr2 = 0x55
        before = vcpu.regs, vcpu.mmu_is_nested

        event = vcpu.inject(fault_of(vcpu.gva_walk, GVA, Access.WRITE | Access.USER))

        code = P | W | U
        if kind is None or not intercepts.exception_bitmap:
            assert (event, vcpu.cr2) == (ExceptionInjected(code, GVA, "L2"), GVA)
        elif kind == "ept":
            assert event == VmxExit(EXCEPTION_OR_NMI, GVA, interruption_info=PF_INFO, interruption_error_code=code)
        else:
            assert event == SvmExit(PF_EXCEPTION, code, GVA)
        assert (vcpu.cr2 == 0x55) == (not isinstance(event, ExceptionInjected))
        assert (vcpu.regs, vcpu.mmu_is_nested) == before


def test_an_ept_violation_of_the_page():
    """A write to a page that the second stage has read-only; the guest's rights are in bits 11:9."""
    guest = guest_tables("p w u nx")
    vcpu = machine(second_tables(guest, WB, page="p"), ept(), guest)
    fault = fault_of(vcpu.gva_walk, GVA + 0x18, Access.WRITE | Access.USER)
    event = vcpu.inject(fault)
    assert event == VmxExit(EPT_VIOLATION, WRITE | 1 << 3 | GVA_VALID | TRANSLATED | ADVANCED, PAGE + 0x18, GVA + 0x18)
    event = vcpu.inject(fault, GVA_VALID | NMI)
    assert event == VmxExit(EPT_VIOLATION, WRITE | 1 << 3 | GVA_VALID | NMI, PAGE + 0x18, GVA + 0x18)
    assert vcpu.mmu_is_nested


def test_an_ept_violation_of_a_guest_table():
    """With EPT A/D bits a table that is read-only to the second stage fails a read as a read and a write of the table."""
    guest = guest_tables()
    vcpu = machine(second_tables(guest, WB, table="p"), ept(), guest)
    event = vcpu.inject(fault_of(vcpu.gva_walk, GVA))
    assert event == VmxExit(EPT_VIOLATION, READ | WRITE | 1 << 3 | GVA_VALID, guest.entry_gpa(GVA, 4), GVA)


def test_an_ept_misconfiguration():
    """Memory type 2."""
    guest = guest_tables()
    tables = second_tables(guest, WB)
    tables.clear_bits(PAGE, 1, 4 << 3)
    vcpu = machine(tables, ept(), guest)
    assert vcpu.inject(fault_of(vcpu.gva_walk, GVA), 0xFFFF) == VmxExit(EPT_MISCONFIG, 0, PAGE)


def test_an_ept_violation_that_is_not_mapped():
    """No right is there, and L2 without paging has every right to any address."""
    vcpu = machine(PageTables("4l", ROOT), ept())
    event = vcpu.inject(fault_of(vcpu.gva_walk, PAGE, Access.FETCH))
    assert event == VmxExit(EPT_VIOLATION, INSTR | GVA_VALID | TRANSLATED | 3 << 9, PAGE, PAGE)


def test_nested_page_faults():
    guest = guest_tables()
    vcpu = machine(second_tables(guest, page="p u"), Npt(ROOT), guest)
    event = vcpu.inject(fault_of(vcpu.gva_walk, GVA + 8, Access.WRITE))
    assert event == SvmExit(NPF, P | W | U | FINAL, PAGE + 8)
    vcpu = machine(second_tables(guest, table="p u"), Npt(ROOT), guest)
    fault = fault_of(vcpu.gva_walk, GVA)
    assert vcpu.inject(fault) == SvmExit(NPF, P | W | U | TABLE, guest.entry_gpa(GVA, 4))
    assert vcpu.inject(fault, FINAL) == SvmExit(NPF, P | W | U | FINAL, guest.entry_gpa(GVA, 4))
    with pytest.warns(RuntimeWarning, match="none"):
        assert vcpu.inject(fault, P) == SvmExit(NPF, P | W | U | FINAL, guest.entry_gpa(GVA, 4))


def test_a_nested_page_fault_with_a_reserved_bit():
    guest = guest_tables()
    tables = second_tables(guest)
    tables.set_bits(PAGE, 1, 1 << 51)
    vcpu = machine(tables, Npt(ROOT), guest)
    assert vcpu.inject(fault_of(vcpu.gva_walk, GVA)) == SvmExit(NPF, P | U | RSVD | FINAL, PAGE)


def test_a_fault_of_the_second_stage_by_itself():
    """translate_gpa() and ngpa_walk fail in ways that are delivered alike."""
    guest = guest_tables()
    vcpu = machine(second_tables(guest, WB, page="p"), ept(), guest)
    with pytest.raises(EptViolation) as caught:
        vcpu.translate_gpa(vcpu.gva_walk, PAGE, Access.WRITE)
    event = vcpu.inject(caught.value)
    assert (event.reason, event.guest_physical_address, event.exit_qualification & 7) == (EPT_VIOLATION, PAGE, WRITE)


# -- page-modification logging --------------------------------------------------------------------------------------------

def logging_machine(index, pages=4):
    """L2 without paging over four pages, and a log with `index` next."""
    tables = PageTables("4l", ROOT)
    for i in range(pages):
        tables.map(PAGE + i * 0x1000, HOST_PAGE + i * 0x1000, raw=WB)
    return machine(tables, ept(pml=Pml(LOG, index))), tables


def test_a_dirty_bit_logs_its_page_and_counts_down():
    vcpu, tables = logging_machine(511)
    for i in (2, 0, 2, 3):                              # the second write to page 2 sets nothing
        vcpu.gva_walk.gva_to_gpa(PAGE + i * 0x1000 + 0x123, Access.WRITE)
    vcpu.gva_walk.gva_to_gpa(PAGE + 0x1000)             # a read
    log = [vcpu.mem.read_u64(LOG + 8 * i) for i in range(511, 507, -1)]
    assert log == [PAGE + 0x2000, PAGE, PAGE + 0x3000, 0]
    entries = [vcpu.mem.read_u64(tables.entry_gpa(PAGE + i * 0x1000, 1)) & (EPT_A | EPT_D) for i in range(4)]
    assert entries == [EPT_A | EPT_D, EPT_A, EPT_A | EPT_D, EPT_A | EPT_D]


def test_a_full_log_exits():
    """After entry 0 the index is 65535: the access does not happen, and it leaves accessed and dirty bits alone."""
    vcpu, tables = logging_machine(1)
    for i in range(2):
        vcpu.gva_walk.gva_to_gpa(PAGE + i * 0x1000, Access.WRITE)
    assert [vcpu.mem.read_u64(LOG + 8 * i) for i in range(2)] == [PAGE + 0x1000, PAGE]
    before = vcpu.mem.read(0, 1 << 24)

    fault = fault_of(vcpu.gva_walk, PAGE + 0x2008, Access.WRITE)

    assert isinstance(fault, PmlFull)
    assert vcpu.inject(fault) == VmxExit(PML_FULL, 0, PAGE + 0x2008)
    assert vcpu.inject(fault, 0xFFFF) == VmxExit(PML_FULL, NMI, PAGE + 0x2008)
    assert vcpu.mem.read(0, 1 << 24) == before
    assert not tables.entry(PAGE + 0x2000, 1) & (EPT_A | EPT_D)
    vcpu.gva_walk.gva_to_gpa(PAGE + 0x2008)             # a read needs no log
    vcpu.gva_walk.gva_to_gpa(PAGE + 0x1000, Access.WRITE)   # nor does a page that is dirty already


def test_a_log_that_is_full_from_the_start():
    """No bit is set at any level, though no level has been accessed before."""
    vcpu, _ = logging_machine(0xFFFF)
    before = vcpu.mem.read(0, 1 << 24)
    assert vcpu.inject(fault_of(vcpu.gva_walk, PAGE, Access.WRITE)).reason == PML_FULL
    assert vcpu.mem.read(0, 1 << 24) == before
