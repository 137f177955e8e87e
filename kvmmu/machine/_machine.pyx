"""Machine: one vCPU on its host; its registers become walks, roots and tags here. What an access does is in `_access.pyx`."""

import numpy as np

from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport ENOMEM
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t

from kvmmu.arch._bits cimport (
    ACC_USER_MASK, CR3_PCID_MASK, CR4_PCIDE_MASK, GPA_BITS, INVALID_GPA, PAGE_OFFSET_MASK, PAGE_SHIFT, PAGE_SIZE,
    PERMISSIONS_INDEX_SHIFT, PG_LEVEL_1G, PML_ENTITY_NUM, PT64_INDEX_BITS, ROLE_DIRECT_MASK, ROLE_LEVEL_MASK,
)
from kvmmu.arch._format cimport PageFormat, explicit_access
from kvmmu.machine._access cimport access_columns, machine_access, machine_run_for, machine_store
from kvmmu.machine._emulation cimport machine_emulate
from kvmmu.machine._exits cimport machine_drain_pml
from kvmmu.machine._l1_flushes cimport flush_ept, flush_vpid
from kvmmu.machine._modes cimport MachineModes
from kvmmu.machine._rights cimport allows
from kvmmu.machine._roots cimport machine_prepare_root
from kvmmu.machine._state cimport access_result, use_arena
from kvmmu.mmu.core._kvm cimport PREV_ROOTS, REQ_MMU_SYNC, REQ_TLB_FLUSH, REQ_TLB_FLUSH_GUEST, kvm_mmu, sp_hpa
from kvmmu.mmu.core._page cimport alloc_page, reserve_pages
from kvmmu.mmu.kvm._entry cimport free_mmu_roots, kvm_mmu_page_fault
from kvmmu.mmu.kvm._state cimport Kvm
from kvmmu.mmu.shadow._roots cimport ROOTS_ALL, ROOT_CURRENT, free_shadow_roots, new_pgd, prev_roots_of
from kvmmu.mmu.shadow._sync cimport mmu_invalidate_addr
from kvmmu.mmu.tdp._tdp cimport tdp_page_fault
from kvmmu.tlb._tlb cimport (
    Tlb, tlb_flush_pcid, tlb_flush_space, tlb_invlpg, tlb_invpcid_address,
)
from kvmmu.walk._arguments cimport check_scalar_access, check_scalar_gva, check_scalar_word
from kvmmu.walk._contexts cimport VcpuArch, rflags_ac

from kvmmu.arch._bits import RetPf
from kvmmu.walk.results import check_access, check_array

cdef uint64_t RUN_NANOSECONDS = 50_000_000          # between two looks at signals: Ctrl-C seems immediate, and 20 cost nothing


cdef class Mmu:
    """A builder of a vCPU's host page tables.

    Attributes
    ----------
    fmt : PageFormat
        What its SPTEs mean.
    w : PageWalk or None
        The walk whose tables it shadows.
    """

    def __cinit__(self, token=None):
        if token is not _TOKEN:
            raise TypeError(f"{type(self).__name__} is made by a Vcpu: see Vcpu.tdp_mmu and Vcpu.shadow_mmu")

    def __reduce__(self):
        raise TypeError(f"a {type(self).__name__} cannot be copied or pickled: it is a part of its Vcpu")

    @property
    def root_role(self):
        """The word of the root's role (`CpuRole` has the names of its bits)."""
        return int(self.mmu.root_role)

    @property
    def root_hpa(self):
        """Where the root lies (host-physical, bytes); None before the first access, and after an invalidation."""
        with self.machine.kvm.lock:
            if not self.mmu.root.valid:
                return None
            return int(sp_hpa(self.machine.kvm.k, self.mmu.root.sp))

    @property
    def prev_roots(self):
        """The roots before the present one that are kept: list of (pgd, host-physical address), the last used first."""
        with self.machine.kvm.lock:
            return [(int(self.mmu.prev_roots[i].pgd), int(sp_hpa(self.machine.kvm.k, self.mmu.prev_roots[i].sp)))
                    for i in range(PREV_ROOTS) if self.mmu.prev_roots[i].valid]

    def page_fault(self, addr, error_code):
        """Handle one fault, as an exit would bring it.

        Parameters
        ----------
        addr : int
            Bytes: guest-physical under two-dimensional paging, L2's guest-physical under L1's, else linear.
        error_code : int
            As of a #PF or #NPF, or as KVM decodes an EPT violation.

        Returns
        -------
        RetPf
            RETRY also for a fault that is the guest's own: an access there would raise it.

        Raises
        ------
        ValueError
            The MMU is not the active one, or the address is wider than its tables translate, or not canonical.
        """
        cdef Machine m = self.machine
        cdef uint64_t gpa = check_scalar_word("addr", addr), code = check_scalar_word("error_code", error_code)
        cdef int ret = 0
        with m.kvm.lock:
            if m.take_registers is not None:
                m.take_registers()
            m.check_mode()
            if self.mmu != m.m.mmu:
                raise ValueError(f"{type(self).__name__} is not in use: the active one is `mmu`")
            check_width(self.mmu, gpa)
            m.prepare()
            if machine_prepare_root(&m.m):
                raise MemoryError
            m.m.vcpu.eflags_ac = rflags_ac(&m.arch.arch)
            ret = kvm_mmu_page_fault(m.m.vcpu, gpa, code)
            m.m.vcpu.injected = False
            use_arena(&m.m)
        m.fail(ret, f"the fault at {gpa:#x}")
        return RetPf(ret)

    def __repr__(self):
        return f"<{type(self).__name__} root_role {self.root_role:#x}>"


