# SPDX-License-Identifier: Apache-2.0
"""One test, or a few, for each patch of the series that took struct kvm_mmu apart, named after its subject.

The order is that of the series as it was first posted: what a patch leaves behind that one can see from outside. The split into
tdp_mmu and shadow_mmu, which its discussion asked for, has its own rows in test_mmu_split.py.
"""

import numpy as np
import pytest
import shadow_guests as sg
from builders import PageTables
from shadow_guests import DATA, GVA, LEAF, MAP, MB2, OTHER, PAGE, A, D, NestedGuest, P, ShadowGuest, U, W, outcome, touch

import kvmmu
from kvmmu import Access, CpuModel, CpuRole, Ept, GuestMemory, Host, Npt, PageFormat, PageWalk, Status, Vcpu, Vm
from kvmmu.mmu.core._spte import SpteFormat

CR0_WP, CR4_PAE, CR4_SMEP, CR4_SMAP, CR4_PKE = 1 << 16, 1 << 5, 1 << 20, 1 << 21, 1 << 22
PF, FINAL = 1, 1 << 32
FETCH, WRITE, USER = Access.FETCH, Access.WRITE, Access.USER
each_kind = pytest.mark.parametrize("kind", ["ept", "npt"])


def pae_guest(vcpu, root, directory, page):
    """PDPT and directory of a PAE guest whose first 2M are at `page`; returns its registers."""
    vcpu.mem.write_u64(directory, page | 0xE7)
    vcpu.mem.write_u64(root, directory | 1)
    return {"cr0": 0x80000001, "cr3": root, "cr4": CR4_PAE, "efer": 0}


# ---- remove nested_mmu from mmu_is_nested() ----------------------------------------------------------------------------

@pytest.mark.parametrize(("tdp", "stage", "nested"), [
    ("ept", True, True), ("npt", True, True), ("ept", False, False), ("npt", False, False), (None, False, False)])
def test_remove_nested_mmu_from_mmu_is_nested(tdp, stage, nested):
    """True exactly while L2 runs under tables of L1's, and then because guest_mmu is the MMU in use."""
    guest = ShadowGuest(MAP) if tdp is None else NestedGuest(MAP, kind=tdp, enter=False)
    vcpu = guest.vcpu
    assert not vcpu.mmu_is_nested
    if stage:
        guest.enter()
    else:
        vcpu.enter_nested(None, **guest.tables.regs())
    assert (nested, nested) == (vcpu.mmu_is_nested, vcpu.mmu is vcpu.guest_mmu)
    assert (Status.OK, DATA, 0) == outcome(vcpu, GVA)
    vcpu.leave_nested()
    assert (False, True) == (vcpu.mmu_is_nested, vcpu.mmu is vcpu.root_mmu)


# ---- move pdptrs out of the MMU ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("tdp", ["ept", "npt", None])
def test_move_pdptrs_out_of_the_mmu(tdp):
    """One set per vCPU: nested entry loads L2's, exit brings L1's back, and no MMU keeps a copy from before."""
    vm = Vm(GuestMemory(16 * MB2), host=Host(tdp=tdp, maxphyaddr=48), backing="4k")
    vcpu = vm.create_vcpu()
    l1 = pae_guest(vcpu, 0x10000, 0x11000, 2 * MB2)
    l2 = pae_guest(vcpu, 0x20000, 0x21000, 4 * MB2)
    vcpu.set_regs(**l1)
    for _ in range(2):
        assert ((0x11001, 0, 0, 0), 2 * MB2 + 0x123) == (vcpu.pdptrs, int(touch(vcpu, 0x123).gpa[0]))
        vcpu.enter_nested(None, **l2)
        assert ((0x21001, 0, 0, 0), 4 * MB2 + 0x123) == (vcpu.pdptrs, int(touch(vcpu, 0x123).gpa[0]))
        assert 0x21001 == vcpu.gva_walk.get_pdptr(0)
        vcpu.leave_nested()
    for mmu in (vcpu.root_mmu, vcpu.shadow_mmu):
        assert not hasattr(mmu, "pdptrs")


