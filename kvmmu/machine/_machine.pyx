"""Machine: one vCPU on its host, as its Vcpu uses it. The steps of an access are in `_access.pxd`."""

import numpy as np

from cpython.exc cimport PyErr_CheckSignals
from cpython.object cimport PyTypeObject
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t

from kvmmu.arch._bits cimport (
    ACCESS_PLAIN_MASK, ACCESS_PROBE_MASK, ACCESS_SHADOW_STACK_MASK, INVALID_GPA, PAGE_OFFSET_MASK, PAGE_SHIFT, PAGE_SIZE,
    PML_ENTITY_NUM, STATUS_OK,
)
from kvmmu.arch._format cimport explicit_access
from kvmmu.machine._access cimport (
    access_columns, machine_access, machine_linear_address, machine_run_for, machine_store,
)
from kvmmu.machine._emulation cimport machine_emulate
from kvmmu.machine._exits cimport machine_drain_pml
from kvmmu.machine._explain cimport fault_of_access
from kvmmu.machine._flushes cimport (
    flush_all, flush_by_pcid, flush_ept, flush_vpid, invalidate_gva, invalidate_ngpa, leave_roots, load_cr3,
)
from kvmmu.machine._mmus cimport new_shadow_mmu, new_tdp_mmu, raise_errno
from kvmmu.machine._modes cimport new_modes
from kvmmu.machine._state cimport access_result, use_arena
from kvmmu.mmu.core._kvm cimport ROOTS_ALL, ROOTS_PREVIOUS, ROOT_CURRENT
from kvmmu.mmu.core._page cimport first_spte
from kvmmu.mmu.kvm._state cimport Kvm
from kvmmu.tlb._tlb cimport Tlb
from kvmmu.walk._arguments cimport check_scalar_access, check_scalar_gva, check_scalar_word
from kvmmu.walk._vcpu_arch cimport rflags_ac
from kvmmu.walk.batch._arrays cimport check_apart, stretch
from kvmmu.walk.pagewalk cimport PageWalk

from kvmmu.walk.results import Accesses, check_access, check_array

cdef extern from "Python.h":
    object PyType_GenericAlloc(PyTypeObject *type, Py_ssize_t items)

cdef tuple COLUMNS = ("gpa", "hpa", "error_code", "status", "ret", "exits")         # of access_columns
cdef uint64_t RUN_NANOSECONDS = 50_000_000          # between two checks for signals: Ctrl-C seems immediate, at no cost


cdef uint32_t roots_of(current, prev_roots) except? 0:
    return (<uint32_t>ROOT_CURRENT if current else 0) | (<uint32_t>ROOTS_PREVIOUS if prev_roots else 0)