cdef int width_of(const kvm_mmu *mmu) noexcept:
    """How many bits of an address the MMU's tables translate: linear under shadow paging, else guest-physical."""
    if mmu.page_fault == tdp_page_fault:
        return min(PAGE_SHIFT + PT64_INDEX_BITS * <int>(mmu.root_role & ROLE_LEVEL_MASK), <int>GPA_BITS)
    if mmu.root_role & ROLE_DIRECT_MASK or mmu.w.level <= PG_LEVEL_1G:
        return 32
    if mmu.w.is_nested:
        return min(PAGE_SHIFT + PT64_INDEX_BITS * mmu.w.level, <int>GPA_BITS)
    return PAGE_SHIFT + PT64_INDEX_BITS * mmu.w.level


cdef int check_width(const kvm_mmu *mmu, uint64_t addr) except -1:
    """ValueError for an address that the MMU's tables cannot translate: its low bits would be mapped in its place."""
    cdef int width = width_of(mmu), rest = 64 - width
    if not mmu.root_role & ROLE_DIRECT_MASK and not mmu.w.is_nested and mmu.w.level > PG_LEVEL_1G:
        if <uint64_t>(<int64_t>(addr << rest) >> rest) != addr:
            raise ValueError(f"addr: {addr:#x} is not canonical for the {width} bits that this MMU's tables translate")
    elif addr >> width:
        raise ValueError(f"addr: this MMU's tables translate {width} bits, got {addr:#x}")
    return 0


cdef class TdpMmu(Mmu):
    """The builder of a vCPU's host page tables under two-dimensional paging, but for guests under L1's nested paging.

    Its `w` is None: a fault of these tables never needs a look at the guest's.
    """


cdef class ShadowMmu(Mmu):
    """The builder of tables that shadow tables of the guest's: those of CR3 without two-dimensional paging, else L1's EPT or NPT.

    Its `w` is `gva_walk` without two-dimensional paging, else `ngpa_walk`.
    """