def test_move_pdptrs_out_of_the_mmu_refills_them_through_the_second_stage():
    """L2 in PAE paging: its PDPTEs come from L2's memory, that is through EPT12, at entry."""
    guest = NestedGuest(kind="ept", enter=False, stage_maps=[(0x20000, 0x30000)])
    l2 = pae_guest(guest.vcpu, 0x30000, 0x21000, 0)
    guest.vcpu.enter_nested(Ept(guest.eptp), **{**l2, "cr3": 0x20000})
    assert (0x21001, 0, 0, 0) == guest.vcpu.pdptrs
    assert (Status.OK, 0x123, 0) == outcome(guest.vcpu, 0x123)


# ---- handle_invpcid() only with shadow paging --------------------------------------------------------------------------

def test_handle_invpcid_only_with_shadow_paging():
    """Two-dimensional paging leaves INVPCID to the processor; under shadow paging KVM brings what is unsync up to date."""
    for tdp in ("ept", "npt", None):
        guest = ShadowGuest(MAP, host=Host(tdp=tdp, maxphyaddr=48))
        assert (Status.OK, DATA, 0) == guest.outcome(GVA)
        guest.touch(guest.gva_of(guest.pte(GVA)), access=WRITE)
        guest.write_pte(GVA, OTHER | P | W | U | A | D)
        assert (Status.OK, DATA, 0) == guest.outcome(GVA), "stale until it is flushed"
        changed = guest.changes(lambda vcpu=guest.vcpu: vcpu.invpcid(0, 0, GVA))
        assert bool(changed) == (tdp is None)
        assert changed.get("invlpg", 0) == (tdp is None)
        assert (Status.OK, OTHER, 0) == guest.outcome(GVA)


# ---- hyperv: drop mmu_is_nested() check --------------------------------------------------------------------------------

@pytest.mark.parametrize("tdp", ["ept", "npt", None])
def test_hyperv_drop_mmu_is_nested_check(tdp):
    """Whoever has an address translates it: the identity where there is nothing to translate."""
    guest = ShadowGuest(MAP) if tdp is None else NestedGuest(MAP, kind=tdp, enter=False, stage_maps=[(DATA, OTHER)])
    vcpu = guest.vcpu
    walks = (vcpu.gva_walk, vcpu.ngpa_walk)
    assert [DATA, DATA] == [vcpu.translate_gpa(walk, DATA, WRITE) for walk in walks]
    vcpu.enter_nested(None)
    assert [DATA, DATA] == [vcpu.translate_gpa(walk, DATA, WRITE) for walk in walks]
    if tdp is not None:
        guest.enter()
        assert [OTHER, DATA] == [vcpu.translate_gpa(walk, DATA, WRITE) for walk in walks]
    vcpu.leave_nested()
    assert [1 << 51, 0] == [vcpu.translate_gpa(vcpu.gva_walk, gpa) for gpa in (1 << 51, 0)]


# ---- introduce kvm_pagewalk --------------------------------------------------------------------------------------------

def test_introduce_kvm_pagewalk():
    """A walk is an object of its own: it translates where no MMU was ever made."""
    tables = PageTables("4l")
    tables.map(GVA, DATA)
    vcpu = Vcpu(GuestMemory.from_pages(*tables.pages()))
    vcpu.set_regs(**tables.regs())
    assert isinstance(vcpu.gva_walk, PageWalk)
    assert DATA == vcpu.gva_walk.gva_to_gpa(GVA)
    assert vcpu._made is None


# ---- get_guest_pgd moves to kvm_pagewalk -------------------------------------------------------------------------------

