"""Walks, formats and the active MMU from registers, as `_modes.pxd` describes them."""

from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memset

from kvmmu._walk cimport cpu_caps, kvm_pagewalk
from kvmmu.arch._bits cimport (
    CR4_LASS_MASK, CR4_PKE_MASK, CR4_PKS_MASK, EFER_UAIE_MASK, PKRU_SHIFT, GVA_BITS_4_LEVEL, GVA_BITS_5_LEVEL, PML_ENTITY_NUM,
    ROLE_AD_DISABLED_MASK, ROLE_CR0_WP_MASK, ROLE_CR4_SMEP_MASK, ROLE_DIRECT_MASK, ROLE_EFER_NX_MASK, ROLE_EXT_CR4_LA57_MASK,
    ROLE_EXT_CR4_SMAP_MASK, ROLE_EXT_EFER_LMA_MASK, ROLE_EXT_CR4_LAM_SUP_MASK, ROLE_EXT_EXECONLY_MASK, ROLE_EXT_VALID_MASK,
    ROLE_GUEST_MODE_MASK, ROLE_LEVEL_MASK, ROLE_LEVEL_SHIFT, ROLE_SMM_MASK, ROLE_SMM_SHIFT,
)
from kvmmu.arch._format cimport PageFormat
from kvmmu.machine._access cimport cached_gva_to_gpa
from kvmmu.machine._exits cimport machine_drain_pml
from kvmmu.machine._modes cimport Modes
from kvmmu.machine._rights cimport load_rights
from kvmmu.machine._roots cimport machine_prepare_root, machine_use_tags
from kvmmu.machine._state cimport machine, use_arena
from kvmmu.memory._maker cimport check_maker, maker
from kvmmu.memory._memory cimport GuestMemory
from kvmmu.mmu.core._kvm cimport (
    REQ_LOAD_MMU_PGD, add_vcpu, kvm_mmu, kvm_vcpu, return_vcpu, sp_hpa, withdraw_vcpu,
)
from kvmmu.mmu.core._page cimport alloc_page, reserve_pages
from kvmmu.mmu.core._spte cimport init_shadow_format, init_tdp_format
from kvmmu.mmu.kvm._entry cimport free_mmu_roots, tdp_root_role
from kvmmu.mmu.kvm._state cimport Kvm
from kvmmu.mmu.shadow._roots cimport new_pgd, shadow_root_role
from kvmmu.mmu.shadow._shadow cimport nonpaging_page_fault, shadow_page_fault
from kvmmu.mmu.tdp._tdp cimport tdp_page_fault
from kvmmu.tlb._tlb cimport Tlb
from kvmmu.walk._second_stage cimport SecondStage, is_npt, second_stage
from kvmmu.walk._setup cimport (
    fill_ept_format, fill_format, init_ept_pagewalk, init_npt_pagewalk, init_pagewalk, use_second_stage,
)
from kvmmu.walk._vcpu_arch cimport lam_of
from kvmmu.walk.pagewalk cimport PageWalk

from kvmmu.arch.registers import CpuModel
from kvmmu.arch.second_stages import Ept, Npt


cdef Modes new_modes(Kvm kvm, uint32_t vcpu_id, Tlb tlb, PageWalk gva_walk):
    cdef Modes modes = Modes.__new__(Modes, maker())
    modes.kvm, modes.tlb, modes.gva_walk, modes.arch = kvm, tlb, gva_walk, gva_walk.vcpu
    with kvm.lock:
        modes.m.vcpu = add_vcpu(kvm.k, vcpu_id)
        if modes.m.vcpu is NULL:
            raise MemoryError
        Py_INCREF(kvm)
        modes.owner = <PyObject *>kvm
        tlb.lock = kvm.lock
        modes.joined = True
        modes.connect()
        modes.m.stage.epoch = 1
        modes.m.page_table_writing = True
        modes.take_cpu()
    return modes


