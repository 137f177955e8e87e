"""Second stages ready to walk; see `_second_stage.pxd`."""

from libc.stdint cimport uint64_t

from kvmmu._walk cimport cpu_caps, kvm_pagewalk, translate_nested_gpa, walk_result
from kvmmu.arch._bits cimport (
    ACC_ALL, ACCESS_USER_MASK, CR4_LAM_SUP_MASK, CR4_LASS_MASK, CR4_PKE_MASK, CR4_PKS_MASK, CR4_SMAP_MASK, CR4_SMEP_MASK,
    EFER_UAIE_MASK, EPT_VIOLATION_GVA_VALID_MASK, PG_LEVEL_1G,
    ROLE_ACCESS_SHIFT, ROLE_AD_DISABLED_MASK, ROLE_CR4_SMEP_MASK, ROLE_EXT_EXECONLY_MASK, ROLE_EXT_SHADOW_STACK_MASK,
    ROLE_EXT_VALID_MASK,
    ROLE_GUEST_MODE_MASK, ROLE_LEVEL_SHIFT, STATUS_OK,
)
from kvmmu.arch._format cimport PageFormat
from kvmmu.arch._roles cimport calc_cpu_role, kvm_mmu_role_regs
from kvmmu.memory._maker cimport check_maker, maker
from kvmmu.memory._memory cimport GuestMemory, SlotTable
from kvmmu.walk._setup cimport fill_ept_format, fill_format, init_ept_pagewalk, init_npt_pagewalk

from kvmmu.arch.arguments import check_int
from kvmmu.arch.faults import nested_fault_of
from kvmmu.arch.second_stages import Ept, Npt


cdef class SecondStage:
    """A second stage ready to walk. Made by `second_stage()`.

    Attributes
    ----------
    stage : Ept or Npt
    fmt : PageFormat
    """

    def __cinit__(self, mark=None, stage=None, *args):
        check_maker(mark, "a SecondStage is made by Vcpu.enter_nested()")
        self.stage = stage
        self.fmt = PageFormat()
        self.arch.nested_pgd = stage.root
        self.n.vcpu = &self.arch
        self.n.fmt = &self.fmt.fmt

    @property
    def pml_index(self):
        """Next entry of the page-modification log, counting down; beyond 511: full. None without a log."""
        return int(self.pml.index) if self.n.pml is not NULL else None

    @pml_index.setter
    def pml_index(self, index):
        if index is not None:
            self.pml.index = check_int("index", index, 0, 0xFFFF)

    cdef int use_memory(self, GuestMemory mem) except -1:
        cdef SlotTable table = mem.current()
        if self.table is not table:
            self.table = table
            self.n.mem = &table.mem
        return 0

    def pdpt_gpa(self, GuestMemory mem not None, uint64_t ngpa):
        """Return where the PDPTEs at ngpa lie, for a load of the PDPTE registers.

        EPT: a read without a linear address, by the manuals; KVM takes it for an access to a guest paging structure, as SVM
        does. A fault of the second stage is raised.
        """
        cdef walk_result r
        cdef uint64_t gpa = 0
        cdef bint plain_read = isinstance(self.stage, Ept) and self.n.fault_gpa_mask == ~<uint64_t>0
        cdef unsigned char status
        cdef SlotTable table = mem.walked()
        cdef kvm_pagewalk n = self.n
        n.mem = &table.mem
        r.refs = 0
        status = translate_nested_gpa(
            &n, ngpa, <unsigned int>(0 if plain_read else n.table_access | ACCESS_USER_MASK), False, 0, True, &gpa, &r)
        if status != STATUS_OK:
            if mem.fetch_missing(table):
                return self.pdpt_gpa(mem, ngpa)
            if plain_read:
                r.exit_qualification &= ~EPT_VIOLATION_GVA_VALID_MASK
            raise nested_fault_of(
                status, address=None, access=0, level=int(r.level), entry=int(r.pte), entry_gpa=int(r.pte_gpa), rule="",
                fault_gpa=int(r.fault_gpa), exit_qualification=int(r.exit_qualification))
        return int(gpa)


cdef SecondStage second_stage(stage, const cpu_caps *caps):
    """Return a second stage ready to walk, from an Ept or an Npt."""
    cdef SecondStage second = SecondStage.__new__(SecondStage, maker(), stage)
    cdef uint64_t role
    if isinstance(stage, Ept):
        if caps.kvm and (stage.supervisor_shadow_stack or stage.spptp is not None or stage.ve is not None):
            raise ValueError(f"stage: KVM offers L1 no supervisor shadow-stack control, sub-page permissions and #VE, got "
                             f"{stage}; want conformance 'sdm', or EPTP bit 7 clear, spptp=None and ve=None")
        role = ept_role(stage)
        fill_ept_format(second.fmt, role, caps, stage.huge_page_level(bool(caps.gbpages)))
        init_ept_pagewalk(&second.n, role, caps, stage.advanced_info)
        second.n.sub_pages, second.n.raises_ve = stage.spptp is not None, stage.ve is not None
        second.n.spptp, second.n.ve_area = stage.spptp or 0, stage.ve or 0
        if stage.pml is not None:
            second.pml.address, second.pml.index = stage.pml.address, stage.pml.index
            second.n.pml = &second.pml
    else:
        role = npt_role(stage)
        fill_format(second.fmt, role, caps, True)
        init_npt_pagewalk(&second.n, role, caps, (<uint64_t>stage.cr4 & CR4_SMEP_MASK) != 0)
        if not caps.kvm:                    # KVM does not check them
            second.n.pdpte_rsvd_mask = (
                second.fmt.fmt.rsvd_bits_mask[0][PG_LEVEL_1G - 1] if second.n.level == PG_LEVEL_1G else 0)
    return second


cdef bint is_npt(SecondStage second):
    return second is not None and isinstance(second.stage, Npt)


cdef uint64_t ept_role(stage) except? 0:
    cdef uint64_t role = ROLE_EXT_VALID_MASK | ROLE_GUEST_MODE_MASK | (ACC_ALL << ROLE_ACCESS_SHIFT)
    role |= <uint64_t>stage.level << ROLE_LEVEL_SHIFT
    if not stage.ad:
        role |= ROLE_AD_DISABLED_MASK
    if stage.mbec:
        role |= ROLE_CR4_SMEP_MASK
    if stage.execonly:
        role |= ROLE_EXT_EXECONLY_MASK
    if stage.supervisor_shadow_stack:
        role |= ROLE_EXT_SHADOW_STACK_MASK
    return role


cdef uint64_t npt_role(stage) except? 0:
    """Return the role of L1's registers with CR0.WP forced, GMET in the place of SMEP, and without all that concerns
    linear addresses and protection keys."""
    cdef kvm_mmu_role_regs regs
    regs.cr0, regs.efer = stage.cr0, <uint64_t>stage.efer & ~EFER_UAIE_MASK
    regs.cr4 = <uint64_t>stage.cr4 & ~(CR4_PKE_MASK | CR4_PKS_MASK | CR4_SMAP_MASK | CR4_LASS_MASK | CR4_LAM_SUP_MASK)
    role = calc_cpu_role(&regs, False, True) & ~ROLE_CR4_SMEP_MASK
    return role | ROLE_CR4_SMEP_MASK if stage.gmet else role