@each_kind
def test_move_get_guest_pgd_to_kvm_pagewalk(kind):
    """CR3 of who runs, EPTP or nested CR3: each walk knows its own, raw."""
    guest = NestedGuest(MAP, kind=kind, enter=False)
    vcpu = guest.vcpu
    assert guest.l1.cr3 == vcpu.gva_walk.get_guest_pgd()
    vcpu.mov_cr(3, guest.l1.cr3 | 0x18)
    assert guest.l1.cr3 | 0x18 == vcpu.gva_walk.get_guest_pgd()
    guest.enter()
    assert guest.tables.cr3 == vcpu.gva_walk.get_guest_pgd()
    assert (guest.eptp if kind == "ept" else guest.stage.cr3) == vcpu.ngpa_walk.get_guest_pgd()
    vcpu.leave_nested()
    assert guest.l1.cr3 | 0x18 == vcpu.gva_walk.get_guest_pgd()


# ---- gva_to_gpa moves to kvm_pagewalk ----------------------------------------------------------------------------------

@each_kind
def test_move_gva_to_gpa_to_kvm_pagewalk(kind):
    """Each walk translates addresses of its kind, and neither asks an MMU, whose tables are empty yet."""
    guest = NestedGuest(MAP, kind=kind, stage_maps=[(DATA, OTHER)])
    assert OTHER == guest.vcpu.gva_walk.gva_to_gpa(GVA, USER)
    assert OTHER == guest.vcpu.ngpa_walk.gva_to_gpa(DATA, USER)
    assert guest.sps() == []


# ---- get_pdptr moves to kvm_pagewalk -----------------------------------------------------------------------------------

def test_move_get_pdptr_to_kvm_pagewalk():
    """Registers for the guest's walk, memory for one of a PAE host's nested tables, and for a guest under them."""
    guest = NestedGuest(kind="npt", enter=False)
    vcpu = guest.vcpu
    host = pae_guest(vcpu, 0x20000, 0x21000, 0)
    vcpu.mem.write_u64(0x22000, MB2 | 0xE7)                     # another directory
    l2 = pae_guest(vcpu, 0x30000, 0x31000, 2 * MB2)
    vcpu.mem.write_u64(0x20008, 0x21001)
    vcpu.enter_nested(Npt(0x20000, cr4=host["cr4"], efer=0), **l2)
    assert [0x31001, 0x21001] == [walk.get_pdptr(0) for walk in (vcpu.gva_walk, vcpu.ngpa_walk)]
    assert 0x123 == vcpu.ngpa_walk.gva_to_gpa(0x123, USER)
    vcpu.mem.write_u64(0x30000, 0x32001)
    assert [0x32001, 0x21001] == [walk.get_pdptr(0) for walk in (vcpu.gva_walk, vcpu.ngpa_walk)]
    vcpu.mem.write_u64(0x20000, 0x22001)
    vcpu.mem.write_u64(MB2 + 0x30000, 0x33001)                  # which is where the PDPT is now
    assert [0x33001, 0x22001] == [walk.get_pdptr(0) for walk in (vcpu.gva_walk, vcpu.ngpa_walk)]
    assert MB2 + 0x123 == vcpu.ngpa_walk.gva_to_gpa(0x123, USER)


# ---- inject_page_fault moves to kvm_pagewalk ---------------------------------------------------------------------------

@each_kind
def test_move_inject_page_fault_to_kvm_pagewalk(kind):
    """Who failed delivers: #PF into L2 from gva_walk, an exit to L1 from ngpa_walk, with bits of the exit at hand."""
    guest = NestedGuest(MAP, (GVA + PAGE, 0x600000, LEAF), kind=kind)       # the second page is beyond the second stage
    vcpu = guest.vcpu
    with pytest.raises(kvmmu.PageFault) as caught:
        vcpu.access(GVA + 2 * PAGE, USER)
    assert kvmmu.ExceptionInjected(U, GVA + 2 * PAGE, "L2") == vcpu.gva_walk.inject_page_fault(caught.value)
    with pytest.raises(kvmmu.EptViolation if kind == "ept" else kvmmu.NestedPageFault) as caught:
        vcpu.access(GVA + PAGE, USER)
    from_hardware = 0x781 if kind == "ept" else FINAL << 1
    exits = [vcpu.ngpa_walk.inject_page_fault(caught.value, hardware) for hardware in (None, from_hardware)]
    if kind == "ept":
        assert all(isinstance(event, kvmmu.VmxExit) and event.guest_physical_address == 0x600000 for event in exits)
        assert exits[0].exit_qualification & 0x180 == 0x180
        assert exits[1].exit_qualification & 0xF80 == 0x780
    else:
        assert all(isinstance(event, kvmmu.SvmExit) and event.exit_info_2 == 0x600000 for event in exits)
        assert [FINAL, 2 * FINAL] == [event.exit_info_1 & 3 * FINAL for event in exits]
    with pytest.raises(TypeError, match="gva_walk delivers"):
        vcpu.gva_walk.inject_page_fault(caught.value)


