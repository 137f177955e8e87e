"""PageWalk (kvm_pagewalk): one set of guest tables, walked for one address, for arrays, or for a record."""

from libc.stdint cimport uint32_t, uint64_t

from kvmmu._walk cimport get_guest_pgd, linear_address, translate_nested_gpa, walk_result
from kvmmu.arch._bits cimport ACC_ALL, INVALID_GPA, MAXPHYADDR_MIN, PAGE_SIZE, PKRU_SHIFT, ROLE_DIRECT_MASK, STATUS_OK
from kvmmu.arch._format cimport PageFormat, explicit_access, resolved_access
from kvmmu.arch._gpte cimport kvmmu_pdpte_gpa
from kvmmu.memory._maker cimport check_maker, maker
from kvmmu.memory._memory cimport NEVER_SEEN, GuestMemory, SlotTable
from kvmmu.walk._arguments cimport check_scalar_access, check_scalar_gva, check_scalar_word, is_plain_access
from kvmmu.walk._explain cimport fault_behind
from kvmmu.walk._fast cimport init_fast_walk, kvmmu_translation, translate_fast, use_fast_memory
from kvmmu.walk._mappings cimport TableQueries, repeat_faults, translate_spans, walk_wholly, whole_record
from kvmmu.walk._register_sets cimport RegisterSetWalks, RegisterSets, WalkCopy, copy_walk, prepare_register_sets
from kvmmu.walk._second_stage cimport SecondStage, is_npt, second_stage
from kvmmu.walk._setup cimport fill_format, init_pagewalk, init_second_stage_walk, use_second_stage
from kvmmu.walk._vcpu_arch cimport VcpuArch, lam_of, rflags_ac, role_of
from kvmmu.walk.batch._arrays cimport exact_access, exact_column
from kvmmu.walk.batch._job cimport Job, new_job

from kvmmu.arch._roles import CpuRole
from kvmmu.arch.arguments import check_bool, check_int, check_threads
from kvmmu.arch.registers import CpuModel
from kvmmu.arch.second_stages import Ept, Npt
from kvmmu.walk.results import Translation, check_fields, check_one_size

_PAGE = int(PAGE_SIZE)


def new_walk(GuestMemory mem not None, VcpuArch vcpu not None, admit not None):
    """Return a walk of a vCPU. IN admit: maps (Regs, SecondStage or None) to a legal `Regs`, with PDPTEs loaded, or raises."""
    cdef PageWalk walk = PageWalk.__new__(PageWalk, maker())
    walk.mem, walk.vcpu, walk.admit = mem, vcpu, admit
    walk.w.vcpu = walk.registers = &vcpu.arch
    return walk


