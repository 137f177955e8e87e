"""Registers and second stages as the walks read them: of one vCPU, and of many register sets prepared for batches."""

import numpy as np

from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free

from kvmmu._bits cimport (
    ACC_ALL, ACCESS_USER_MASK, CR4_PKE_MASK, CR4_SMAP_MASK, CR4_SMEP_MASK, EPT_VIOLATION_GVA_VALID_MASK, ROLE_ACCESS_SHIFT,
    ROLE_AD_DISABLED_MASK, ROLE_CR0_WP_MASK, ROLE_CR4_SMEP_MASK, ROLE_DIRECT_MASK, ROLE_EFER_NX_MASK,
    ROLE_EXT_CR4_PKE_MASK, ROLE_EXT_CR4_PSE_MASK, ROLE_EXT_CR4_SMAP_MASK, ROLE_EXT_EXECONLY_MASK, ROLE_EXT_VALID_MASK,
    ROLE_GUEST_MODE_MASK, ROLE_LEVEL_MASK, ROLE_LEVEL_SHIFT, STATUS_OK,
)
from kvmmu._format cimport (
    PageFormat, permission_params, reset_ept_rsvds_bits_mask, reset_guest_rsvds_bits_mask, rsvd_params,
    update_permission_bitmask, update_pkru_bitmask,
)
from kvmmu._memory cimport GuestMemory
from kvmmu._roles cimport calc_cpu_role, kvm_mmu_role_regs
from kvmmu._walk cimport cpu_caps, kvm_pagewalk, translate_nested_gpa, vcpu_arch, walk_result
from kvmmu._walk_init cimport init_ept_pagewalk, init_npt_pagewalk, init_pagewalk, pse36_bits, use_second_stage

from kvmmu.faults import nested_fault_of
from kvmmu.nested import Ept, Npt
from kvmmu.registers import Regs


cdef class VcpuArch:
    def load(self, regs):
        """Take the registers of a `Regs`."""
        load_arch(&self.arch, regs)


cdef int load_arch(vcpu_arch *arch, regs) except -1:
    arch.cr0, arch.cr3, arch.cr4, arch.efer = regs.cr0, regs.cr3, regs.cr4, regs.efer
    arch.pkru, arch.rflags = regs.pkru, regs.rflags
    for i in range(4):
        arch.pdptrs[i] = regs.pdptrs[i] if regs.pdptrs is not None else 0
    return 0


cdef uint64_t role_of(const vcpu_arch *arch, bint smm, bint guest_mode) noexcept:
    cdef kvm_mmu_role_regs regs
    regs.cr0, regs.cr4, regs.efer = arch.cr0, arch.cr4, arch.efer
    return calc_cpu_role(&regs, smm, guest_mode)


cdef void fill_format(PageFormat fmt, uint64_t role, const cpu_caps *caps, bint tdp) noexcept:
    """The format of legacy tables, and the parameters it was made from. IN tdp: they are a second stage (NPT)."""
    cdef permission_params p
    cdef rsvd_params rsvd
    p.tdp = tdp
    p.ept = False
    p.smep = (role & ROLE_CR4_SMEP_MASK) != 0
    p.smap = (role & ROLE_EXT_CR4_SMAP_MASK) != 0
    p.wp = (role & ROLE_CR0_WP_MASK) != 0
    p.nx = (role & ROLE_EFER_NX_MASK) != 0
    fmt.params = p
    update_permission_bitmask(&fmt.fmt, &p)
    update_pkru_bitmask(&fmt.fmt, (role & ROLE_EXT_CR4_PKE_MASK) != 0, p.wp)
    rsvd.level = <int>(role & ROLE_LEVEL_MASK)
    rsvd.maxphyaddr = caps.maxphyaddr
    rsvd.nx = p.nx
    rsvd.gbpages = caps.gbpages
    rsvd.pse = (role & ROLE_EXT_CR4_PSE_MASK) != 0
    rsvd.pse36_bits = pse36_bits(caps)
    rsvd.amd = caps.amd
    reset_guest_rsvds_bits_mask(&fmt.fmt, &rsvd)