# ---- CPU-related fields move to kvm_pagewalk ---------------------------------------------------------------------------

@pytest.mark.parametrize("mode", ["32", "pae", "4l", "5l"])
def test_move_cpu_related_fields_to_kvm_pagewalk(mode):
    """The guest's mode is the walk's cpu_role; the MMU's root_role says how the host's tables are."""
    guest = ShadowGuest(MAP, mode=mode)
    levels = {"32": 2, "pae": 3, "4l": 4, "5l": 5}[mode]
    role = CpuRole(guest.vcpu.mmu.root_role)
    assert (levels, mode == "32", mode != "32") == (
        guest.vcpu.gva_walk.cpu_role.level, guest.vcpu.gva_walk.cpu_role.has_4_byte_gpte, guest.vcpu.gva_walk.cpu_role.efer_nx)
    assert (max(levels, 3), mode == "32", True) == (role.level, role.has_4_byte_gpte, role.efer_nx)
    assert not hasattr(guest.vcpu.mmu, "cpu_role")
    assert not hasattr(guest.vcpu.gva_walk, "root_role")


def test_move_cpu_related_fields_to_kvm_pagewalk_leaves_the_roots_of_tdp_alone():
    guest = ShadowGuest(MAP, host=Host(tdp="ept", maxphyaddr=48))
    guest.touch(GVA)
    root, role, cpu_role = guest.vcpu.mmu.root_hpa, guest.vcpu.mmu.root_role, guest.vcpu.gva_walk.cpu_role
    guest.vcpu.mov_cr(0, guest.vcpu.regs.cr0 & ~CR0_WP)
    guest.vcpu.mov_cr(4, guest.vcpu.regs.cr4 | CR4_SMEP)
    guest.touch(GVA)
    assert (root, role) == (guest.vcpu.mmu.root_hpa, guest.vcpu.mmu.root_role)
    assert guest.vcpu.gva_walk.cpu_role != cpu_role


# ---- cpu-role accessors take kvm_pagewalk ------------------------------------------------------------------------------

def test_make_cpu_role_accessors_take_kvm_pagewalk():
    """NPT12 is walked with CR0.WP set, whatever L1's and L2's CR0 say: each walk asks its own role."""
    maps = [(GVA, DATA, "p a d"), (GVA + PAGE, OTHER, LEAF)]
    guest = NestedGuest(*maps, kind="npt", stage_maps=[(OTHER, OTHER, P | U | A | D)], enter=False)
    guest.vcpu.set_regs(cr0=guest.vcpu.regs.cr0 & ~CR0_WP)
    guest.enter(cr0=guest.vcpu.regs.cr0)
    assert (False, True) == tuple(walk.cpu_role.cr0_wp for walk in (guest.vcpu.gva_walk, guest.vcpu.ngpa_walk))
    assert (Status.OK, DATA, 0) == guest.outcome(GVA, WRITE)                    # read-only in L2's tables, WP clear
    assert Status.NESTED_PAGE_FAULT == guest.outcome(GVA + PAGE, WRITE)[0]      # read-only in NPT12


# ---- remaining permission fields move to kvm_pagewalk ------------------------------------------------------------------

