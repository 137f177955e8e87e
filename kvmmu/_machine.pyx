"""Machine: one vCPU on its host; its registers become walks, roots and tags here. What an access does is in `_access.pyx`."""

import numpy as np

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t

from kvmmu._access cimport (
    access_columns, access_result, allows, cached_gva_to_gpa, machine_drain_pml, machine_emulate, machine_load_rights,
    machine_prepare_root, machine_run, use_arena,
)
from kvmmu._arguments cimport check_scalar_access, check_scalar_gva
from kvmmu._bits cimport (
    ACC_USER_MASK, CR3_PCID_MASK, CR4_PCIDE_MASK, GVA_BITS_4_LEVEL, PERMISSIONS_INDEX_SHIFT, PML_ENTITY_NUM,
    ROLE_AD_DISABLED_MASK, ROLE_CR0_WP_MASK, ROLE_CR4_SMEP_MASK, ROLE_DIRECT_MASK, ROLE_EFER_NX_MASK,
    ROLE_EXT_EFER_LMA_MASK, ROLE_EXT_EXECONLY_MASK, ROLE_EXT_VALID_MASK, ROLE_LEVEL_MASK, ROLE_LEVEL_SHIFT,
)
from kvmmu._contexts cimport VcpuArch, fill_format, role_of
from kvmmu._format cimport (
    PageFormat, explicit_access, permission_params, reset_ept_rsvds_bits_mask, update_permission_bitmask,
)
from kvmmu._memory cimport GuestMemory
from kvmmu._tlb cimport Tlb, tlb_flush_pcid, tlb_flush_space, tlb_invlpg, tlb_invpcid_address, tlb_use
from kvmmu._walk cimport cpu_caps, init_ept_pagewalk, init_npt_pagewalk, init_pagewalk
from kvmmu.mmu._entry cimport free_mmu_root, kvm_mmu_page_fault, tdp_root_role
from kvmmu.mmu._kvm cimport add_vcpu, sp_hpa
from kvmmu.mmu._page cimport alloc_page, reserve_pages
from kvmmu.mmu._spte cimport init_tdp_format
from kvmmu.mmu._state cimport Kvm

from kvmmu._bits import RetPf
from kvmmu.columns import check_access, check_array


cdef class TdpMmu:
    """The builder of a vCPU's host page tables under two-dimensional paging, for guests that are not nested.

    Attributes
    ----------
    fmt : PageFormat
        What its SPTEs mean.
    w : None
        No walk: a fault of these tables never needs a look at the guest's.
    """

    @property
    def w(self):
        return None

    @property
    def root_role(self):
        """The word of the root's role (`CpuRole` has the names of its bits)."""
        return int(self.machine.m.mmu.root_role)

    @property
    def root_hpa(self):
        """Where the root lies (host-physical, bytes); None before the first access, and after an invalidation."""
        if not self.machine.m.mmu.root.valid:
            return None
        return int(sp_hpa(self.machine.kvm.k, self.machine.m.mmu.root.sp))

    def page_fault(self, addr, error_code):
        """Handle one fault, as an exit would bring it.

        Parameters
        ----------
        addr : int
            Guest-physical address (bytes).
        error_code : int
            As of a #NPF, or as KVM decodes an EPT violation.

        Returns
        -------
        RetPf
        """
        cdef Machine m = self.machine
        cdef uint64_t gpa = check_scalar_gva(addr), code = error_code
        cdef int ret = 0
        with m.kvm.lock:
            m.prepare()
            if machine_prepare_root(&m.m):
                raise MemoryError
            ret = kvm_mmu_page_fault(m.m.vcpu, gpa, code)
            use_arena(&m.m)
        if ret < 0:
            raise RuntimeError(f"the fault at {addr:#x} failed in the host with errno {-ret}")
        return RetPf(ret)

    def __repr__(self):
        return f"<TdpMmu root_role {self.root_role:#x}>"