# ---- second stages -----------------------------------------------------------------------------------------------------

cdef class SecondStage:
    """A second stage ready to walk. Made by `second_stage()`.

    Attributes
    ----------
    stage : Ept or Npt
    fmt : PageFormat
    """

    def __cinit__(self, stage):
        self.stage = stage
        self.fmt = PageFormat()
        self.tables = []
        self.arch.nested_pgd = stage.root
        self.n.vcpu = &self.arch
        self.n.fmt = &self.fmt.fmt

    @property
    def pml_index(self):
        """Next entry of the page-modification log, counting down; beyond 511: full. None without a log."""
        return int(self.pml.index) if self.n.pml is not NULL else None

    cdef void use_memory(self, GuestMemory mem):
        if not self.tables or self.tables[-1] is not mem.table:
            self.tables.append(mem.table)
            self.n.mem = &mem.table.mem

    def pdpt_gpa(self, GuestMemory mem, uint64_t ngpa):
        """Where the PDPTEs at ngpa lie, for a load of the PDPTE registers.

        EPT: a read without a linear address, by the manuals; KVM takes it for an access to a guest paging structure, as SVM
        does. A fault of the second stage is raised.
        """
        cdef walk_result r
        cdef uint64_t gpa = 0
        cdef bint plain_read = isinstance(self.stage, Ept) and self.n.fault_gpa_mask == ~<uint64_t>0
        cdef unsigned char status
        r.refs = 0
        self.use_memory(mem)
        status = translate_nested_gpa(
            &self.n, ngpa, <unsigned int>(0 if plain_read else self.n.table_access | ACCESS_USER_MASK), False, 0, True, &gpa, &r)
        if status != STATUS_OK:
            if plain_read:
                r.exit_qualification &= ~EPT_VIOLATION_GVA_VALID_MASK
            raise nested_fault_of(
                status, address=None, access=0, level=int(r.level), entry=int(r.pte), entry_gpa=int(r.pte_gpa), rule="",
                fault_gpa=int(r.fault_gpa), exit_qualification=int(r.exit_qualification))
        return int(gpa)


cdef SecondStage second_stage(stage, const cpu_caps *caps):
    """A second stage ready to walk, from an Ept or an Npt."""
    cdef SecondStage second = SecondStage(stage)
    cdef uint64_t role
    if isinstance(stage, Ept):
        role = ept_role(stage)
        fill_ept_format(second.fmt, role, caps, stage.huge_page_level(bool(caps.gbpages)))
        init_ept_pagewalk(&second.n, role, caps, stage.advanced_info)
        if stage.pml is not None:
            second.pml.address, second.pml.index = stage.pml.address, stage.pml.index
            second.n.pml = &second.pml
    else:
        role = npt_role(stage)
        fill_format(second.fmt, role, caps, True)
        init_npt_pagewalk(&second.n, role, caps, (<uint64_t>stage.cr4 & CR4_SMEP_MASK) != 0)
        if not caps.kvm:                    # KVM does not check them
            second.n.pdpte_rsvd_mask = second.fmt.fmt.rsvd_bits_mask[0][2] if second.n.level == 3 else 0
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
    return role


cdef uint64_t npt_role(stage) except? 0:
    """The role of L1's registers with CR0.WP forced, SMAP and PKE off, and GMET in the place of SMEP."""
    cdef kvm_mmu_role_regs regs
    regs.cr0, regs.efer = stage.cr0, stage.efer
    regs.cr4 = <uint64_t>stage.cr4 & ~(CR4_PKE_MASK | CR4_SMAP_MASK)
    role = calc_cpu_role(&regs, False, True) & ~ROLE_CR4_SMEP_MASK
    return role | ROLE_CR4_SMEP_MASK if stage.gmet else role


cdef void fill_ept_format(PageFormat fmt, uint64_t role, const cpu_caps *caps, int huge_page_level) noexcept:
    cdef permission_params p
    p.tdp = p.ept = p.wp = p.nx = True
    p.smep = (role & ROLE_CR4_SMEP_MASK) != 0
    p.smap = False
    fmt.params = p
    update_permission_bitmask(&fmt.fmt, &p)
    fmt.fmt.pkru_mask = 0
    reset_ept_rsvds_bits_mask(&fmt.fmt, caps.maxphyaddr, (role & ROLE_EXT_EXECONLY_MASK) != 0, huge_page_level)


