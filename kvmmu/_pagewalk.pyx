"""PageWalk (kvm_pagewalk): one set of guest tables, walked for one address, for arrays, or for a record."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from libc.stdint cimport uint32_t, uint64_t

from kvmmu._arguments cimport check_scalar_access, check_scalar_gva, rflags_ac
from kvmmu._batch cimport Job
from kvmmu._bits cimport (
    ACC_ALL, ACC_USER_MASK, ACCESS_AC_MASK, ACCESS_USER_MASK, CR3_PAE_PDPT_MASK, INVALID_GPA, PAGE_SIZE, ROLE_DIRECT_MASK,
    ROLE_HAS_4_BYTE_GPTE_MASK, STATUS_EPT_MISCONFIG, STATUS_NON_CANONICAL, STATUS_OK, STATUS_PAGE_FAULT, STATUS_PML_FULL,
)
from kvmmu._columns cimport context_column
from kvmmu._contexts cimport Contexts, SecondStage, VcpuArch, fill_format, is_npt, prepare_contexts, role_of, second_stage
from kvmmu._explain cimport entry_rule, second_stage_rule, walk_steps
from kvmmu._format cimport PageFormat, explicit_access, kvm_page_format
from kvmmu._lanes cimport KVMMU_LANES
from kvmmu._memory cimport GuestMemory
from kvmmu._plain cimport init_plain_walk, kvmmu_translation, translate_plainly, use_plain_memory
from kvmmu._walk cimport kvm_pagewalk, second_stage_access, translate_nested_gpa, vcpu_arch, walk_result
from kvmmu._walk_init cimport init_pagewalk, init_second_stage_face, use_second_stage

from kvmmu._bits import Access, Status
from kvmmu._roles import CpuRole
from kvmmu.columns import Span, check_access, check_array, check_size
from kvmmu.faults import fault_of, nested_fault_of
from kvmmu.nested import Ept
from kvmmu.record import WalkRecord

_PAGE = int(PAGE_SIZE)
_BLOCK = int(KVMMU_LANES)               # rows; no two threads write one line of the cache
_PIECES = 8                             # of the rows of a batch, for each thread: the faster ones take more of them


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
        init_plain_walk(&self.plain, &self.w)

    def set_cpu(self, cpu, *, npt_host=False):
        """Take a processor model; the next `init()` builds the format anew. npt_host: the host has nested paging of SVM."""
        self.caps.npt_host = npt_host
        self.caps.maxphyaddr = cpu.maxphyaddr
        self.caps.gbpages = cpu.gbpages
        self.caps.pse36 = cpu.pse36
        self.caps.amd = cpu.vendor == "amd"
        self.caps.kvm = cpu.conformance == "kvm"
        self.w.cpu_role = 0
        init_plain_walk(&self.plain, &self.w)

    def init(self, *, smm=False, guest_mode=False):
        """Take the role of the vCPU's registers; no work if it is the one in force."""
        cdef uint64_t role = role_of(&self.vcpu.arch, smm, guest_mode)
        if role == self.w.cpu_role:
            return
        self.init_count += 1
        init_pagewalk(&self.w, role, &self.caps)
        if not role & ROLE_DIRECT_MASK:
            fill_format(self.fmt, role, &self.caps, False)
        self.use_second()

    def set_second_stage(self, SecondStage second):
        """Let the tables of this walk, and what it comes to, be translated by a second stage; None: by identity."""
        self.second = second
        self.use_second()

    cdef int use_second(self) except -1:
        use_second_stage(&self.w, NULL if self.second is None else &self.second.n,
                         self.caps.npt_host if self.second is None else is_npt(self.second))
        init_plain_walk(&self.plain, &self.w)
        return 0

    def enter(self, stage):
        """Become the second stage that L1 describes (`Ept` or `Npt`); no work if it is the one in force.

        Returns
        -------
        SecondStage
        """
        if self.second is not None and stage == self.second.stage and self.w.cpu_role:
            return self.second
        cdef SecondStage second = second_stage(stage, &self.caps)
        self.init_count += self.second is None or second.n.cpu_role != self.w.cpu_role
        self.second = second
        self.fmt = second.fmt
        init_second_stage_face(&self.w, &second.n)
        init_plain_walk(&self.plain, &self.w)
        return second

    def leave(self):
        """Be no walk any more."""
        self.second = None
        self.w.cpu_role = 0
        init_plain_walk(&self.plain, &self.w)

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
            use_plain_memory(&self.plain, self.w.mem)
        if self.second is not None:
            self.second.use_memory(self.mem)
        return &self.w

    @property
    def cpu_role(self):
        return CpuRole(int(self.w.cpu_role))

    def set_delivery(self, deliver):
        """deliver(fault, from_hardware) says what becomes of a fault of this walk; see `inject_page_fault()`."""
        self.deliver = deliver

    def inject_page_fault(self, fault, from_hardware=None):
        """What a fault of this walk leads to, as `Vcpu.inject()` describes it."""
        return self.deliver(fault, from_hardware)

    def get_guest_pgd(self):
        """The root as it stands: CR3, EPTP or nested CR3."""
        return int(self.second.arch.nested_pgd if self.w.is_nested else self.vcpu.arch.cr3)

    def get_pdptr(self, i):
        """PDPTE i, 0 to 3: a register, or a word in memory in an NPT and under one. Meaningful under PAE paging only."""
        if not 0 <= i < 4:
            raise ValueError(f"a PDPTE is one of 0 to 3, got {i}")
        if self.w.is_nested:
            return self.mem.read_u64((self.get_guest_pgd() & int(CR3_PAE_PDPT_MASK)) + 8 * i)
        if self.w.pdptes_in_memory:
            gpa = (self.get_guest_pgd() & int(CR3_PAE_PDPT_MASK)) + 8 * i
            return self.mem.read_u64(gpa if self.second is None else self.second.pdpt_gpa(self.mem, gpa))
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
        regs : sequence of Regs, or of (Regs, Ept or Npt or None)
            A pair walks under that second stage (None: none), a Regs alone under the one in force, if any. PAE sets without
            `pdptrs` load them from memory here; those under an Npt, or an NPT host, have none.

        Returns
        -------
        Contexts

        Raises
        ------
        GeneralProtection
            A set is illegal; the message names its row.
        """
        if self.w.is_nested:
            raise ValueError("regs: register sets make a first stage; translate them through gva_walk")
        try:
            rows = list(regs)
        except TypeError:
            raise TypeError(f"regs: want a sequence of Regs, got {regs!r}") from None
        return prepare_contexts(rows, self.admit, &self.caps, self.second)

    def reload(self, Contexts contexts, Py_ssize_t i, regs):
        """Load the registers of row i again: PDPTEs as they are in memory now. The role must not change."""
        contexts.reload(i, self.admit(regs, contexts.seconds[i]))

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
            Columns wanted: gpa, status, error_code, level, pte, pte_gpa, pte_access, refs, ngpa, fault_gpa,
            exit_qualification.
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
        cdef Job job = Job()
        cdef Py_ssize_t n = job.take_rows(gva, access)
        cdef Contexts contexts = None
        cdef kvm_pagewalk own
        cdef vcpu_arch arch
        cdef kvm_page_format fmt
        cdef const kvm_pagewalk *walks = &own
        cdef const uint32_t *ctx_data = NULL
        self.current()
        if not isinstance(threads, int) or threads < 1:
            raise ValueError(f"threads: want a positive integer, got {threads!r}")
        if regs is not None:
            contexts = regs if isinstance(regs, Contexts) else self.prepare(regs)
            ctx_data = context_column(ctx, n, contexts.count)
            contexts.use_memory(self.mem)
            walks = contexts.walks
        elif ctx is not None:
            raise ValueError("ctx: needs regs, the register sets that it indexes")
        else:
            own = self.current()[0]                 # a snapshot: other threads may load registers meanwhile
            arch, fmt = own.vcpu[0], own.fmt[0]
            own.vcpu, own.fmt = &arch, &fmt

        out = job.take_columns(out, fields, n)
        if n == 0:
            return out
        job.alive = (self.mem.table, contexts, self.second, ctx)
        job.whole.walks, job.whole.ctx, job.whole.set_ad = walks, ctx_data, set_ad
        job.count = contexts.count if contexts is not None else 1
        if threads == 1 or n < threads * _BLOCK:
            job.run(n, n)
        else:
            piece = -(-n // (threads * _PIECES) // _BLOCK) * _BLOCK
            with ThreadPoolExecutor(threads - 1) as pool:
                others = [pool.submit(job.run, n, piece) for _ in range(threads - 1)]
                job.run(n, piece)
                for other in others:
                    other.result()
        return out

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
        cdef uint32_t a = check_scalar_access(access) | rflags_ac(&self.vcpu.arch)
        cdef kvmmu_translation t
        if not self.w.cpu_role or self.table is not self.mem.table:
            self.current()
        t = translate_plainly(&self.plain, self.w.vcpu, addr, a)
        return t.gpa if t.gpa != INVALID_GPA else self.gva_to_gpa_slowly(addr, a)

    cdef object gva_to_gpa_slowly(self, uint64_t gva, uint32_t access):
        cdef walk_result r                          # the short cut did not succeed
        self.current().gva_to_gpa(&self.w, gva, explicit_access(access), True, &r)
        if r.status != STATUS_OK:
            raise self.fault(&r, gva & self.w.gva_mask, access)
        return r.gpa

    cdef object fault(self, const walk_result *r, uint64_t addr, uint32_t access):
        """The exception behind a result."""
        details = {"address": int(addr), "access": Access(access), "level": int(r.level), "entry": int(r.pte),
                   "entry_gpa": int(r.pte_gpa) if r.pte_gpa != INVALID_GPA else None, "rule": self.rule_of(r, access)}
        if r.status in (STATUS_PAGE_FAULT, STATUS_NON_CANONICAL):
            return fault_of(r.status, error_code=int(r.error_code), **details)
        return nested_fault_of(
            r.status, fault_gpa=int(r.fault_gpa), exit_qualification=int(r.exit_qualification), **details)

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
        gva = int(check_scalar_gva(gva))
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

    cdef object rule_of(self, const walk_result *r, uint32_t access):
        """The rule behind a fault, as one word."""
        if r.status == STATUS_NON_CANONICAL:
            return "non-canonical"
        if r.status == STATUS_PAGE_FAULT:
            return entry_rule(self.fmt, r, r.error_code, access)
        if r.status == STATUS_EPT_MISCONFIG:
            return "misconfig"
        if r.status == STATUS_PML_FULL:
            return "pml-full"
        return second_stage_rule(self.second.fmt, r, access)

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
        cdef uint32_t a = check_scalar_access(access) | rflags_ac(&self.vcpu.arch)
        cdef const kvm_pagewalk *w = self.current()
        if self.w.is_nested:
            return self.second_record(addr, a & ~<uint32_t>ACCESS_AC_MASK, True, a)
        cdef walk_result r
        w.gva_to_gpa(w, addr, explicit_access(a), False, &r)
        addr &= w.gva_mask
        steps = walk_steps(w, addr, explicit_access(a))
        final = None
        if self.second is not None:
            table_access = self.second.n.table_access | <uint32_t>ACCESS_USER_MASK
            steps = [replace(step, nested=self.second_record(step.gpa, table_access, False, 0)) if step.gpa is not None else step
                     for step in steps]
            if r.ngpa != INVALID_GPA:
                final = self.second_record(r.ngpa, explicit_access(a), True, r.pte_access if r.status == STATUS_OK else (
                    steps[-1].pte_access if steps else int(ACC_ALL)))
        return WalkRecord(
            gva=int(addr), access=Access(a), status=Status(r.status), gpa=int(r.gpa) if r.status == STATUS_OK else None,
            error_code=int(r.error_code), level=int(r.level), rule=None if r.status == STATUS_OK else self.rule_of(&r, a),
            steps=tuple(steps), mode_bits=32 if w.cpu_role & ROLE_HAS_4_BYTE_GPTE_MASK else 64, refs=int(r.refs), final=final,
            ngpa=int(r.ngpa) if self.second is not None and r.ngpa != INVALID_GPA else None,
            exit_qualification=int(r.exit_qualification))

    def second_stage_gpa(self, gpa, access, pte_access, final=True):
        """This second stage for an access that the first stage granted with rights pte_access; see `Vcpu.translate_gpa()`.

        final False: an access to a paging-structure entry of the first stage.
        """
        cdef uint64_t addr = check_scalar_gva(gpa)
        cdef uint32_t a = check_scalar_access(access)
        cdef walk_result r
        self.current()
        r.refs = 0
        r.error_code = 0
        r.status = translate_nested_gpa(&self.second.n, addr, explicit_access(a), final, pte_access, True, &r.gpa, &r)
        if r.status != STATUS_OK:
            raise self.fault(&r, addr, a)
        return r.gpa

    cdef object second_record(self, uint64_t ngpa, uint32_t access, bint final, uint32_t pte_access):
        """The record of one walk of the second stage."""
        cdef const kvm_pagewalk *n = &self.second.n
        cdef walk_result r
        cdef uint64_t gpa = 0
        if self.w.is_nested:                    # by itself: U says whether the first stage would grant the page to users
            pte_access = <uint32_t>(ACC_ALL if access & ACCESS_USER_MASK else ACC_ALL & ~ACC_USER_MASK)
        r.refs = 0
        r.error_code = 0
        status = translate_nested_gpa(n, ngpa, access, final, pte_access, False, &gpa, &r)
        r.status = status
        steps = walk_steps(n, ngpa & n.gva_mask, second_stage_access(n, access, final, pte_access))
        if isinstance(self.second.stage, Ept):
            steps = [replace(step, ept=True) for step in steps]
        return WalkRecord(
            gva=int(ngpa), access=Access(access), status=Status(status), gpa=int(gpa) if status == STATUS_OK else None,
            error_code=0, level=steps[-1].level if steps else 0, rule=None if status == STATUS_OK else self.rule_of(&r, access),
            steps=tuple(steps), mode_bits=32 if n.cpu_role & ROLE_HAS_4_BYTE_GPTE_MASK else 64, refs=int(r.refs),
            exit_qualification=int(r.exit_qualification) if status != STATUS_OK else 0)

    def __repr__(self):
        return f"<PageWalk level {self.cpu_role.level} of {self.mem!r}>"