cdef class Machine:
    """One vCPU on its host. Methods take the lock of the machine; those that act for the guest take new registers first.

    Parameters
    ----------
    kvm : Kvm
    vcpu_id : int
    tlb : Tlb
    gva_walk, ngpa_walk : PageWalk
        The walks of the vCPU. gva_walk has its registers, processor model, memory and second stage.
    """

    def __cinit__(self, Kvm kvm not None, vcpu_id, Tlb tlb not None, PageWalk gva_walk not None, PageWalk ngpa_walk not None):
        self.kvm = kvm
        self.modes = new_modes(kvm, vcpu_id, tlb, gva_walk)
        self.m = &self.modes.m
        self.shadow_mmu = new_shadow_mmu(self.modes, ngpa_walk if kvm.k.tdp_enabled else gva_walk)
        if kvm.k.tdp_enabled:
            self.tdp_mmu = new_tdp_mmu(self.modes)

    def __reduce__(self):
        raise TypeError("a Machine cannot be copied or pickled")

    @property
    def joined(self):
        """True if it is one of the vCPUs of its host: from the start or its next use on, until a restore to a time before it."""
        return self.modes.joined

    def set_cpu(self):
        """Take the processor model of the walks, which is a new one: every walk, root and shadow page is made anew."""
        with self.kvm.lock:
            self.modes.take_cpu()
            self.kvm.zap_all_fast()                     # shadow pages show which entries the old model took for legal

    @property
    def root_mmu(self):
        """The MMU that is active outside of L1's nested paging."""
        return self.tdp_mmu if self.kvm.k.tdp_enabled else self.shadow_mmu

    def update(self):
        """Take what changed in the registers; returns itself."""
        with self.kvm.lock:
            self.modes.update()
        return self

    def active_mmu(self):
        """Return the MMU that the registers make the active one."""
        self.update()
        return self.root_mmu if self.m.mmu == &self.m.vcpu.root_mmu else self.shadow_mmu

    def vm_enter(self):
        """Do what was put off until the guest runs again."""
        with self.kvm.lock:
            self.modes.enter()

    # ---- accesses --------------------------------------------------------------------------------------------------------

    cdef int run(self, const uint64_t *gva, const uint8_t *access, size_t stride, size_t n, const access_columns *out,
                 bint shadow_stacks) except -1:
        cdef size_t i = 0
        cdef int r = 0
        cdef bint each
        self.kvm.lock.acquire()
        try:
            while i < n and r == 0:
                self.modes.enter()
                each = shadow_stacks or self.m.pre_processes
                with nogil:
                    r = machine_run_for(self.m, gva, access, stride, n, out, &i, each, RUN_NANOSECONDS)
                if i < n and r == 0:
                    PyErr_CheckSignals()                # Ctrl-C ends the batch between two rows
        finally:
            self.kvm.lock.release()
        if r:
            raise_errno(r, f"the access to {gva[i if i < n else 0]:#x} in row {i}")
        return 0

    def access(self, gva, access, arrays):
        """Access the rows of arrays in order. `arrays`: the columns of the result by name."""
        cdef Py_ssize_t n = check_array("gva", gva, np.dtype(np.uint64)).size
        access = check_access(access, n)
        seen = int(np.bitwise_or.reduce(access)) if access.size else 0
        self.check_access_bits(seen)
        cdef uint64_t[::1] gpa = arrays["gpa"], hpa = arrays["hpa"]
        cdef uint8_t[::1] status = arrays["status"], ret = arrays["ret"], exits = arrays["exits"]
        cdef uint32_t[::1] error_code = arrays["error_code"]
        cdef access_columns out
        cdef stretch columns[6]
        if n == 0:
            return
        if n > min(gpa.shape[0], hpa.shape[0], status.shape[0], ret.shape[0], exits.shape[0], error_code.shape[0]):
            raise ValueError(f"arrays: want {n} rows in each column")
        out.gpa, out.hpa, out.status = &gpa[0], &hpa[0], &status[0]
        out.error_code, out.ret, out.exits = &error_code[0], &ret[0], &exits[0]
        columns_of(&out, n, columns)
        check_apart(columns, 6, 6, COLUMNS)
        cdef uintptr_t rows = gva.ctypes.data, accesses = access.ctypes.data
        if is_written(rows, n * sizeof(uint64_t), columns):
            gva = gva.copy()
            rows = gva.ctypes.data
        if is_written(accesses, access.size, columns):
            access = access.copy()
            accesses = access.ctypes.data
        self.run(<const uint64_t *>rows, <const uint8_t *>accesses, 1 if access.size > 1 else 0, n, &out,
                 seen & ACCESS_SHADOW_STACK_MASK != 0)

    cdef int check_access_bits(self, uint32_t access) except -1:
        """Raise ValueError for accesses that the processor of a guest does not make."""
        if access & ACCESS_PROBE_MASK:
            raise ValueError("access: a PROBE is no access of a processor; ask gva_walk")
        if access & ACCESS_SHADOW_STACK_MASK and not self.kvm.k.tdp_enabled:
            raise ValueError("access: KVM offers shadow stacks with two-dimensional paging alone; want Host(tdp='ept') or 'npt'")
        return 0

    def access_one(self, gva, access, rip, data=None, page_table_writing=True):
        """Make one access, and return it as `Accesses` of integers; a fault of the guest is raised.

        rip: of the instruction under way. data: as of `emulate()`. page_table_writing: see `Vcpu.store()`.
        """
        cdef uint64_t addr = check_scalar_gva(gva), at = check_scalar_word("rip", rip)
        cdef uint32_t a = check_scalar_access(access) | rflags_ac(self.m.arch)
        cdef access_result out
        cdef int r = 0
        self.kvm.lock.acquire()
        try:
            self.modes.enter()
            self.set_data(addr, data)
            self.m.page_table_writing = page_table_writing
            self.m.vcpu.rip = at
            out.fault_gpa, out.exit_qualification = INVALID_GPA, 0
            self.check_access_bits(a)
            addr = machine_linear_address(self.m, addr, a)
            r = machine_access(self.m, addr, explicit_access(a), &out)
            if r < 0:
                raise_errno(r, f"the access to {addr:#x}")
            if out.status != STATUS_OK:
                raise fault_of_access(self.modes.gva_walk, addr, a, &out)
            machine_store(self.m, &out)
        finally:
            self.m.data, self.m.page_table_writing = NULL, True
            self.kvm.lock.release()
        return accesses_of(&out)

    # ---- invalidations by the guest --------------------------------------------------------------------------------------

    def invlpg(self, gva):
        """INVLPG: this vCPU's translations of an address, under every root; a non-canonical one does nothing."""
        cdef uint64_t addr = check_scalar_gva(gva)
        with self.kvm.lock:
            self.modes.update()
            self.kvm.k.stats.invlpg += 1
            invalidate_gva(self.modes, addr, ROOTS_ALL)

    def invalidate_addr(self, gva, current, prev_roots):
        """Drop translations of a linear address, in the TLB and in tables that shadow the guest's, of the roots named."""
        cdef uint64_t addr = check_scalar_gva(gva)
        with self.kvm.lock:
            self.modes.update()
            invalidate_gva(self.modes, addr, roots_of(current, prev_roots))

    def invalidate_ngpa(self, ngpa, current, prev_roots):
        """Drop translations of an address of L2's, in the tables that shadow L1's second stage."""
        cdef uint64_t addr = check_scalar_gva(ngpa)
        with self.kvm.lock:
            self.modes.update()
            invalidate_ngpa(self.modes, addr, roots_of(current, prev_roots))

    def invpcid(self, type, pcid, gva):
        """INVPCID, with arguments that are checked."""
        with self.kvm.lock:
            self.modes.update()
            flush_by_pcid(self.modes, type, pcid, gva)

    def invept(self, eptp):
        """INVEPT by L1, while it runs: roots that shadow its EPT with this EPTP are left, all of them without one (None)."""
        cdef uint64_t pgd = 0 if eptp is None else check_scalar_word("eptp", eptp)
        cdef bint every = eptp is None
        with self.kvm.lock:
            self.modes.update()
            self.kvm.sync()
            flush_ept(self.m, every, pgd)

    def invvpid(self, type, gva):
        """INVVPID by L1, while it runs: translations of L2's, whatever their VPID; type and address as of the instruction."""
        cdef uint64_t addr = check_scalar_word("gva", gva)
        cdef int how = type
        with self.kvm.lock:
            self.modes.update()
            self.kvm.sync()
            flush_vpid(self.m, how, addr)

    def mov_cr3(self, before, noflush, pdptrs_changed):
        """MOV to CR3: translations of its PCID go, global ones excepted, unless the guest keeps them; tables that shadow the
        guest's are found again. IN before: the CR3 until now."""
        with self.kvm.lock:
            self.modes.update()
            load_cr3(self.modes, before, bool(noflush), bool(pdptrs_changed))

    def reset_context(self, flush=False):
        """Leave every root of a shadow MMU: registers that roles are made of were written. flush: as `flush_guest()`, too"""
        with self.kvm.lock:
            self.modes.update()
            leave_roots(self.m)
            if flush:
                flush_all(self.m)

    def flush_guest(self):
        """Drop every translation of the guest, global ones too."""
        with self.kvm.lock:
            self.modes.update()
            flush_all(self.m)

    # ---- what KVM carries out ----------------------------------------------------------------------------------------------

    def emulate(self, gva, access, data=None):
        """Let KVM carry out an access by its own walk, and return (gpa, hpa); a fault of the guest is raised.

        data : bytes, optional
            The bytes of a write, within one page; empty: only try if it would succeed. By default an aligned entry, unchanged.
        """
        cdef uint64_t addr = check_scalar_gva(gva)
        cdef uint32_t a = check_scalar_access(access) | rflags_ac(self.m.arch)
        cdef access_result out
        out.fault_gpa, out.exit_qualification = INVALID_GPA, 0
        with self.kvm.lock:
            self.modes.update()
            self.kvm.sync()                             # no more than that: the guest is not entered for it
            use_arena(self.m)
            if a & (ACCESS_SHADOW_STACK_MASK | ACCESS_PROBE_MASK):
                raise ValueError(f"access: KVM's emulator refuses accesses to shadow stacks; want bits of "
                                 f"{int(ACCESS_PLAIN_MASK):#x}, got {a:#x}")
            addr = machine_linear_address(self.m, addr, a)
            self.set_data(addr, data)
            machine_emulate(self.m, addr & self.m.sw.gva_mask, explicit_access(a), &out)
            self.m.data = NULL
            use_arena(self.m)
            if out.status != STATUS_OK:
                raise fault_of_access(self.modes.gva_walk, addr, a, &out)
        return int(out.gpa), int(out.hpa)

    cdef int set_data(self, uint64_t addr, const uint8_t[::1] data) except -1:
        """Set the bytes of the next access; the caller keeps them."""
        self.m.data, self.m.size = NULL, 0
        if data is not None:
            if <size_t>data.shape[0] > PAGE_SIZE - (addr & PAGE_OFFSET_MASK):
                raise ValueError(f"data: {data.shape[0]} bytes at {addr:#x} reach over the end of a page")
            self.m.size = data.shape[0]
            self.m.data = &data[0] if self.m.size else &NO_DATA[0]
        return 0

    def drain_pml(self):
        """Enter what the processor logged so far in the dirty log."""
        with self.kvm.lock:
            machine_drain_pml(self.m)

    def logged(self):
        """Return what the processor logged and no exit has drained: a set of (address space, guest frame)."""
        cdef int i
        if self.m.vcpu.pml_page == 0:
            return set()
        return {(self.m.vcpu.as_id, self.m.k.sptes[first_spte(self.m.vcpu.pml_page) + i] >> PAGE_SHIFT)
                for i in range(<uint16_t>(self.m.pml.index + 1), PML_ENTITY_NUM)}