def test_move_remaining_permission_fields_to_kvm_pagewalk():
    """permission_fault() takes a walk: SMAP and protection keys are of the guest's, and no matter of nested tables."""
    guest = NestedGuest(MAP, kind="npt", enter=False)
    guest.vcpu.set_regs(cr4=guest.vcpu.regs.cr4 | CR4_SMAP | CR4_PKE, pkru=0xC)
    guest.enter(cr4=guest.vcpu.regs.cr4, pkru=0xC)
    gva_walk, ngpa_walk = guest.vcpu.gva_walk, guest.vcpu.ngpa_walk
    assert [P, 0] == [int(walk.permission_fault(15, 0, 0)) for walk in (gva_walk, ngpa_walk)]
    assert [P | 1 << 5, 0] == [int(walk.permission_fault(15, 1, USER)) for walk in (gva_walk, ngpa_walk)]
    assert [0xDD00, 0] == [walk.fmt.pkru_mask for walk in (gva_walk, ngpa_walk)]
    assert P == int(ngpa_walk.permission_fault(3, 0, USER))


# ---- invalidate_addr() takes kvm_pagewalk ------------------------------------------------------------------------------

@each_kind
def test_make_invalidate_addr_take_kvm_pagewalk(kind):
    """Addressed to gva_walk, an address of L2's tables; to ngpa_walk, one of L1's second stage; each leaves the other alone."""
    guest = NestedGuest(MAP, kind=kind)
    vcpu = guest.vcpu
    assert (Status.OK, DATA, 0) == guest.outcome(GVA, WRITE)
    guest.l1_writes(guest.stage_pte(DATA), OTHER | guest.stage_leaf)
    before = dict(guest.path(DATA))
    vcpu.invalidate_addr(vcpu.gva_walk, GVA, "all")
    vcpu.invalidate_addr(vcpu.gva_walk, DATA, "all")
    assert (Status.OK, DATA, 0) == guest.outcome(GVA)
    assert before == dict(guest.path(DATA))
    vcpu.invalidate_addr(vcpu.ngpa_walk, DATA)
    assert (Status.OK, OTHER, 0) == guest.outcome(GVA)


# ---- walk_mmu becomes a pagewalk ---------------------------------------------------------------------------------------

@each_kind
def test_change_walk_mmu_to_pagewalk(kind):
    """Guest memory by linear address goes through the walk of who runs, both stages of it."""
    guest = NestedGuest((GVA, DATA, LEAF), kind=kind, stage_maps=[(DATA, OTHER)], enter=False)
    vcpu = guest.vcpu
    for gpa, text in ((DATA, b"L1's"), (OTHER, b"L2's")):
        vcpu.mem.write(gpa, text)
    assert b"L1's" == vcpu.read_guest(DATA, 4)
    guest.enter()
    assert b"L2's" == vcpu.read_guest(GVA, 4)
    assert 4 == vcpu.write_guest(GVA, b"mine")
    assert (b"L1's", b"mine") == (vcpu.mem.read(DATA, 4), vcpu.mem.read(OTHER, 4))
    vcpu.leave_nested()
    assert b"L1's" == vcpu.read_guest(DATA, 4)
    assert not hasattr(vcpu, "walk_mmu")


# ---- nested_mmu.w becomes nested_cpu_walk ------------------------------------------------------------------------------

@each_kind
def test_change_nested_mmu_w_to_nested_cpu_walk(kind):
    """L2's own tables need no MMU: nothing shadows them, whatever L2 does with them."""
    guest = NestedGuest(MAP, kind=kind)
    assert not hasattr(guest.vcpu, "nested_mmu")
    guest.touch(GVA, access=WRITE)
    l2_tables = {gpa >> 12 for gpa in guest.tables.tables()}
    l1_tables = {gpa >> 12 for gpa in guest.stage.tables()}
    assert {sp.gfn for sp in guest.sps() if not sp.role.direct} <= l1_tables - l2_tables


# ---- root_gva_walk and ngva_walk are one (first posted as: make cpu_walk a value) --------------------------------------