cdef class Machine(MachineModes):
    """One vCPU on its host.

    Parameters
    ----------
    state : Kvm
    arch : VcpuArch
        The guest's registers.
    vcpu_id : int
    buffer : Tlb
    gva_walk, ngpa_walk : PageWalk
        What `w` of an MMU names.
    """

    def __cinit__(self, Kvm state not None, VcpuArch arch not None, vcpu_id, Tlb buffer not None, gva_walk, ngpa_walk):
        self.shadow_mmu = ShadowMmu(_TOKEN)
        self.shadow_mmu.w = gva_walk
        if state.k.tdp_enabled:
            self.tdp_mmu = TdpMmu(_TOKEN)
            self.shadow_mmu.w = ngpa_walk
            adopt(self, self.tdp_mmu, &self.m.vcpu.root_mmu, self.tdp_fmt)
            adopt(self, self.shadow_mmu, &self.m.vcpu.guest_mmu, self.shadow_fmt)
        else:
            adopt(self, self.shadow_mmu, &self.m.vcpu.root_mmu, self.shadow_fmt)

    def on_use(self, take_registers):
        """Let a use of an MMU that the caller has kept call `take_registers()` first: registers may have changed meanwhile."""
        self.take_registers = take_registers

    cdef int prepare(self) except -1:
        """What must be before the vCPU runs: slots, a root, and the log of dirty pages. With the lock held."""
        self.check_mode()
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

    cdef int fail(self, int errno, what) except -1:
        """An error of the host is the caller's to know."""
        if errno == -ENOMEM:
            raise MemoryError
        if errno < 0:
            raise RuntimeError(f"{what} failed in the host with errno {-errno}")
        return 0

    @property
    def root_mmu(self):
        """The MMU outside of L1's nested paging."""
        return self.tdp_mmu if self.kvm.k.tdp_enabled else self.shadow_mmu

    @property
    def mmu(self):
        """The MMU in use."""
        return self.root_mmu if self.m.mmu == &self.m.vcpu.root_mmu else self.shadow_mmu

    def set_rip(self, rip):
        """Of the instruction under way. With the lock held."""
        self.m.vcpu.rip = check_scalar_word("rip", rip)

    def vm_enter(self):
        """What was put off until the guest runs again."""
        with self.kvm.lock:
            self.prepare()

    # ---- accesses --------------------------------------------------------------------------------------------------------

    cdef int run(self, const uint64_t *gva, const uint8_t *access, size_t stride, size_t n, const access_columns *out) except -1:
        cdef size_t i = 0
        cdef int r = 0
        self.kvm.lock.acquire()
        try:
            while i < n and r == 0:
                self.prepare()
                with nogil:
                    r = machine_run_for(&self.m, gva, access, stride, n, out, &i, RUN_NANOSECONDS)
                if i < n and r == 0:
                    PyErr_CheckSignals()                # Ctrl-C ends the batch between two rows
        finally:
            self.kvm.lock.release()
        return self.fail(r, f"the access to {gva[i if i < n else 0]:#x} in row {i}")

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
        if n > min(gpa.shape[0], hpa.shape[0], status.shape[0], ret.shape[0], exits.shape[0], error_code.shape[0]):
            raise ValueError(f"arrays: want {n} rows in each column")
        out.gpa, out.hpa, out.status = &gpa[0], &hpa[0], &status[0]
        out.error_code, out.ret, out.exits = &error_code[0], &ret[0], &exits[0]
        self.run(<const uint64_t *><uintptr_t>gva.ctypes.data, <const uint8_t *><uintptr_t>access.ctypes.data,
                 1 if access.size > 1 else 0, n, &out)

    def access_one(self, gva, access, data=None, page_table_writing=True):
        """(gpa, hpa, status, error_code, ret, exits, fault_gpa, exit_qualification) of one access; the vCPU's EFLAGS.AC is the
        caller's to add. data: as of `emulate()`."""
        cdef uint64_t addr = check_scalar_gva(gva)
        cdef uint32_t a = explicit_access(check_scalar_access(access))
        cdef access_result out
        cdef int r = 0
        self.kvm.lock.acquire()
        try:
            self.prepare()
            self.set_data(addr, data)
            self.m.page_table_writing = bool(page_table_writing)
            out.fault_gpa, out.exit_qualification = INVALID_GPA, 0
            with nogil:
                r = machine_access(&self.m, addr, a, &out)
                if r == 0:
                    machine_store(&self.m, &out)
        finally:
            self.m.data, self.m.page_table_writing = NULL, True
            self.kvm.lock.release()
        self.fail(r, f"the access to {addr:#x}")
        return (int(out.gpa), int(out.hpa), int(out.status), int(out.error_code), int(out.ret), int(out.exits),
                int(out.fault_gpa), int(out.exit_qualification))

    # ---- what the guest flushes --------------------------------------------------------------------------------------------

    def invlpg(self, gva):
        """INVLPG: this vCPU's translations of an address, under every root; a non-canonical one does nothing."""
        with self.kvm.lock:
            self.kvm.k.stats.invlpg += 1
            self.invalidate_addr(gva, True, True)

    def invalidate_addr(self, gva, current, prev_roots):
        """Translations of a linear address, in the TLB and in tables that shadow the guest's, of the roots named."""
        cdef uint64_t addr = check_scalar_gva(gva)
        cdef int shift
        with self.kvm.lock:
            addr &= self.m.hw.gva_mask
            shift = self.widest_shift if self.m.hw.canonical_shift else 0
            if <uint64_t>(<int64_t>(addr << shift) >> shift) != addr:
                return
            tlb_invlpg(&self.tlb.t, addr)
            self.m.vcpu.mmio_cached = False
            if not self.kvm.k.tdp_enabled:
                self.invalidate(&self.m.vcpu.root_mmu, addr, current, ROOTS_ALL if prev_roots else 0)

    def invalidate_ngpa(self, ngpa, current, prev_roots):
        """The same of an address of L2's in the tables that shadow L1's second stage."""
        cdef uint64_t addr = check_scalar_gva(ngpa)
        with self.kvm.lock:
            if self.m.mmu == &self.m.vcpu.guest_mmu and addr >> width_of(self.m.mmu):
                return
            self.invalidate(&self.m.vcpu.guest_mmu, addr, current, ROOTS_ALL if prev_roots else 0)
            self.m.vcpu.requests |= REQ_TLB_FLUSH

    cdef int invalidate(self, kvm_mmu *mmu, uint64_t addr, bint current, uint32_t prev_roots) except -1:
        if mmu == self.m.mmu:
            self.kvm.sync()
            mmu_invalidate_addr(self.m.vcpu, mmu, addr, current, prev_roots)
        return 0

    def invpcid(self, type, pcid, gva):
        """INVPCID, with arguments that are checked."""
        with self.kvm.lock:
            self.invalidate_by_pcid(type, pcid, gva)

    cdef int invalidate_by_pcid(self, int type, uint32_t pcid, uint64_t gva) except -1:
        cdef uint32_t active = 0
        cdef bint shadowed = not self.kvm.k.tdp_enabled
        if self.arch.arch.cr4 & CR4_PCIDE_MASK:
            active = <uint32_t>(self.arch.arch.cr3 & CR3_PCID_MASK)
        if type == 0:
            tlb_invpcid_address(&self.tlb.t, pcid, gva)
            if shadowed:
                self.kvm.k.stats.invlpg += 1
                self.invalidate(&self.m.vcpu.root_mmu, gva, pcid == active,
                                prev_roots_of(&self.m.vcpu.root_mmu, pcid, CR3_PCID_MASK))
        elif type == 1:
            tlb_flush_pcid(&self.tlb.t, pcid)
            if shadowed:
                self.invalidate_pcid(pcid)
        else:
            tlb_flush_space(&self.tlb.t, type == 2)
            if shadowed:
                self.sync_all()
        return 0

    def invept(self, eptp):
        """INVEPT by L1, while it runs: roots that shadow its EPT with this EPTP are left, all of them without one (None)."""
        cdef uint64_t pgd = 0 if eptp is None else check_scalar_word("eptp", eptp)
        cdef bint every = eptp is None
        with self.kvm.lock:
            self.kvm.sync()
            flush_ept(&self.m, every, pgd)

    def invvpid(self, type, gva):
        """INVVPID by L1, while it runs: translations of L2's, whatever their VPID; type and address as of the instruction."""
        cdef uint64_t addr = check_scalar_word("gva", gva)
        cdef int how = type
        with self.kvm.lock:
            self.kvm.sync()
            flush_vpid(&self.m, how, addr)

    cdef int invalidate_pcid(self, uint32_t pcid) except -1:
        """All of one PCID, in the tables that shadow the guest's: synchronized at the next entry, or left."""
        cdef uint32_t active = 0
        cdef bint pcide = (self.arch.arch.cr4 & CR4_PCIDE_MASK) != 0
        if pcide:
            active = <uint32_t>(self.arch.arch.cr3 & CR3_PCID_MASK)
        if pcid == active:
            self.m.vcpu.requests |= REQ_MMU_SYNC | REQ_TLB_FLUSH
        if pcide:                                       # else every load of CR3 synchronizes
            free_shadow_roots(self.kvm.k, &self.m.vcpu.root_mmu,
                              prev_roots_of(&self.m.vcpu.root_mmu, pcid, CR3_PCID_MASK) << 1)
        return 0

    def mov_cr3(self, before, noflush, pdptrs_changed):
        """MOV to CR3: translations of its PCID go, global ones excepted, unless the guest keeps them; tables that shadow the
        guest's are found again. IN before: the CR3 until now."""
        with self.kvm.lock:
            self.load_cr3(before, bool(noflush), bool(pdptrs_changed))

    cdef int load_cr3(self, uint64_t before, bint noflush, bint pdptrs_changed) except -1:
        cdef uint64_t cr3 = self.arch.arch.cr3
        cdef uint32_t pcid = <uint32_t>(cr3 & CR3_PCID_MASK) if self.arch.arch.cr4 & CR4_PCIDE_MASK else 0
        if not noflush:
            tlb_flush_pcid(&self.tlb.t, pcid)
        if self.kvm.k.tdp_enabled:
            return 0
        self.kvm.sync()
        if pdptrs_changed:
            free_shadow_roots(self.kvm.k, &self.m.vcpu.root_mmu, ROOT_CURRENT)
        if cr3 != before:
            new_pgd(self.m.vcpu, cr3, False)
        if not noflush:
            self.invalidate_pcid(pcid)
        return 0

    def reset_context(self):
        """Registers that roles are made of were written: every root of a shadow MMU of theirs is left."""
        if not self.kvm.k.tdp_enabled:
            with self.kvm.lock:
                free_mmu_roots(self.m.vcpu, &self.m.vcpu.root_mmu)
                self.m.vcpu.mmio_cached = False

    def flush_guest(self):
        """Every translation of the guest, global ones too."""
        with self.kvm.lock:
            tlb_flush_space(&self.tlb.t, True)
            self.sync_all()

    cdef int sync_all(self) except -1:
        """Under shadow paging a flush by the guest makes every root of it agree with its tables, before the guest runs again."""
        if not self.kvm.k.tdp_enabled:
            self.m.vcpu.requests |= REQ_TLB_FLUSH_GUEST
        return 0

    # ---- what KVM carries out ----------------------------------------------------------------------------------------------

    def emulate(self, gva, access, data=None):
        """(gpa, hpa, status, error_code, fault_gpa, exit_qualification) of an access that KVM carries out by its own walk.

        data : bytes, optional
            What a write writes, within one page; empty: only to see whether it would. By default an aligned entry, unchanged.
        """
        cdef uint64_t addr = check_scalar_gva(gva)
        cdef uint32_t a = explicit_access(check_scalar_access(access))
        cdef access_result out
        out.fault_gpa, out.exit_qualification = INVALID_GPA, 0
        with self.kvm.lock:
            self.check_mode()
            self.kvm.sync()                             # no more than that: the guest is not entered for it
            use_arena(&self.m)
            self.set_data(addr, data)
            machine_emulate(&self.m, addr & self.m.sw.gva_mask, a, &out)
            self.m.data = NULL
            use_arena(&self.m)
        return result_of(&out)

    cdef int set_data(self, uint64_t addr, const uint8_t[::1] data) except -1:
        """The bytes of the access to come; the caller keeps them."""
        self.m.data, self.m.size = NULL, 0
        if data is not None:
            if <size_t>data.shape[0] > PAGE_SIZE - (addr & PAGE_OFFSET_MASK):
                raise ValueError(f"data: {data.shape[0]} bytes at {addr:#x} reach over the end of a page")
            self.m.size = data.shape[0]
            self.m.data = &data[0] if self.m.size else &NO_DATA[0]
        return 0

    def hit_rights(self):
        """For tests: (tables, rules), bool arrays (acc, nacc, pkey, index): what a TLB entry allows, and what the rules say."""
        cdef uint32_t acc, nacc, pkey, i
        cdef uint16_t word
        self.check_mode()
        tables, rules = np.zeros((16, 16, 16, 16), bool), np.zeros((16, 16, 16, 16), bool)
        for acc in range(16):
            for nacc in range(16):
                for pkey in range(16):
                    word = self.m.rights.guest[acc] & self.m.rights.nested[(acc & ACC_USER_MASK) != 0][nacc]
                    if acc & ACC_USER_MASK:
                        word &= self.m.rights.keys[pkey]
                    for i in range(16):
                        tables[acc, nacc, pkey, i] = (word >> i) & 1
                        rules[acc, nacc, pkey, i] = allows(
                            &self.m.hw, &self.m.stage.w, acc, nacc, pkey, i << PERMISSIONS_INDEX_SHIFT)
        return tables, rules

    def drain_pml(self):
        """Take what the processor logged so far into the dirty log."""
        with self.kvm.lock:
            machine_drain_pml(&self.m)


cdef uint8_t NO_DATA[1]
cdef object _TOKEN = object()       # only this module can make an Mmu


cdef result_of(const access_result *out):
    return (int(out.gpa), int(out.hpa), int(out.status), int(out.error_code), int(out.fault_gpa), int(out.exit_qualification))


cdef void adopt(Machine machine, Mmu mmu, kvm_mmu *state, PageFormat fmt) noexcept:
    """An MMU of a machine gets its Python face."""
    mmu.machine, mmu.mmu, mmu.fmt = machine, state, fmt