cdef void columns_of(const access_columns *out, Py_ssize_t rows, stretch *s) noexcept:
    """OUT s: where the columns are, in the order of COLUMNS"""
    s[0].start, s[1].start, s[2].start = <uintptr_t>out.gpa, <uintptr_t>out.hpa, <uintptr_t>out.error_code
    s[3].start, s[4].start, s[5].start = <uintptr_t>out.status, <uintptr_t>out.ret, <uintptr_t>out.exits
    s[0].bytes = s[1].bytes = rows * sizeof(uint64_t)
    s[2].bytes = rows * sizeof(uint32_t)
    s[3].bytes = s[4].bytes = s[5].bytes = rows


cdef bint is_written(uintptr_t data, size_t size, const stretch *s) noexcept:
    """True if an argument shares memory with a column, which machine_run() writes before it has read all rows."""
    cdef int i
    for i in range(6):
        if data < s[i].start + <uintptr_t>s[i].bytes and s[i].start < data + size:
            return True
    return False


cdef uint8_t NO_DATA[1]


cdef object accesses_of(const access_result *out):
    """Return one access as `Accesses` of integers, without its constructor, which is Python."""
    result = PyType_GenericAlloc(<PyTypeObject *>Accesses, 0)
    result.gpa, result.hpa = out.gpa, out.hpa
    result.status, result.error_code, result.ret, result.exits = out.status, out.error_code, out.ret, out.exits
    return result