@each_kind
def test_unify_root_gva_walk_and_ngva_walk(kind):
    """Exactly two walks, and gva_walk is L1's and L2's in turn: initialised anew on each transition that changes its role."""
    guest = NestedGuest(MAP, kind=kind, enter=False)
    vcpu = guest.vcpu
    walks = sorted(name for name in dir(vcpu) if isinstance(getattr(vcpu, name), PageWalk))
    assert ["gva_walk", "ngpa_walk"] == walks
    walk, count = vcpu.gva_walk, vcpu.gva_walk.init_count
    for rounds in range(1, 4):
        guest.enter()
        assert (walk, count + 2 * rounds - 1, True) == (vcpu.gva_walk, walk.init_count, walk.cpu_role.guest_mode)
        assert DATA == walk.gva_to_gpa(GVA)
        vcpu.leave_nested()
        assert (walk, count + 2 * rounds, False) == (vcpu.gva_walk, walk.init_count, walk.cpu_role.guest_mode)
        assert GVA & (MB2 - 1) == walk.gva_to_gpa(GVA & (MB2 - 1))


# ---- kvm_pagewalk is pulled out of kvm_mmu -----------------------------------------------------------------------------

@pytest.mark.parametrize("tdp", ["ept", "npt", None])
def test_pull_kvm_pagewalk_out_of_kvm_mmu(tdp):
    """Walks are the vCPU's; an MMU that shadows has a pointer to the one whose tables it shadows, ever the same."""
    guest = ShadowGuest(MAP) if tdp is None else NestedGuest(MAP, kind=tdp, enter=False)
    vcpu = guest.vcpu
    if tdp is None:
        assert vcpu.root_mmu.w is vcpu.gva_walk
        return
    for _ in range(2):
        assert vcpu.guest_mmu.w is vcpu.ngpa_walk
        guest.enter()
        assert vcpu.mmu.w is vcpu.ngpa_walk
        vcpu.leave_nested()


# ---- clean up the initialisation of shadow MMUs ------------------------------------------------------------------------

@pytest.mark.parametrize(("mode", "controls", "expected"), [
    ("off", {}, {"level": 3, "direct": True, "has_4_byte_gpte": False, "cr0_wp": False}),
    ("32", {}, {"level": 3, "direct": False, "has_4_byte_gpte": True, "cr0_wp": True}),
    ("pae", {}, {"level": 3, "direct": False, "has_4_byte_gpte": False}),
    ("4l", {}, {"level": 4, "cr0_wp": True, "smap_andnot_wp": False}),
    ("4l", {"cr0": CR0_WP, "cr4": CR4_SMAP}, {"level": 4, "cr0_wp": False, "smap_andnot_wp": True}),
    ("4l", {"cr4": CR4_SMEP}, {"level": 4, "cr4_smep": True}),
    ("5l", {}, {"level": 5, "direct": False})])
def test_clean_up_shadow_mmu_init(mode, controls, expected):
    """A shadow root's role is the walk's, with at least three levels and NX of its own."""
    guest = ShadowGuest(MAP, mode="4l" if mode == "off" else mode, load=False)
    regs = {"cr0": 1, "cr3": 0, "cr4": 0, "efer": 0} if mode == "off" else guest.tables.regs()
    guest.vcpu.set_regs(**{name: value ^ controls.get(name, 0) for name, value in regs.items()})
    role = CpuRole(guest.vcpu.mmu.root_role)
    assert expected == {name: getattr(role, name) for name in expected}
    assert (True, 15, False) == (role.efer_nx, role.access, role.guest_mode)
    assert guest.touch(0).status[0] in (Status.OK, Status.PAGE_FAULT)


@pytest.mark.parametrize(("kind", "stage_mode", "maxphyaddr", "expected"), [
    ("ept", "4l", 46, {"level": 4, "passthrough": False}), ("ept", "5l", 46, {"level": 5, "passthrough": False}),
    ("npt", "4l", 46, {"level": 4, "passthrough": False}), ("npt", "4l", 50, {"level": 5, "passthrough": True})])