cdef class Machine:
    """One vCPU on its host.

    Parameters
    ----------
    state : Kvm
    arch : VcpuArch
        The guest's registers.
    vcpu_id : int
    buffer : Tlb
    """

    def __init__(self, Kvm state, VcpuArch arch, vcpu_id, Tlb buffer):
        if self.m.vcpu is not NULL:
            raise RuntimeError("a machine is made once")
        self.kvm, self.arch, self.tlb = state, arch, buffer
        self.tdp_mmu = TdpMmu()
        self.tdp_mmu.machine, self.tdp_mmu.fmt = self, PageFormat()
        self.hw_fmt, self.sw_fmt, self.n_fmt = PageFormat(), PageFormat(), PageFormat()
        with state.lock:
            self.m.vcpu = add_vcpu(state.k, vcpu_id)
        if self.m.vcpu is NULL:
            raise MemoryError
        self.m.mmu = &self.m.vcpu.root_mmu
        self.m.mmu.fmt = &self.tdp_mmu.fmt.fmt
        self.m.k, self.m.tlb, self.m.arena, self.m.arch = state.k, &buffer.t, &state.arena_slot, &arch.arch
        self.m.hw.vcpu = self.m.sw.vcpu = &arch.arch
        self.m.hw.fmt, self.m.sw.fmt, self.m.stage.w.fmt = &self.hw_fmt.fmt, &self.sw_fmt.fmt, &self.n_fmt.fmt
        self.m.stage.w.vcpu = &self.m.host
        self.m.stage.epoch = 1

    # ---- registers, roles and walks ------------------------------------------------------------------------------------

    def set_cpu(self, cpu):
        """Take a processor model; the next `set_mode()` builds every walk anew."""
        set_caps(&self.cpu_caps, cpu, False)
        set_caps(&self.kvm_caps, cpu, True)
        self.m.vcpu.maxphyaddr = cpu.maxphyaddr
        self.m.hw.cpu_role = self.rights_role = 0
        self.m.mmu.root_role = 0
        host = self.kvm.host
        self.host_caps.maxphyaddr = host.maxphyaddr
        self.host_caps.gbpages = host.max_huge_page_level >= 3
        self.host_caps.amd = host.tdp != "ept"
        self.host_caps.kvm = self.host_caps.pse36 = False

    def set_mode(self, GuestMemory mem, *, smm=False, guest_mode=False):
        """Take the roles of the registers in force; no work for those that did not change."""
        cdef uint64_t role = role_of(&self.arch.arch, smm, guest_mode)
        cdef uint32_t root_role
        if self.table is not mem.table:
            self.table = mem.table
            self.m.sw.mem = &self.table.mem
        if role != self.m.hw.cpu_role:
            init_pagewalk(&self.m.hw, role, &self.cpu_caps)
            init_pagewalk(&self.m.sw, role, &self.kvm_caps)
            if not role & ROLE_DIRECT_MASK:
                fill_format(self.hw_fmt, role, &self.cpu_caps, False)
                fill_format(self.sw_fmt, role, &self.kvm_caps, False)
        self.m.hw.mem, self.m.hw.ngpa = &self.kvm.ram, &self.m.stage.w
        self.m.sw.ngpa = NULL
        self.m.vcpu.as_id, self.m.vcpu.guest_mode = bool(smm), bool(guest_mode)
        host = self.kvm.host
        if host.tdp is not None:
            root_role = tdp_root_role(
                self.kvm.k, 5 if self.m.vcpu.maxphyaddr > GVA_BITS_4_LEVEL else 4, bool(smm), bool(guest_mode), host.gmet)
            if root_role != self.m.mmu.root_role:
                self.use_root_role(root_role)
        if role != self.rights_role or self.m.mmu.root_role != self.rights_root or self.arch.arch.pkru != self.rights_pkru:
            self.rights_role, self.rights_root, self.rights_pkru = role, self.m.mmu.root_role, self.arch.arch.pkru
            machine_load_rights(&self.m)
        tlb_use(&self.tlb.t, self.m.mmu.root_role,
                <uint32_t>(self.arch.arch.cr3 & CR3_PCID_MASK) if self.arch.arch.cr4 & CR4_PCIDE_MASK else 0)

    def use_root_role(self, root_role):
        """Another root: its walk by the processor, and the MMU's own format."""
        cdef permission_params p
        cdef uint64_t role = root_role
        cdef int level = <int>(role & ROLE_LEVEL_MASK)
        cdef bint smep = (role & ROLE_CR4_SMEP_MASK) != 0
        with self.kvm.lock:
            free_mmu_root(self.m.vcpu)
            self.m.mmu.root_role = <uint32_t>role
        init_tdp_format(self.tdp_mmu.fmt, &self.kvm.k.spte, level, smep)
        if self.kvm.k.spte.ept:
            role = (<uint64_t>level << ROLE_LEVEL_SHIFT) | (role & (ROLE_AD_DISABLED_MASK | ROLE_CR4_SMEP_MASK)) | (
                ROLE_EXT_VALID_MASK | ROLE_EXT_EXECONLY_MASK)
            init_ept_pagewalk(&self.m.stage.w, role, &self.host_caps, False)
            p.tdp = p.ept = p.wp = p.nx = True
            p.smep, p.smap = smep, False
            update_permission_bitmask(&self.n_fmt.fmt, &p)
            self.n_fmt.fmt.pkru_mask = 0
            reset_ept_rsvds_bits_mask(&self.n_fmt.fmt, self.host_caps.maxphyaddr, True, self.kvm.k.spte.max_huge_page_level)
        else:
            role = (<uint64_t>level << ROLE_LEVEL_SHIFT) | ROLE_EFER_NX_MASK | ROLE_CR0_WP_MASK | ROLE_EXT_EFER_LMA_MASK | (
                ROLE_EXT_VALID_MASK | (role & ROLE_CR4_SMEP_MASK))
            fill_format(self.n_fmt, role, &self.host_caps, True)
            init_npt_pagewalk(&self.m.stage.w, role, &self.host_caps, True)
        self.m.stage.walk, self.m.stage.w.gva_to_gpa = self.m.stage.w.gva_to_gpa, cached_gva_to_gpa
        self.m.stage.w.mem = &self.kvm.arena

    cdef int prepare(self) except -1:
        """What must be before the vCPU runs: slots, a root, and the log of dirty pages."""
        if self.kvm.host.tdp is None:
            raise NotImplementedError("access() and page_fault() need a host with two-dimensional paging (tdp='ept' or 'npt')")
        self.kvm.sync()
        if self.kvm.k.spte.pml and self.m.pml_page == 0:
            if reserve_pages(self.kvm.k, 1):
                raise MemoryError
            self.m.pml_page = alloc_page(self.kvm.k, 0, 0)
            self.m.pml.index = PML_ENTITY_NUM - 1
        if self.m.pml_page:
            self.m.pml.address = sp_hpa(self.kvm.k, self.m.pml_page)
            self.m.stage.w.pml = &self.m.pml
        use_arena(&self.m)
        if self.m.vcpu.requests or not self.m.mmu.root.valid:
            if machine_prepare_root(&self.m):
                raise MemoryError
        return 0

    # ---- accesses --------------------------------------------------------------------------------------------------------

    cdef int run(self, const uint64_t *gva, const uint8_t *access, size_t stride, size_t n, const access_columns *out) except -1:
        cdef size_t i = 0
        cdef int r = 0
        with self.kvm.lock:
            self.prepare()
            with nogil:
                r = machine_run(&self.m, gva, access, stride, n, out, &i)
        if r < 0:
            raise RuntimeError(f"the access to {gva[i]:#x} in row {i} failed in the host with errno {-r}")
        return 0

    def access(self, gva, access, arrays):
        """The rows of checked arrays, in order; `arrays` are those of the result by name."""
        cdef Py_ssize_t n = check_array("gva", gva, np.dtype(np.uint64)).size
        access = check_access(access, n)
        cdef uint64_t[::1] gpa = arrays["gpa"], hpa = arrays["hpa"]
        cdef uint8_t[::1] status = arrays["status"], ret = arrays["ret"], exits = arrays["exits"]
        cdef uint32_t[::1] error_code = arrays["error_code"]
        cdef access_columns out
        if n == 0:
            return
        out.gpa, out.hpa, out.status = &gpa[0], &hpa[0], &status[0]
        out.error_code, out.ret, out.exits = &error_code[0], &ret[0], &exits[0]
        self.run(<const uint64_t *><uintptr_t>gva.ctypes.data, <const uint8_t *><uintptr_t>access.ctypes.data,
                 1 if access.size > 1 else 0, n, &out)

    def access_one(self, gva, access):
        """(gpa, hpa, status, error_code, ret, exits) of one access; the vCPU's EFLAGS.AC is the caller's to add."""
        cdef uint64_t addr = check_scalar_gva(gva), gpa = 0, hpa = 0
        cdef uint8_t a = <uint8_t>check_scalar_access(access), status = 0, ret = 0, exits = 0
        cdef uint32_t error_code = 0
        cdef access_columns out
        out.gpa, out.hpa, out.status = &gpa, &hpa, &status
        out.error_code, out.ret, out.exits = &error_code, &ret, &exits
        self.run(&addr, &a, 0, 1, &out)
        return int(gpa), int(hpa), int(status), int(error_code), int(ret), int(exits)

    # ---- what the guest flushes --------------------------------------------------------------------------------------------

    def invlpg(self, gva):
        """INVLPG: this vCPU's translations of an address; a non-canonical one does nothing."""
        self.kvm.k.stats.invlpg += 1
        self.flush_addr(gva)

    def flush_addr(self, gva):
        """What INVLPG flushes."""
        cdef uint64_t addr = gva & self.m.hw.gva_mask
        if <uint64_t>(<int64_t>(addr << self.m.hw.canonical_shift) >> self.m.hw.canonical_shift) == addr:
            tlb_invlpg(&self.tlb.t, addr)
            self.m.vcpu.mmio_cached = False

    def invpcid(self, type, pcid, gva):
        """INVPCID, with arguments that are checked."""
        if type == 0:
            tlb_invpcid_address(&self.tlb.t, pcid, gva)
        elif type == 1:
            tlb_flush_pcid(&self.tlb.t, pcid)
        else:
            tlb_flush_space(&self.tlb.t, type == 2)

    def flush_pcid(self):
        """MOV to CR3: translations of the PCID in force, global ones excepted."""
        cdef uint32_t pcid = 0
        if self.arch.arch.cr4 & CR4_PCIDE_MASK:
            pcid = <uint32_t>(self.arch.arch.cr3 & CR3_PCID_MASK)
        tlb_flush_pcid(&self.tlb.t, pcid)

    def flush_guest(self):
        """Every translation of the guest, global ones too."""
        tlb_flush_space(&self.tlb.t, True)

    def emulate(self, gva, access):
        """(gpa, hpa, status, error_code) of an access that KVM carries out itself, by its own walk."""
        cdef uint64_t addr = check_scalar_gva(gva) & self.m.sw.gva_mask
        cdef uint32_t a = explicit_access(check_scalar_access(access))
        cdef access_result out
        with self.kvm.lock:
            self.kvm.sync()
            machine_emulate(&self.m, addr, a, &out)
        return int(out.gpa), int(out.hpa), int(out.status), int(out.error_code)

    def hit_rights(self):
        """For tests: (tables, rules), bool arrays (acc, nacc, pkey, index): what a TLB entry allows, and what the rules say."""
        cdef uint32_t acc, nacc, pkey, i
        cdef uint16_t word
        tables, rules = np.zeros((16, 16, 16, 16), bool), np.zeros((16, 16, 16, 16), bool)
        for acc in range(16):
            for nacc in range(16):
                for pkey in range(16):
                    word = self.m.rights.guest[acc] & self.m.rights.nested[(acc & ACC_USER_MASK) != 0][nacc]
                    if acc & ACC_USER_MASK:
                        word &= self.m.rights.keys[pkey]
                    for i in range(16):
                        tables[acc, nacc, pkey, i] = (word >> i) & 1
                        rules[acc, nacc, pkey, i] = allows(&self.m, acc, nacc, pkey, i << PERMISSIONS_INDEX_SHIFT)
        return tables, rules

    def drain_pml(self):
        """Take what the processor logged so far into the dirty log."""
        with self.kvm.lock:
            machine_drain_pml(&self.m)


cdef void set_caps(cpu_caps *caps, cpu, bint as_kvm) except *:
    caps.maxphyaddr, caps.gbpages, caps.pse36 = cpu.maxphyaddr, cpu.gbpages, cpu.pse36
    caps.amd, caps.kvm = cpu.vendor == "amd", as_kvm