cdef class PageWalk(TableQueries):
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

    def __cinit__(self, mark=None, *args):
        check_maker(mark, "a PageWalk is made by a Vcpu, as its gva_walk and its ngpa_walk")
        self.table = NEVER_SEEN
        self.format = PageFormat()
        self.w.fmt = &self.format.fmt
        self.w.cpu_role = 0                         # not valid: equal to no role
        self.caps.maxphyaddr = MAXPHYADDR_MIN
        init_fast_walk(&self.fast, &self.w)

    # ---- for the vCPU --------------------------------------------------------------------------------------------------

    cdef int changed(self) except -1:
        """Drop what was derived from the walk."""
        self.table = NEVER_SEEN
        init_fast_walk(&self.fast, &self.w)
        self.copy = None
        return 0

    def _set_cpu(self, cpu not None, *, npt_host=False):
        """Take a processor model; the next `_init()` builds the format anew. npt_host: the host has nested paging of SVM."""
        if not isinstance(cpu, CpuModel):
            raise TypeError(f"cpu: want a CpuModel, got {type(cpu).__name__}")
        self.caps.npt_host = npt_host
        self.caps.maxphyaddr = cpu.maxphyaddr
        self.caps.gbpages = cpu.gbpages
        self.caps.pse36 = cpu.pse36
        self.caps.amd = cpu.vendor == "amd"
        self.caps.kvm = cpu.conformance == "kvm"
        self.caps.encryption_mask = cpu.encryption_mask
        self.cpu = cpu
        self.w.cpu_role = 0
        self.changed()

    def _init(self, *, smm=False, guest_mode=False):
        """Take the role of the vCPU's registers; no work if it is the one in force."""
        cdef uint64_t role = role_of(&self.vcpu.arch, check_bool("smm", smm), check_bool("guest_mode", guest_mode))
        cdef uint64_t lam = lam_of(&self.vcpu.arch)
        cdef PageFormat fmt
        if role == self.w.cpu_role and lam == self.w.lam:
            return
        self.init_count += role != self.w.cpu_role
        if not role & ROLE_DIRECT_MASK and role != self.w.cpu_role:
            fmt = PageFormat()                      # copies of the walk may have the one before
            fill_format(fmt, role, &self.caps, False)
            self.w.fmt = &fmt.fmt
            self.format = fmt
        init_pagewalk(&self.w, role, lam, &self.caps)
        self.w.vcpu = &self.vcpu.arch
        self.use_second()

    def _set_second_stage(self, SecondStage second):
        """Translate the tables of this walk, and its results, by a second stage; None: by identity."""
        if self.w.is_nested:
            raise RuntimeError("this walk is a second stage: there is none under it")
        self.second = second
        self.use_second()

    cdef int use_second(self) except -1:
        use_second_stage(&self.w, NULL if self.second is None else &self.second.n,
                         self.caps.npt_host if self.second is None else is_npt(self.second))
        return self.changed()

    def _enter(self, stage not None):
        """Become the second stage that L1 describes (`Ept` or `Npt`), or a SecondStage made before; no work if it is in force.

        Returns
        -------
        SecondStage
        """
        if not isinstance(stage, (Ept, Npt, SecondStage)):
            raise TypeError(f"stage: want an Ept or an Npt, got {type(stage).__name__}")
        if self.second is not None and stage == self.second.stage and self.w.cpu_role:
            return self.second
        cdef SecondStage second = stage if isinstance(stage, SecondStage) else second_stage(stage, &self.caps)
        self.init_count += self.second is None or second.n.cpu_role != self.w.cpu_role
        init_second_stage_walk(&self.w, &second.n)
        self.format = second.fmt
        self.second = second
        self.changed()
        return second

    def _leave(self):
        """Put the walk out of use."""
        self.w.cpu_role = 0
        self.w.is_nested = False
        self.w.ngpa, self.w.vcpu = NULL, &self.vcpu.arch
        self.second = None
        self.changed()

    def _set_memory(self, GuestMemory mem not None):
        """Walk in another address space (SMM)."""
        self.mem = mem
        self.changed()

    def _set_delivery(self, deliver):
        """deliver(fault, from_hardware) says what becomes of a fault of this walk; see `inject_page_fault()`."""
        self.deliver = deliver

    def _second_stage_gpa(self, gpa, access, pte_access, final=True):
        """This second stage for an access that the first stage granted with rights pte_access; see `Vcpu.translate_gpa()`.

        final False: an access to a paging-structure entry of the first stage.
        """
        cdef uint64_t addr = check_scalar_word("gpa", gpa)
        cdef uint32_t a = check_scalar_access(access), rights = check_int("pte_access", pte_access, 0, ACC_ALL)
        cdef bint last = check_bool("final", final)
        cdef SlotTable table = self.mem.walked()
        cdef WalkCopy walk = self.now(table)
        cdef walk_result r
        if walk.second is None:
            raise RuntimeError("this walk has no second stage")
        r.refs = 0
        r.error_code = 0
        r.status = translate_nested_gpa(&walk.n, addr, explicit_access(a), last, rights, True, &r.gpa, &r)
        if r.status != STATUS_OK and self.mem.fetch_missing(table):
            return self._second_stage_gpa(gpa, access, pte_access, final)
        if r.status != STATUS_OK:
            raise fault_behind(walk, &r, addr, a)
        return r.gpa

    # ---- what it is ----------------------------------------------------------------------------------------------------

    cdef int check_in_use(self) except -1:
        if not self.w.cpu_role:
            raise RuntimeError("this walk is not in use: no registers make it one")
        return 0

    cdef WalkCopy now(self, SlotTable table):
        cdef WalkCopy copy = self.copy
        if copy is None or copy.loads != self.vcpu.loads or copy.table != table.number:
            self.check_in_use()
            copy = copy_walk(&self.w, self.vcpu, self.format, self.second, table)
            self.copy = copy
        return copy

    cdef int use_memory(self) except -1:
        """Give the fast path the slots of this moment."""
        cdef SlotTable table
        self.check_in_use()
        table = self.mem.walked()
        self.table = table.number
        use_fast_memory(&self.fast, &table.mem)
        return 0

    @property
    def cpu_role(self):
        return CpuRole(int(self.w.cpu_role))

    @property
    def fmt(self):
        if not self.w.cpu_role:
            self.check_in_use()
        return self.format

    def inject_page_fault(self, fault, from_hardware=None):
        """Deliver a fault of this walk, as `Vcpu.inject()` describes it."""
        return self.deliver(fault, from_hardware)

    def __reduce__(self):
        raise TypeError("a PageWalk cannot be copied or pickled: it is part of its Vcpu")

    def get_guest_pgd(self):
        """Return the root as it stands: CR3, EPTP or nested CR3."""
        self.check_in_use()
        return int(get_guest_pgd(&self.w))

    def get_pdptr(self, i):
        """Return PDPTE i, 0 to 3, of PAE paging: a register; in an NPT, under one, and on an NPT host a word in memory.

        Raises
        ------
        ValueError
            No such PDPTE.
        RuntimeError
            The walk is not in use.
        NestedFault
            The second stage does not map the word.
        """
        self.check_in_use()
        i = check_int("i", i, 0, 3)
        if self.w.is_nested:
            return self.mem.read_u64(kvmmu_pdpte_gpa(get_guest_pgd(&self.w), i))
        if self.w.pdptes_in_memory:
            gpa = kvmmu_pdpte_gpa(get_guest_pgd(&self.w), i)
            return self.mem.read_u64(gpa if self.second is None else self.second.pdpt_gpa(self.mem, gpa))
        return int(self.vcpu.arch.pdptrs[i])

    def permission_fault(self, pte_access, pkey, access):
        """Return the error-code bits of an access that rights, or PKRU or PKRS, deny.

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
        self.check_in_use()
        cdef uint64_t keys = self.vcpu.arch.keys
        return self.format.permission_fault(pte_access, pkey, access, keys >> PKRU_SHIFT, <uint32_t>keys)

    def prepare(self, regs):
        """Check and prepare register sets for repeated `translate(regs=...)` calls.

        Parameters
        ----------
        regs : sequence of Regs, or of (Regs, Ept or Npt or None)
            A pair walks under that second stage (None: none), a Regs alone under the one in force, if any. PAE sets without
            `pdptrs` load them from memory here; those under an Npt, or an NPT host, have none.

        Returns
        -------
        RegisterSets

        Raises
        ------
        GeneralProtection
            A set is illegal; the message names its row.
        """
        self.check_in_use()
        if self.w.is_nested:
            raise ValueError("regs: register sets make a first stage; translate them through gva_walk")
        try:
            rows = list(regs)
        except TypeError:
            raise TypeError(f"regs: want a sequence of Regs, got {regs!r}") from None
        return prepare_register_sets(rows, self.admit, self.cpu, &self.caps, self.second)

    cdef int check_contexts(self, RegisterSets contexts) except -1:
        """Register sets are for walks like the one that prepared them."""
        self.check_in_use()
        if self.w.is_nested:
            raise ValueError("regs: register sets make a first stage; translate them through gva_walk")
        return contexts.check(self.cpu, self.second, self.caps.npt_host)

    def translate(self, gva, access=0, *, regs=None, ctx=None, fields=("gpa", "status", "error_code"), set_ad=True, threads=1,
                  out=None):
        """Translate many linear addresses through this walk.

        Parameters
        ----------
        gva : ndarray of uint64, shape (n,), C-contiguous
            Linear addresses (bytes). Need not be canonical.
        access : Access or ndarray of uint8, shape (n,)
            Intended access of each row. The vCPU's EFLAGS.AC is not added: say `Access.AC`.
        regs : sequence of Regs, or RegisterSets, optional
            Register sets instead of the vCPU's own; see `prepare()`.
        ctx : ndarray of uint32, shape (n,), optional
            Row of `regs` for each address; needed if `regs` has more than one.
        fields : sequence of str
            Columns wanted: gpa, status, error_code, level, pte, pte_gpa, pte_access, refs, ngpa, fault_gpa,
            exit_qualification.
        set_ad : bool
            False suppresses the stores of accessed and dirty bits, and nothing else.
        threads : int
            Threads to share the rows among, 1 to 1,024; more than 64 are not made.
        out : Translation, optional
            Columns to reuse: those of `fields`, n rows each.

        Returns
        -------
        Translation

        Raises
        ------
        ValueError
            Wrong dtype, shape or contiguity, a bit in `access` that is not modelled, a `ctx` out of range; a column of `out` that
            shares memory with another one or with an argument; `RegisterSets` of another processor model or second stage.
        GeneralProtection
            A register set of `regs` is illegal.
        RuntimeError
            The walk is not in use.

        Notes
        -----
        Guest faults are data, not exceptions. Ctrl-C ends a batch between two rows: the columns then have what was done so far.
        Rows are unordered; registers and roles are taken once, at entry. Sets A/D bits: unless set_ad is False. Releases the GIL.

        Source: SDM vol. 3, "4-Level Paging and 5-Level Paging", "Access Rights", "Page-Fault Exceptions".
        """
        cdef bint sets_ad = True if set_ad is True else check_bool("set_ad", set_ad), fresh = out is None
        cdef tuple names = check_fields(fields)
        cdef list arrays = []
        cdef RegisterSets contexts = None
        cdef RegisterSetWalks many
        cdef WalkCopy one
        cdef SlotTable table
        cdef Job job
        cdef Py_ssize_t n
        gva, access = exact_column(gva), exact_access(access)
        if type(threads) is not int or threads != 1:            # small batches do not pay for checks of the defaults
            threads = check_threads("threads", threads)
        if regs is not None:
            contexts = regs if isinstance(regs, RegisterSets) else self.prepare(regs)
            self.check_contexts(contexts)
            ctx = exact_column(ctx)
        elif ctx is not None:
            raise ValueError("ctx: needs regs, the register sets that it indexes")
        if not fresh:
            if not isinstance(out, Translation):
                raise ValueError(f"out: want a Translation, got {type(out).__name__}")
            arrays = [exact_column(getattr(out, name)) for name in names]
        # from here to the walk no code of the caller's runs
        job = new_job()
        n = job.take_rows(gva, access)
        if fresh:
            out = Translation.empty(n, names)
            arrays = [getattr(out, name) for name in names]
        table = self.mem.walked()
        if contexts is not None:
            job.take_contexts(ctx, contexts.count)
            many = contexts.walks_over(table)
            job.take_walks(many, many.walks, many.alike, many.count, table, sets_ad)
        else:
            one = self.now(table)
            job.take_walks(one, &one.w, NULL, 1, table, sets_ad)
        job.take_columns(names, arrays, fresh)
        if n:
            job.run_all(threads)
        if table.mem.missing is not NULL and self.mem.fetch_missing(table):
            repeat_faults(self, out, names, gva, access, ctx, {"regs": contexts, "set_ad": sets_ad, "threads": threads})
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
        PageFault, GeneralProtection, NestedFault
            With `.error_code .address .level .entry .entry_gpa .rule`.
        ValueError
            An address or access out of range.
        RuntimeError
            The walk is not in use.
        """
        cdef uint64_t addr = check_scalar_gva(gva)
        cdef uint32_t a = check_scalar_access(access) | rflags_ac(self.registers)
        cdef kvmmu_translation t
        if self.table != self.mem.number:           # or the walk is not in use
            self.use_memory()
        if is_plain_access(a):
            t = translate_fast(&self.fast, self.w.vcpu, addr, a)
            if t.gpa != INVALID_GPA:
                return t.gpa
        return self.gva_to_gpa_slowly(addr, a)

    cdef object gva_to_gpa_slowly(self, uint64_t gva, uint32_t access):
        cdef walk_result r
        cdef WalkCopy walk = walk_wholly(self, gva, resolved_access(access), True, &r)      # the short cut did not succeed
        if r.status != STATUS_OK:
            raise fault_behind(walk, &r, linear_address(&walk.w, gva, access), access)
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
        PageFault, GeneralProtection, NestedFault
            `address` is in the page that failed: the first byte of the next page if it is that one. The accessed and dirty
            bits of the first page are set by then.
        """
        length = check_one_size(size)
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
            Bytes, 1 to 4096. All others are as for `translate()`.

        Returns
        -------
        Span
        """
        return translate_spans(self, gva, size, access, regs, ctx, {"set_ad": set_ad, "threads": threads})

    def walk_record(self, gva, access=0):
        """Return the whole walk of one linear address, level by level. Never raises for a guest fault, and sets no A/D bits.

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
        return whole_record(self, addr, a)

    def __repr__(self):
        return f"<PageWalk level {self.cpu_role.level} of {self.mem!r}>"