def test_clean_up_shadow_mmu_init_of_nested_guests(kind, stage_mode, maxphyaddr, expected):
    """Nested EPT has as many levels as L1 says; nested NPT as many as the processor walks."""
    guest = NestedGuest(MAP, kind=kind, stage_mode=stage_mode, cpu=CpuModel(vendor="amd", maxphyaddr=maxphyaddr))
    role = CpuRole(guest.vcpu.mmu.root_role)
    assert expected == {name: getattr(role, name) for name in expected}
    assert (True, False) == (role.guest_mode, role.direct)
    assert (Status.OK, DATA, 0) == guest.outcome(GVA, WRITE)


# ---- kvm_page_format is pulled out -------------------------------------------------------------------------------------

@pytest.mark.parametrize(("host", "mode"), [
    (sg.SHADOW, "32"), (sg.SHADOW, "4l"), (Host(tdp="ept"), "4l"), (Host(tdp="npt"), "pae")])
def test_pull_page_format_to_a_struct(host, mode):
    """The walk's format is that of the guest's entries, the MMU's that of SPTEs: an entry may be fine in one of them."""
    guest = ShadowGuest(MAP, mode=mode, host=host, cpu=CpuModel(maxphyaddr=40))
    walk, mmu = guest.vcpu.gva_walk.fmt, guest.vcpu.mmu.fmt
    assert isinstance(walk, PageFormat)
    assert isinstance(mmu, PageFormat)
    assert walk is not mmu
    assert not mmu.is_rsvd_bits_set(1 << 45 | P, 1)
    assert bool(walk.is_rsvd_bits_set(1 << 45 | P, 1)) == (mode != "32")
    assert bool(mmu.bad_mt_xwr) == (host.tdp == "ept")
    assert not walk.bad_mt_xwr


# ---- rsvd_bits_validate is merged into kvm_page_format -----------------------------------------------------------------

def test_merge_rsvd_bits_validate_into_kvm_page_format():
    """Reserved bits and malformed rights of EPT are of the same object as permissions, for L1's entries and for SPTEs alike."""
    guest = NestedGuest(MAP, kind="ept", execonly=False)
    execute_only = sg.EPT_X | sg.EPT_WB
    for fmt in (guest.vcpu.ngpa_walk.fmt, guest.vcpu.mmu.fmt):
        assert fmt.is_rsvd_bits_set(execute_only, 1)
        assert fmt.is_rsvd_bits_set(sg.EPT_W, 1)
        assert not fmt.is_rsvd_bits_set(sg.EPT_R | sg.EPT_X | sg.EPT_WB, 1)
        assert (16, (2, 5)) == (fmt.permissions.size, fmt.rsvd_bits_mask.shape)
    high = 1 << 47 | sg.EPT_R | sg.EPT_WB
    assert (True, False) == tuple(bool(fmt.is_rsvd_bits_set(high, 1)) for fmt in (guest.vcpu.ngpa_walk.fmt, guest.vcpu.mmu.fmt))
    relaxed = NestedGuest(MAP, kind="ept", execonly=True)
    assert not relaxed.vcpu.ngpa_walk.fmt.is_rsvd_bits_set(execute_only, 1)
    assert not relaxed.vcpu.mmu.fmt.is_rsvd_bits_set(execute_only, 1)


# ---- update_permission_bitmask() takes parameters ----------------------------------------------------------------------