# ---- many register sets ------------------------------------------------------------------------------------------------

cdef class Contexts:
    """Register sets prepared once for many `translate(regs=...)` calls; made by `PageWalk.prepare()`."""

    def __cinit__(self, Py_ssize_t count):
        self.count = count
        self.formats, self.seconds, self.tables = [], [], []
        self.arches = <vcpu_arch *>calloc(max(count, 1), sizeof(vcpu_arch))
        self.walks = <kvm_pagewalk *>calloc(max(count, 1), sizeof(kvm_pagewalk))
        if self.arches is NULL or self.walks is NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.arches)
        free(self.walks)

    def __len__(self):
        return self.count

    cdef void use_memory(self, GuestMemory mem):
        cdef Py_ssize_t i
        cdef SecondStage second
        if self.tables and self.tables[-1] is mem.table:
            return
        self.tables.append(mem.table)
        for i in range(self.count):
            self.walks[i].mem = &mem.table.mem
            second = self.seconds[i]
            if second is not None:
                second.use_memory(mem)

    cdef int reload(self, Py_ssize_t i, legal) except -1:
        """Take the registers of row i again, PDPTEs included; the role must not change."""
        if not 0 <= i < self.count:
            raise ValueError(f"row {i} is beyond the {self.count} register sets")
        load_arch(&self.arches[i], legal)
        if role_of(&self.arches[i], False, self.seconds[i] is not None) != self.walks[i].cpu_role:
            raise ValueError(f"row {i}: the registers make another role; prepare() the sets anew")
        return 0

    cdef object widths(self):
        """Masks of the linear-address width, one per register set."""
        cdef Py_ssize_t i
        return np.array([self.walks[i].gva_mask for i in range(self.count)], np.uint64)


cdef Contexts prepare_contexts(list rows, admit, const cpu_caps *caps, SecondStage second):
    """Check and prepare register sets. Equal roles share a format, equal second stages a walk."""
    cdef Contexts contexts = Contexts(len(rows))
    cdef Py_ssize_t i
    cdef uint64_t role
    cdef PageFormat fmt
    cdef SecondStage under
    formats, admitted, seconds, numbers = {}, {}, {}, {}
    for i, row in enumerate(rows):
        under = second
        regs = row
        if isinstance(row, tuple) and len(row) == 2:
            regs, stage = row
            if stage is not None and not isinstance(stage, (Ept, Npt)):
                raise TypeError(f"regs: row {i} has the second stage {stage!r}, want an Ept, an Npt or None")
            under = seconds.get(stage)
            if under is None and stage is not None:
                under = seconds[stage] = second_stage(stage, caps)
        if not isinstance(regs, Regs):
            raise TypeError(f"regs: row {i} is {row!r}, want a Regs, or (Regs, Ept or Npt or None)")
        legal = admitted.get(row)
        if legal is None:
            try:
                legal = admitted[row] = admit(regs, under)
            except Exception as error:
                error.add_note(f"in row {i} of regs: {row}")
                raise
        load_arch(&contexts.arches[i], legal)
        role = role_of(&contexts.arches[i], False, under is not None)
        fmt = formats.get(role)
        if fmt is None:
            fmt = formats[role] = PageFormat()
            if not role & ROLE_DIRECT_MASK:
                fill_format(fmt, role, caps, False)
            contexts.formats.append(fmt)
        init_pagewalk(&contexts.walks[i], role, caps)
        contexts.walks[i].vcpu = &contexts.arches[i]
        contexts.walks[i].fmt = &fmt.fmt
        use_second_stage(&contexts.walks[i], &under.n if under is not None else NULL,
                         is_npt(under) if under is not None else caps.npt_host)
        contexts.walks[i].second = numbers.setdefault(under, len(numbers))
        contexts.seconds.append(under)
    return contexts