cdef class Modes:

    def __cinit__(self, mark=None, *args):
        check_maker(mark, "Modes are made by a Machine")
        self.hw_fmt, self.sw_fmt, self.n_fmt = PageFormat(), PageFormat(), PageFormat()
        self.tdp_fmt, self.shadow_fmt = PageFormat(), PageFormat()

    def __dealloc__(self):
        if self.owner is NULL:
            return
        if not self.joined:
            free(self.m.vcpu)
            Py_DECREF(<Kvm>self.owner)
            return
        # Another thread may run the machine now: what the vCPU holds is freed by whoever takes the lock next.
        self.m.vcpu.pml_index = self.m.pml.index
        self.m.vcpu.gone = self.m.k.vcpu_is_gone = True
        Py_DECREF(<Kvm>self.owner)

    def __reduce__(self):
        raise TypeError("Modes cannot be copied or pickled")

    cdef void connect(self) noexcept:
        cdef machine *m = &self.m
        m.vcpu.kvm, m.vcpu.mmu = self.kvm.k, &m.vcpu.root_mmu
        m.vcpu.root_mmu.fmt = &self.shadow_fmt.fmt
        m.vcpu.guest_mmu.fmt = &self.shadow_fmt.fmt
        m.k, m.tlb, m.arena, m.arch = self.kvm.k, &self.tlb.t, &self.kvm.arena_slot, &self.arch.arch
        if m.k.tdp_enabled:
            m.vcpu.root_mmu.fmt = &self.tdp_fmt.fmt
            m.vcpu.root_mmu.page_fault = tdp_page_fault
        m.mmu = &m.vcpu.root_mmu
        m.sw.vcpu = &self.arch.arch
        m.hw.fmt, m.sw.fmt, m.stage.w.fmt = &self.hw_fmt.fmt, &self.sw_fmt.fmt, &self.n_fmt.fmt
        m.stage.w.vcpu = &m.host
        m.data = NULL

    cdef int join(self) except -1:
        if self.joined:
            return 0
        if return_vcpu(self.kvm.k, self.m.vcpu):
            raise MemoryError
        self.joined = True
        self.take_cpu()
        return 0

    cdef void leave(self) noexcept:
        cdef kvm_vcpu *vcpu = self.m.vcpu
        cdef uint32_t number = vcpu.id
        withdraw_vcpu(self.kvm.k, vcpu)
        self.joined = False
        memset(vcpu, 0, sizeof(kvm_vcpu))
        memset(&self.m, 0, sizeof(machine))
        vcpu.id = number
        self.m.vcpu = vcpu
        self.connect()
        self.m.stage.epoch = 1
        self.m.page_table_writing = True
        self.cpu_role = self.rights_role = self.loads = 0
        self.taken = self.second = self.walked = None
        self.mem = self.table = self.stage = None

    # ---- registers, roles and walks ------------------------------------------------------------------------------------

    cdef int take_cpu(self) except -1:
        cpu = self.gva_walk.cpu
        if not isinstance(cpu, CpuModel):
            raise RuntimeError("the walk of this vCPU has no processor model")
        set_caps(&self.cpu_caps, cpu, False)
        set_caps(&self.kvm_caps, cpu, True)
        self.m.vcpu.maxphyaddr = cpu.maxphyaddr
        self.widest_shift = 64 - (GVA_BITS_5_LEVEL if cpu.la57 else GVA_BITS_4_LEVEL)
        self.m.hw.cpu_role = self.m.sw.cpu_role = self.rights_role = self.cpu_role = 0
        self.stage = None
        free_mmu_roots(self.m.vcpu, &self.m.vcpu.root_mmu)
        free_mmu_roots(self.m.vcpu, &self.m.vcpu.guest_mmu)
        self.m.vcpu.root_mmu.root_role = self.m.vcpu.guest_mmu.root_role = 0
        host = self.kvm.host
        self.cpu_caps.npt_host = self.kvm_caps.npt_host = host.tdp == "npt"
        self.host_caps.maxphyaddr = host.maxphyaddr
        self.host_caps.gbpages = host.max_huge_page_level >= 3
        self.host_caps.amd = host.tdp != "ept"
        self.host_caps.kvm = self.host_caps.pse36 = False
        return 0

    cdef int update(self) except -1:
        cdef PageWalk walk = self.gva_walk
        if not self.cpu_role or walk.w.cpu_role != self.cpu_role or self.arch.loads != self.loads or (
                walk.second is not self.taken or walk.mem is not self.mem or self.mem.number != self.table.number):
            walk.check_in_use()
            self.join()
            self.cpu_role = 0                           # nothing is taken, should one of them be refused
            self.take_registers(walk.w.cpu_role, walk.mem, walk.second)
            self.cpu_role, self.loads = walk.w.cpu_role, self.arch.loads
            self.taken, self.mem = walk.second, walk.mem
        machine_use_tags(&self.m)                       # the root may be another one, and so may the space of the TLB
        return 0

    cdef int check_offered(self) except -1:
        cdef uint64_t cr4 = self.arch.arch.cr4 & (CR4_PKS_MASK | CR4_LASS_MASK)
        if cr4:
            raise ValueError(f"cr4 {self.arch.arch.cr4:#x}: KVM offers no guest PKS and LASS; want {cr4:#x} clear")
        if self.arch.arch.efer & EFER_UAIE_MASK:
            raise ValueError(f"efer {self.arch.arch.efer:#x}: KVM offers no guest upper address ignore; want UAIE clear")
        if self.gva_walk.caps.encryption_mask:
            raise ValueError(f"c_bit {self.gva_walk.cpu.c_bit}: the machine has no memory encryption; want None")
        return 0

    cdef void take_linear_rules(self, uint64_t role) noexcept:
        """Take the rules of LAM. Tags are gone before an access looks into the TLB, so that no walk of the machine sees one."""
        cdef kvm_pagewalk w
        init_pagewalk(&w, role, lam_of(&self.arch.arch), &self.cpu_caps)
        self.m.pre_processes, self.m.linear = w.pre_processes, w.linear

    cdef int take_registers(self, uint64_t role, GuestMemory mem, SecondStage second) except -1:
        """Take the role of the registers, the memory and L1's second stage; no work for those that did not change."""
        cdef bint smm = (role & ROLE_SMM_MASK) != 0, guest_mode = (role & ROLE_GUEST_MODE_MASK) != 0
        self.check_offered()
        self.take_linear_rules(role)
        if self.table is not mem.current():
            self.table = mem.current()
            self.m.sw.mem = &self.table.mem
        role &= ~<uint64_t>ROLE_EXT_CR4_LAM_SUP_MASK
        if role != self.m.sw.cpu_role:
            init_pagewalk(&self.m.sw, role, 0, &self.kvm_caps)
            if not role & ROLE_DIRECT_MASK:
                fill_format(self.sw_fmt, role, &self.kvm_caps, False)
        use_second_stage(&self.m.sw, NULL, self.kvm_caps.npt_host)
        if self.m.vcpu.as_id != smm:
            machine_drain_pml(&self.m)                  # logged addresses are of the address space in force
        self.m.vcpu.as_id, self.m.vcpu.guest_mode = smm, guest_mode
        if not self.kvm.k.tdp_enabled:
            self.use_shadow_paging(role)
        elif second is None:
            self.use_tdp(role, smm, guest_mode)
        else:
            self.use_nested(role, mem, smm, second)
        role = self.m.hw.cpu_role
        if role != self.rights_role or self.m.mmu.root_role != self.rights_root or self.arch.arch.keys != self.rights_keys:
            self.rights_role, self.rights_root, self.rights_keys = role, self.m.mmu.root_role, self.arch.arch.keys
            load_rights(&self.m.rights, &self.m.hw, &self.m.stage.w)
        return 0

    cdef int enter(self) except -1:
        self.update()
        self.kvm.sync()
        if self.kvm.k.spte.pml and self.m.vcpu.pml_page == 0:
            if reserve_pages(self.kvm.k, 1):
                raise MemoryError
            self.m.vcpu.pml_page = alloc_page(self.kvm.k, 0, 0)
            self.m.pml.index = PML_ENTITY_NUM - 1
        if self.m.vcpu.pml_page:
            self.m.pml.address = sp_hpa(self.kvm.k, self.m.vcpu.pml_page)
            # the log would hold L2's addresses
            self.m.stage.w.pml = &self.m.pml if self.m.mmu == &self.m.vcpu.root_mmu else NULL
        use_arena(&self.m)
        if self.m.vcpu.requests or not self.m.mmu.root.valid:
            if machine_prepare_root(&self.m):
                raise MemoryError
        return 0

    cdef int use_mmu(self, kvm_mmu *mmu) except -1:
        """Make an MMU the active one; translations of the other one's roots have other tags in the TLB."""
        if self.m.mmu != mmu:
            self.m.mmu = self.m.vcpu.mmu = mmu
            self.m.root_hpa = 0
            self.m.vcpu.mmio_gva = 0
            self.m.vcpu.requests |= REQ_LOAD_MMU_PGD
            self.rights_role = 0
        return 0

    cdef int use_guest_walk(self, uint64_t role, bint npt) except -1:
        """Let the processor walk the guest's tables through the SPTEs. IN npt: the second stage is an NPT for the guest."""
        if role != self.m.hw.cpu_role:
            init_pagewalk(&self.m.hw, role, 0, &self.cpu_caps)
            if not role & ROLE_DIRECT_MASK:
                fill_format(self.hw_fmt, role, &self.cpu_caps, False)
        self.m.hw.vcpu = &self.arch.arch
        self.m.hw.mem = &self.kvm.memslots.ram
        use_second_stage(&self.m.hw, &self.m.stage.w, npt)
        return 0

    cdef int use_tdp(self, uint64_t role, bint smm, bint guest_mode) except -1:
        """Use two-dimensional paging of the host alone."""
        cdef bint changes = self.m.mmu != &self.m.vcpu.root_mmu
        cdef kvm_mmu *mmu = &self.m.vcpu.root_mmu
        cdef uint32_t root_role
        self.use_guest_walk(role, self.cpu_caps.npt_host)
        root_role = tdp_root_role(
            self.kvm.k, 5 if self.m.vcpu.maxphyaddr > GVA_BITS_4_LEVEL else 4, smm, guest_mode, self.kvm.host.gmet)
        self.use_mmu(mmu)
        if root_role != mmu.root_role:
            free_mmu_roots(self.m.vcpu, mmu)
            mmu.root_role = root_role
            init_tdp_format(
                self.tdp_fmt, &self.kvm.k.spte, <int>(root_role & ROLE_LEVEL_MASK), (root_role & ROLE_CR4_SMEP_MASK) != 0)
            changes = True
        if changes:
            self.init_stage(root_role)
        return 0

    cdef int use_nested(self, uint64_t role, GuestMemory mem, bint smm, SecondStage second) except -1:
        """Run L2 under L1's second stage: the processor walks a shadow of it. Both stages are of one address space. KVM leaves
        L2 before it enters SMM, and refuses VMRUN and VM entry there."""
        cdef kvm_mmu *mmu = &self.m.vcpu.guest_mmu
        cdef bint changes = self.m.mmu != mmu
        cdef uint32_t root_role
        cdef uint64_t before = mmu.w.cpu_role if mmu.w is not NULL else 0
        cdef int level = 0
        check_kind(second.stage, self.kvm.k.spte.ept)
        self.use_guest_walk(role, is_npt(second))
        if second.stage is not self.stage:
            self.second, self.stage = second_stage(second.stage, &self.kvm_caps), second.stage
            changes = True
        self.second.use_memory(mem)
        if self.second.n.pml is not NULL:
            self.walked = second                        # one log, whoever walks
            self.second.n.pml = &second.pml
        use_second_stage(&self.m.sw, &self.second.n, is_npt(second))
        self.m.advanced_info = isinstance(second.stage, Ept) and second.stage.advanced_info
        self.use_mmu(mmu)
        mmu.w = &self.second.n
        mmu.page_fault = shadow_page_fault
        if not isinstance(second.stage, Ept):           # as the host's own CR3; L1 has five levels only on a host that has them
            level = 5 if self.m.vcpu.maxphyaddr > GVA_BITS_4_LEVEL or self.second.n.level == 5 else 4
        root_role = shadow_root_role(self.kvm.k, self.second.n.cpu_role, level or self.second.n.level, True)
        root_role |= <uint32_t>smm << ROLE_SMM_SHIFT
        if changes or root_role != mmu.root_role:
            if (before ^ self.second.n.cpu_role) & ROLE_LEVEL_MASK:     # L1 has changed its paging mode
                free_mmu_roots(self.m.vcpu, mmu)
            mmu.root_role = root_role
            new_pgd(self.m.vcpu, second.arch.nested_pgd)
            init_shadow_format(
                self.shadow_fmt, &self.kvm.k.spte, <int>(root_role & ROLE_LEVEL_MASK), (root_role & ROLE_CR4_SMEP_MASK) != 0,
                True, (self.second.n.cpu_role & ROLE_EXT_EXECONLY_MASK) != 0, self.cpu_caps.gbpages)
            self.init_stage(root_role)
        return 0

    cdef int use_shadow_paging(self, uint64_t role) except -1:
        """Use shadow paging: the processor has no second stage, and walks tables that shadow the guest's."""
        cdef kvm_mmu *mmu = &self.m.vcpu.root_mmu
        cdef uint32_t root_role = shadow_root_role(self.kvm.k, role, 0, False)
        cdef uint64_t hw_role
        if self.arch.arch.cr4 & CR4_PKE_MASK and self.arch.arch.keys >> PKRU_SHIFT:
            raise ValueError(f"pkru {self.arch.arch.keys >> PKRU_SHIFT:#x}: KVM has no protection keys without two-dimensional "
                             f"paging; want CR4.PKE clear or PKRU 0")
        mmu.w = &self.m.sw
        mmu.page_fault = nonpaging_page_fault if root_role & ROLE_DIRECT_MASK else shadow_page_fault
        if root_role != mmu.root_role:
            if (root_role ^ mmu.root_role) & ROLE_GUEST_MODE_MASK:     # L1 and L2 come back to their roots
                mmu.root_role = root_role
                new_pgd(self.m.vcpu, self.arch.arch.cr3)
            else:
                free_mmu_roots(self.m.vcpu, mmu)
                mmu.root_role = root_role
            init_shadow_format(self.shadow_fmt, &self.kvm.k.spte, <int>(root_role & ROLE_LEVEL_MASK),
                               (root_role & ROLE_CR4_SMEP_MASK) != 0, False, False, self.cpu_caps.gbpages)
        hw_role = ROLE_EXT_VALID_MASK | ROLE_EFER_NX_MASK | ROLE_CR0_WP_MASK | (root_role & ROLE_LEVEL_MASK)
        if not role & ROLE_DIRECT_MASK:                 # with paging off KVM keeps SMEP and SMAP from its own tables
            hw_role |= role & (ROLE_EXT_CR4_SMAP_MASK | ROLE_CR4_SMEP_MASK)
        if root_role & ROLE_LEVEL_MASK > 3:
            hw_role |= ROLE_EXT_EFER_LMA_MASK
        if root_role & ROLE_LEVEL_MASK > 4:
            hw_role |= ROLE_EXT_CR4_LA57_MASK
        if hw_role != self.m.hw.cpu_role:
            init_pagewalk(&self.m.hw, hw_role, 0, &self.host_caps)
            fill_format(self.hw_fmt, hw_role, &self.host_caps, False)
        self.m.hw.vcpu = &self.m.host
        self.m.hw.mem, self.m.hw.ngpa = &self.kvm.arena, NULL
        return 0

    cdef int init_stage(self, uint32_t root_role) except -1:
        """Make the processor's walk of SPTEs as its second stage."""
        cdef uint64_t role = root_role
        cdef int level = <int>(role & ROLE_LEVEL_MASK)
        if self.kvm.k.spte.ept:
            role = (<uint64_t>level << ROLE_LEVEL_SHIFT) | (role & (ROLE_AD_DISABLED_MASK | ROLE_CR4_SMEP_MASK)) | (
                ROLE_EXT_VALID_MASK | ROLE_EXT_EXECONLY_MASK)
            init_ept_pagewalk(&self.m.stage.w, role, &self.host_caps, True)
            fill_ept_format(self.n_fmt, role, &self.host_caps, self.kvm.k.spte.max_huge_page_level)
        else:
            role = (<uint64_t>level << ROLE_LEVEL_SHIFT) | ROLE_EFER_NX_MASK | ROLE_CR0_WP_MASK | ROLE_EXT_EFER_LMA_MASK | (
                ROLE_EXT_VALID_MASK | (role & ROLE_CR4_SMEP_MASK))
            fill_format(self.n_fmt, role, &self.host_caps, True)
            init_npt_pagewalk(&self.m.stage.w, role, &self.host_caps, True)
        self.m.stage.walk, self.m.stage.w.gva_to_gpa = self.m.stage.w.gva_to_gpa, cached_gva_to_gpa
        self.m.stage.w.mem = &self.kvm.arena
        self.m.stage.epoch += 1
        self.rights_role = 0
        return 0


cdef int check_kind(stage, bint ept) except -1:
    """Raise ValueError unless the host's entries can express the rights of L1's."""
    if isinstance(stage, Ept) and not ept:
        raise ValueError("stage: the host's NPT cannot shadow an Ept; want Host(tdp='ept')")
    if ept and isinstance(stage, Npt) and stage.gmet:
        raise ValueError("stage: the host's EPT cannot shadow an Npt with GMET; want Host(tdp='npt'), or gmet=False")
    return 0


cdef void set_caps(cpu_caps *caps, cpu, bint as_kvm) except *:
    caps.maxphyaddr, caps.gbpages, caps.pse36 = cpu.maxphyaddr, cpu.gbpages, cpu.pse36
    caps.amd, caps.kvm = cpu.vendor == "amd", as_kvm
    caps.encryption_mask = 0