def formats():
    """(name, format in use, the parameters that should have made it)."""
    smep = {"cr4": 1 << 5 | CR4_SMEP}
    shadow, strict = ShadowGuest(MAP), ShadowGuest(MAP, regs={**smep, "efer": 0x500})
    yield "guest", shadow.vcpu.gva_walk.fmt, {"wp": True, "nx": True}
    yield "guest, SMEP, no NX", strict.vcpu.gva_walk.fmt, {"smep": True, "wp": True, "nx": False}
    yield "SPTEs of shadow paging", shadow.vcpu.mmu.fmt, {"wp": True, "nx": True}
    yield "SPTEs of shadow paging, SMEP", strict.vcpu.mmu.fmt, {"smep": True, "wp": True, "nx": True}
    yield "SPTEs of EPT", ShadowGuest(MAP, host=Host(tdp="ept")).vcpu.mmu.fmt, {"tdp": True, "ept": True}
    yield "SPTEs of NPT", ShadowGuest(MAP, host=Host(tdp="npt")).vcpu.mmu.fmt, {"tdp": True}
    yield "SPTEs of NPT, GMET", ShadowGuest(MAP, host=Host(tdp="npt", gmet=True)).vcpu.mmu.fmt, {"tdp": True, "smep": True}
    for special in (False, True):
        nested = NestedGuest(MAP, kind="ept", mbec=special)
        yield f"EPT12, MBEC {special}", nested.vcpu.ngpa_walk.fmt, {"tdp": True, "ept": True, "smep": special}
        yield f"SPTEs of EPT12, MBEC {special}", nested.vcpu.mmu.fmt, {"tdp": True, "ept": True, "smep": special}
        nested = NestedGuest(MAP, kind="npt", gmet=special)
        yield f"NPT12, GMET {special}", nested.vcpu.ngpa_walk.fmt, {"tdp": True, "smep": special}
        yield f"SPTEs of NPT12, GMET {special}", nested.vcpu.mmu.fmt, {"tdp": True, "smep": special}


def test_parameterize_update_permission_bitmask():
    """One function makes every table, of guest entries and of SPTEs, legacy and EPT; the parameters do tell them apart."""
    made = {}
    for name, fmt, parameters in formats():
        np.testing.assert_array_equal(fmt.permissions, PageFormat.permission_bitmask(**parameters), name)
        made[name] = fmt.permissions.tobytes()
    assert 6 == len(set(made.values()))


# ---- kvm_page_format tests SPTEs ---------------------------------------------------------------------------------------

def test_use_kvm_page_format_to_test_sptes():
    """Execution by user and by supervisor apart, and reads of what may only be executed: by the format, not by one bit."""
    spte = SpteFormat(Host(tdp="ept", mbec=True))
    fmt = spte.tdp_format(4, smep=True)
    entries = np.array([rights | 1 << 11 for rights in (sg.EPT_R | sg.EPT_X, sg.EPT_R | sg.EPT_XU, sg.EPT_X)], np.uint64)
    assert [False, True, False] == spte.permission_fault(fmt, entries, int(FETCH)).tolist()
    assert [True, False, True] == spte.permission_fault(fmt, entries, int(FETCH) | U).tolist()
    assert [False, False, True] == spte.permission_fault(fmt, entries, 0).tolist()
    assert spte.permission_fault(fmt, entries, W).all()


def test_use_kvm_page_format_to_test_sptes_lets_no_read_of_execute_only_pages_count_as_spurious():
    guest = NestedGuest((GVA, DATA, LEAF), kind="ept", stage_maps=[(DATA, DATA, sg.EPT_X | sg.EPT_XU | sg.EPT_WB | 3 << 8)])
    assert (Status.OK, DATA, 0) == guest.outcome(GVA, FETCH)
    before = guest.vm.stats["pf_spurious"]
    for _ in range(3):
        assert Status.EPT_VIOLATION == guest.outcome(GVA)[0]
    assert before == guest.vm.stats["pf_spurious"]
    assert (Status.OK, DATA, 0) == guest.outcome(GVA, FETCH)


@pytest.mark.parametrize("smep", [False, True])
def test_use_kvm_page_format_to_test_sptes_passes_the_roots_smep(smep):
    """A supervisor's fetch from a user page: what landed asks root_role.cr4_smep, what was posted first took it for false."""
    guest = ShadowGuest(MAP, regs={"cr4": CR4_PAE | (CR4_SMEP if smep else 0)})
    assert smep == bool(guest.vcpu.mmu.fmt.is_fault(15, FETCH))
    assert (Status.PAGE_FAULT if smep else Status.OK) == guest.outcome(GVA, FETCH)[0]
