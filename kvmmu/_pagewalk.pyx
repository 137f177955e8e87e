"""PageWalk (kvm_pagewalk): one set of guest tables, walked for one address, for arrays, or for a record."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t

from kvmmu._batch cimport batch_columns, translate_rows
from kvmmu._bits cimport (
    ACCESS_VALID_MASK, INVALID_GPA, PAGE_SHIFT, PAGE_SIZE, PFERR_PK_MASK, PFERR_PRESENT_MASK, PFERR_RSVD_MASK,
    PFERR_RSVD_SHIFT, PT32_INDEX_BITS, PT64_INDEX_BITS, PT_MAX_LEVELS, RFLAGS_AC_SHIFT, ROLE_DIRECT_MASK,
    ROLE_HAS_4_BYTE_GPTE_MASK, STATUS_NON_CANONICAL, STATUS_OK,
)
from kvmmu._contexts cimport Contexts, VcpuArch, fill_format, prepare_contexts, role_of
from kvmmu._format cimport PageFormat, explicit_access, kvm_page_format
from kvmmu._memory cimport GuestMemory, SlotTable
from kvmmu._walk cimport init_pagewalk, kvm_pagewalk, vcpu_arch, walk_result, walk_step

from kvmmu._bits import Access, Status
from kvmmu._roles import CpuRole
from kvmmu.columns import Span, check_access, check_array, check_out, check_size
from kvmmu.faults import fault_of
from kvmmu.record import WalkRecord, WalkStep

_GVA_LIMIT = 1 << 64
_PAGE = int(PAGE_SIZE)


cdef uint32_t check_scalar_access(access) except? 0xffffffff:
    """An access of a scalar call."""
    cdef uint64_t value
    try:
        value = access
    except OverflowError:
        value = _GVA_LIMIT - 1
    if value & ~ACCESS_VALID_MASK:
        check_access(access, 1)
    return <uint32_t>value


cdef uint64_t check_scalar_gva(gva) except? 0xffffffffffffffff:
    try:
        return gva
    except OverflowError:
        raise ValueError(f"gva: want 0 to {_GVA_LIMIT - 1:#x}, got {gva:#x}") from None


cdef void *column(name, columns, Py_ssize_t n) except? NULL:
    """Data pointer of an output column, NULL if it is not wanted. The array stays alive through `columns`."""
    array = columns.get(name)
    if array is None or n == 0:
        return NULL
    return <void *><uintptr_t>array.ctypes.data


cdef class PageWalk:
    """How one vCPU walks one set of guest tables. Made by a Vcpu, never alone.

    Attributes
    ----------
    fmt : PageFormat
        What the entries of these tables mean. Stale, and never used, while paging is off.
    cpu_role : CpuRole
    mem : GuestMemory
    init_count : int
        How often the role changed and the format was built again.
    """

    def __init__(self, GuestMemory mem, VcpuArch vcpu, admit):
        """admit: maps a `Regs` to one that is legal, with PDPTEs loaded, or raises GeneralProtection."""
        self.mem = mem
        self.vcpu = vcpu
        self.admit = admit
        self.fmt = PageFormat()
        self.w.vcpu = &vcpu.arch
        self.w.fmt = &self.fmt.fmt
        self.w.cpu_role = 0                         # not valid: equal to no role

    def set_cpu(self, cpu):
        """Take a processor model; the next `init()` builds the format anew."""
        self.caps.maxphyaddr = cpu.maxphyaddr
        self.caps.gbpages = cpu.gbpages
        self.caps.pse36 = cpu.pse36
        self.caps.amd = cpu.vendor == "amd"
        self.caps.kvm = cpu.conformance == "kvm"
        self.w.cpu_role = 0

    def init(self, *, smm=False, guest_mode=False):
        """Take the role of the vCPU's registers; no work if it is the one in force."""
        cdef uint64_t role = role_of(&self.vcpu.arch, smm, guest_mode)
        if role == self.w.cpu_role:
            return
        self.init_count += 1
        init_pagewalk(&self.w, role, &self.caps)
        if not role & ROLE_DIRECT_MASK:
            fill_format(self.fmt, role, &self.caps)

    def set_memory(self, GuestMemory mem):
        """Walk in another address space (SMM)."""
        self.mem = mem

    cdef const kvm_pagewalk *current(self) except NULL:
        """The walk over the slots of this moment."""
        if not self.w.cpu_role:
            raise RuntimeError("this walk is not in use: no registers make it one")
        if self.table is not self.mem.table:
            self.table = self.mem.table
            self.w.mem = &self.table.mem
        return &self.w

    @property
    def cpu_role(self):
        return CpuRole(int(self.w.cpu_role))

    def get_guest_pgd(self):
        """The root register as it stands: CR3."""
        return int(self.vcpu.arch.cr3)

    def get_pdptr(self, i):
        """PDPTE register i, 0 to 3. Meaningful under PAE paging only."""
        if not 0 <= i < 4:
            raise ValueError(f"a PDPTE register is one of 0 to 3, got {i}")
        return int(self.vcpu.arch.pdptrs[i])

    def permission_fault(self, pte_access, pkey, access):
        """Whether rights, or PKRU, deny an access.

        Parameters
        ----------
        pte_access : int or array_like
            Rights of a translation (`Acc`).
        pkey : int or array_like
            Its protection key, 0 to 15.
        access : Access or array_like
            The three broadcast.

        Returns
        -------
        uint32 or ndarray of uint32
            0 if allowed, else P, with PK where the key forbids it.
        """
        return self.fmt.permission_fault(pte_access, pkey, access, self.vcpu.arch.pkru)

    def prepare(self, regs):
        """Check and prepare register sets for repeated `translate(regs=...)` calls.

        Parameters
        ----------
        regs : sequence of Regs
            PAE sets without `pdptrs` load them from memory here.

        Returns
        -------
        Contexts

        Raises
        ------
        GeneralProtection
            A set is illegal; the message names its row.
        """
        return prepare_contexts(list(regs), self.admit, &self.caps)

    def reload(self, Contexts contexts, Py_ssize_t i, regs):
        """Load the registers of row i again: PDPTEs as they are in memory now. The role must not change."""
        contexts.reload(i, self.admit(regs))

    def translate(self, gva, access=0, *, regs=None, ctx=None, fields=("gpa", "status", "error_code"), set_ad=True, threads=1,
                  out=None):
        """Translate many linear addresses through this walk.

        Parameters
        ----------
        gva : ndarray of uint64, shape (n,), C-contiguous
            Linear addresses (bytes). Need not be canonical.
        access : Access or ndarray of uint8, shape (n,)
            Intended access of each row. The vCPU's EFLAGS.AC is not added: say `Access.AC`.
        regs : sequence of Regs, or Contexts, optional
            Register sets instead of the vCPU's own; see `prepare()`.
        ctx : ndarray of uint32, shape (n,), optional
            Row of `regs` for each address; needed if `regs` has more than one.
        fields : sequence of str
            Columns wanted: gpa, status, error_code, level, pte, pte_gpa, pte_access, refs.
        set_ad : bool
            False suppresses the stores of accessed and dirty bits, and nothing else.
        threads : int
            Threads to share the rows among.
        out : Translation, optional
            Columns to reuse: those of `fields`, n rows each.

        Returns
        -------
        Translation

        Raises
        ------
        ValueError
            Wrong dtype, shape or contiguity, a bit in `access` that is not modelled, a `ctx` out of range.
        GeneralProtection
            A register set of `regs` is illegal.

        Notes
        -----
        Guest faults are data, not exceptions. Rows are unordered; registers and roles are taken once, at entry. Sets A/D
        bits: yes, unless set_ad is False. Releases the GIL: yes.

        Source: SDM vol. 3, "4-Level Paging and 5-Level Paging", "Access Rights", "Page-Fault Exceptions".
        """
        cdef Py_ssize_t n = check_array("gva", gva, np.dtype(np.uint64)).size
        cdef Contexts contexts = None
        cdef kvm_pagewalk own
        cdef vcpu_arch arch
        cdef kvm_page_format fmt
        cdef const kvm_pagewalk *walks = &own
        cdef const uint32_t *ctx_data = NULL
        cdef batch_columns columns
        cdef bint ad = bool(set_ad)
        if not isinstance(threads, int) or threads < 1:
            raise ValueError(f"threads: want a positive integer, got {threads!r}")
        access = check_access(access, n)
        if regs is not None:
            contexts = regs if isinstance(regs, Contexts) else self.prepare(regs)
            ctx_data = <const uint32_t *><uintptr_t>self._check_ctx(contexts, ctx, n)
            contexts.use_memory(self.mem)
            walks = contexts.walks
        elif ctx is not None:
            raise ValueError("ctx: needs regs, the register sets that it indexes")
        else:
            own = self.current()[0]                 # a snapshot: other threads may load registers meanwhile
            arch, fmt = own.vcpu[0], own.fmt[0]
            own.vcpu, own.fmt = &arch, &fmt

        out, wanted = check_out(out, fields, n)
        columns.gpa = <uint64_t *>column("gpa", wanted, n)
        columns.status = <uint8_t *>column("status", wanted, n)
        columns.error_code = <uint32_t *>column("error_code", wanted, n)
        columns.level = <uint8_t *>column("level", wanted, n)
        columns.pte = <uint64_t *>column("pte", wanted, n)
        columns.pte_gpa = <uint64_t *>column("pte_gpa", wanted, n)
        columns.pte_access = <uint8_t *>column("pte_access", wanted, n)
        columns.refs = <uint8_t *>column("refs", wanted, n)
        if n == 0:
            return out

        cdef const uint64_t[::1] gvas = gva
        cdef const uint8_t[::1] accesses = access
        cdef size_t stride = 1 if accesses.shape[0] == n and n > 1 else 0
        job = _Job(self.mem.table)
        (<_Job>job).walks, (<_Job>job).ctx, (<_Job>job).gva = walks, ctx_data, &gvas[0]
        (<_Job>job).access, (<_Job>job).stride, (<_Job>job).columns, (<_Job>job).set_ad = &accesses[0], stride, columns, ad
        if threads == 1 or n < threads:
            job.run(0, n)
        else:
            bounds = [n * i // threads for i in range(threads + 1)]
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(job.run, bounds[:-1], bounds[1:]))
        return out

    def _check_ctx(self, Contexts contexts, ctx, n):
        """Address of the checked context column, 0 where one context serves all rows."""
        if ctx is None:
            if contexts.count != 1:
                raise ValueError(f"ctx: {contexts.count} register sets need a ctx that says which one each row uses")
            return 0
        check_array("ctx", ctx, np.dtype(np.uint32), n)
        if n and int(ctx.max()) >= contexts.count:
            raise ValueError(f"ctx: {int(ctx.max())} is beyond the {contexts.count} register sets of regs")
        return ctx.ctypes.data if n else 0

    def gva_to_gpa(self, gva, access=0):
        """Translate one linear address; a fault of the guest is an exception.

        Parameters
        ----------
        gva : int
            Linear address (bytes), 64 bits.
        access : Access
            EFLAGS.AC of the vCPU is added.

        Returns
        -------
        int
            The physical address (bytes).

        Raises
        ------
        PageFault, GeneralProtection
            With `.error_code .address .level .entry .entry_gpa .rule`.
        ValueError
            An address or access out of range.
        """
        cdef uint64_t addr = check_scalar_gva(gva)
        cdef uint32_t a = check_scalar_access(access) | self.rflags_ac()
        cdef walk_result r
        self.current().gva_to_gpa(&self.w, addr, explicit_access(a), True, &r)
        if r.status != STATUS_OK:
            raise fault_of(
                r.status, address=int(addr & self.w.gva_mask), access=Access(a), error_code=int(r.error_code), level=int(r.level),
                entry=int(r.pte), entry_gpa=int(r.pte_gpa) if r.pte_gpa != INVALID_GPA else None, rule=self.rule_of(&r, a))
        return r.gpa

    def span(self, gva, size, access=0):
        """Translate one access of size bytes, which may cross into the next page: that page is walked second.

        Parameters
        ----------
        gva : int
            Linear address of the first byte.
        size : int
            Bytes, 1 to 4096.
        access : Access

        Returns
        -------
        list of (int, int)
            Physical address and length of each part, one or two.

        Raises
        ------
        PageFault, GeneralProtection
            `address` is in the page that failed: the first byte of the next page if it is that one. The accessed and dirty
            bits of the first page are set by then.
        """
        length = int(check_size(size, 1)[0])
        first = min(length, _PAGE - gva % _PAGE)
        parts = [(self.gva_to_gpa(gva, access), first)]
        if first < length:
            parts.append((self.gva_to_gpa((gva + first) & int(self.w.gva_mask), access), length - first))
        return parts

    def translate_span(self, gva, size, access=0, *, regs=None, ctx=None, set_ad=True, threads=1):
        """Translate many accesses that may cross into the next page, each as `span()` does.

        Parameters
        ----------
        gva : ndarray of uint64, shape (n,), C-contiguous
            Linear addresses of the first bytes.
        size : int or ndarray of unsigned integers, shape (n,)
            Bytes, 1 to 4096.
        access, regs, ctx, set_ad, threads
            As for `translate()`.

        Returns
        -------
        Span
        """
        n = check_array("gva", gva, np.dtype(np.uint64)).size
        last = gva % np.uint64(_PAGE) + check_size(size, n) - np.uint64(1)
        access = check_access(access, n)
        if regs is not None and not isinstance(regs, Contexts):
            regs = self.prepare(regs)
        how = {"regs": regs, "set_ad": set_ad, "threads": threads}
        t = self.translate(gva, access if access.size == n else int(access[0]), ctx=ctx, **how)
        faulted = t.status != STATUS_OK
        width = self.widths(regs, ctx)
        result = Span(t.gpa, np.full(n, INVALID_GPA, np.uint64), t.status, t.error_code,
                      np.where(faulted, gva & width, np.uint64(0)))
        rows = np.flatnonzero((last >= _PAGE) & ~faulted)
        # the page after 2**64, or after 2**32 outside long mode, is page 0: the walk takes the address modulo its width
        following = (gva[rows] & ~np.uint64(_PAGE - 1)) + np.uint64(_PAGE)
        t = self.translate(following, access[rows] if access.size == n and n != 1 else int(access[0]) if access.size else 0,
                           ctx=None if ctx is None else ctx[rows], **how)
        faulted = t.status != STATUS_OK
        result.gpa_next[rows], result.status[rows], result.error_code[rows] = t.gpa, t.status, t.error_code
        result.address[rows] = np.where(faulted, following & (width if np.ndim(width) == 0 else width[rows]), np.uint64(0))
        return result

    cdef object widths(self, Contexts contexts, ctx):
        """Masks of the linear-address width: of this walk, of a single context, or one per row."""
        if contexts is None:
            return np.uint64(self.w.gva_mask)
        masks = contexts.widths()
        return masks[0] if ctx is None else masks[ctx]

    cdef uint32_t rflags_ac(self) noexcept:
        return <uint32_t>((self.vcpu.arch.rflags >> RFLAGS_AC_SHIFT) & 1) << PFERR_RSVD_SHIFT

    cdef object rule_of(self, const walk_result *r, uint32_t access):
        """The rule behind a fault, as one word."""
        if r.status == STATUS_NON_CANONICAL:
            return "non-canonical"
        if not r.error_code & PFERR_PRESENT_MASK:
            return "hole" if r.hole else "not-present"
        if r.error_code & PFERR_RSVD_MASK:
            return "reserved"
        return self.fmt.rule(r.pte_access, access, pkey_denied=bool(r.error_code & PFERR_PK_MASK))

    def walk_record(self, gva, access=0):
        """The whole walk of one linear address, level by level. Never raises for a guest fault, and sets no A/D bits.

        Parameters
        ----------
        gva : int
            Linear address (bytes).
        access : Access
            EFLAGS.AC of the vCPU is added.

        Returns
        -------
        WalkRecord
        """
        cdef uint64_t addr = check_scalar_gva(gva)
        cdef uint32_t a = check_scalar_access(access) | self.rflags_ac()
        cdef const kvm_pagewalk *w = self.current()
        cdef walk_step steps[PT_MAX_LEVELS]
        cdef walk_result r
        cdef int i, n = w.walk_steps(w, addr, explicit_access(a), steps)
        cdef int bits = PT32_INDEX_BITS if w.cpu_role & ROLE_HAS_4_BYTE_GPTE_MASK else PT64_INDEX_BITS
        w.gva_to_gpa(w, addr, explicit_access(a), False, &r)
        addr &= w.gva_mask
        acc, entries = 15, []
        for i in range(n):
            in_register = steps[i].pte_gpa == INVALID_GPA
            rights = 15 if in_register and steps[i].access else int(steps[i].access)    # a PDPTE gives and takes none
            acc &= rights
            entries.append(WalkStep(
                level=steps[i].level, index=int((addr >> (PAGE_SHIFT + bits * (steps[i].level - 1))) & ((1 << bits) - 1)),
                gpa=None if in_register else int(steps[i].pte_gpa), entry=int(steps[i].pte),
                access=rights, pte_access=acc))
        return WalkRecord(
            gva=int(addr), access=Access(a), status=Status(r.status), gpa=int(r.gpa) if r.status == STATUS_OK else None,
            error_code=int(r.error_code), level=int(r.level), rule=None if r.status == STATUS_OK else self.rule_of(&r, a),
            steps=tuple(entries), mode_bits=32 if w.cpu_role & ROLE_HAS_4_BYTE_GPTE_MASK else 64)

    def __repr__(self):
        return f"<PageWalk level {self.cpu_role.level} of {self.mem!r}>"


cdef class _Job:
    """One batch, so that threads can run parts of it."""
    cdef SlotTable table                # keeps the slots alive
    cdef const kvm_pagewalk *walks
    cdef const uint32_t *ctx
    cdef const uint64_t *gva
    cdef const uint8_t *access
    cdef size_t stride
    cdef batch_columns columns
    cdef bint set_ad

    def __cinit__(self, SlotTable table):
        self.table = table

    def run(self, size_t start, size_t stop):
        with nogil:
            translate_rows(self.walks, self.ctx, self.gva, self.access, self.stride, start, stop, self.set_ad, &self.columns)
