"""Registers and second stages as the walks read them: of one vCPU, and of many register sets prepared for batches."""

import numpy as np

from cpython.object cimport PyObject
from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from kvmmu._walk cimport cpu_caps, kvm_pagewalk, translate_nested_gpa, vcpu_arch, walk_result
from kvmmu.arch._bits cimport (
    ACC_ALL, ACCESS_USER_MASK, CR4_PKE_MASK, CR4_SMAP_MASK, CR4_SMEP_MASK, EPT_VIOLATION_GVA_VALID_MASK, ROLE_ACCESS_SHIFT,
    ROLE_AD_DISABLED_MASK, ROLE_CR0_WP_MASK, ROLE_CR4_SMEP_MASK, ROLE_DIRECT_MASK, ROLE_EFER_NX_MASK,
    ROLE_EXT_CR4_PKE_MASK, ROLE_EXT_CR4_PSE_MASK, ROLE_EXT_CR4_SMAP_MASK, ROLE_EXT_EXECONLY_MASK, ROLE_EXT_VALID_MASK,
    ROLE_GUEST_MODE_MASK, ROLE_LEVEL_MASK, ROLE_LEVEL_SHIFT, STATUS_OK,
)
from kvmmu.arch._format cimport (
    PageFormat, permission_params, reset_ept_rsvds_bits_mask, reset_guest_rsvds_bits_mask, rsvd_params,
    update_permission_bitmask, update_pkru_bitmask,
)
from kvmmu.arch._roles cimport calc_cpu_role, kvm_mmu_role_regs
from kvmmu.memory._maker cimport check_maker, maker
from kvmmu.memory._memory cimport NEVER_SEEN, GuestMemory, SlotTable
from kvmmu.walk._setup cimport init_ept_pagewalk, init_npt_pagewalk, init_pagewalk, pse36_bits, use_second_stage

from kvmmu.arch.faults import nested_fault_of
from kvmmu.arch.registers import Regs
from kvmmu.arch.second_stages import Ept, Npt


cdef extern from "Python.h":
    Py_ssize_t Py_REFCNT(PyObject *o)           # of a pointer: Cython takes a reference of its own to an object that it passes


cdef class VcpuArch:
    """The registers of one vCPU as the walks read them. Made by a Vcpu."""

    def __cinit__(self, mark=None, *args):
        check_maker(mark, "a VcpuArch is made by a Vcpu")

    def load(self, regs not None):
        """Take the registers of a `Regs`, all at once."""
        cdef vcpu_arch arch = self.arch
        if not isinstance(regs, Regs):
            raise TypeError(f"regs: want a Regs, got {type(regs).__name__}")
        load_arch(&arch, regs)
        self.arch = arch
        self.loads += 1


def new_arch():
    """Registers of a vCPU, all 0."""
    return VcpuArch.__new__(VcpuArch, maker())


cdef int load_arch(vcpu_arch *arch, regs) except -1:
    arch.cr0, arch.cr3, arch.cr4, arch.efer = regs.cr0, regs.cr3, regs.cr4, regs.efer
    arch.pkru, arch.rflags = regs.pkru, regs.rflags
    pdptrs = regs.pdptrs
    for i in range(4):
        arch.pdptrs[i] = pdptrs[i] if pdptrs is not None else 0
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

    cdef int use_memory(self, GuestMemory mem) except -1:
        cdef SlotTable table = mem.current()
        if self.table is not table:
            self.table = table
            self.n.mem = &table.mem
        return 0

    def pdpt_gpa(self, GuestMemory mem not None, uint64_t ngpa):
        """Where the PDPTEs at ngpa lie, for a load of the PDPTE registers.

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
    """A second stage ready to walk, from an Ept or an Npt."""
    cdef SecondStage second = SecondStage.__new__(SecondStage, maker(), stage)
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


# ---- walks of one moment -----------------------------------------------------------------------------------------------

cdef class WalkCopy:
    def __cinit__(self, mark=None, *args):
        check_maker(mark, "a WalkCopy is made by a PageWalk")


cdef WalkCopy copy_walk(const kvm_pagewalk *w, VcpuArch vcpu, PageFormat fmt, SecondStage second, SlotTable table):
    cdef WalkCopy copy = WalkCopy.__new__(WalkCopy, maker())
    copy.fmt, copy.second = fmt, second
    copy.loads, copy.table = vcpu.loads, table.number
    copy.arch = vcpu.arch
    copy.w = w[0]
    copy.w.mem = &table.mem
    copy.w.fmt = &fmt.fmt
    if second is not None:
        copy.n = second.n
        copy.n.mem = &table.mem
        copy.w.ngpa = &copy.n
    else:
        copy.w.ngpa = NULL
    copy.w.vcpu = &second.arch if w.is_nested else &copy.arch
    return copy


# ---- many register sets ------------------------------------------------------------------------------------------------

cdef class ContextWalks:
    def __cinit__(self, mark=None, walk_count=None, walk_stage_count=None, *args):
        cdef Py_ssize_t count, stage_count
        check_maker(mark, "ContextWalks are made by PageWalk.prepare()")
        count, stage_count = walk_count, walk_stage_count
        self.count, self.stage_count = count, stage_count
        self.table = NEVER_SEEN
        self.arches = <vcpu_arch *>calloc(max(count, 1), sizeof(vcpu_arch))
        self.walks = <kvm_pagewalk *>calloc(max(count, 1), sizeof(kvm_pagewalk))
        self.stages = <kvm_pagewalk *>calloc(max(stage_count, 1), sizeof(kvm_pagewalk))
        if self.arches is NULL or self.walks is NULL or self.stages is NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.arches)
        free(self.walks)
        free(self.stages)

    cdef ContextWalks copy(self):
        cdef ContextWalks other = ContextWalks.__new__(ContextWalks, maker(), self.count, self.stage_count)
        cdef Py_ssize_t i
        other.formats, other.seconds = self.formats, self.seconds
        memcpy(other.arches, self.arches, self.count * sizeof(vcpu_arch))
        memcpy(other.walks, self.walks, self.count * sizeof(kvm_pagewalk))
        memcpy(other.stages, self.stages, self.stage_count * sizeof(kvm_pagewalk))
        for i in range(self.count):
            other.walks[i].vcpu = &other.arches[i]
            if other.walks[i].ngpa is not NULL:
                other.walks[i].ngpa = &other.stages[other.walks[i].second]
        return other

    cdef void use_table(self, SlotTable table):
        cdef Py_ssize_t i
        self.table = table.number
        for i in range(self.count):
            self.walks[i].mem = &table.mem
        for i in range(self.stage_count):
            self.stages[i].mem = &table.mem


cdef class Contexts:
    """Register sets prepared once for many `translate(regs=...)` calls; made by `PageWalk.prepare()`.

    They are of one processor model, and sets without a second stage of their own are of the one that was in force then. They may
    be used through any `gva_walk` with the same.

    Attributes
    ----------
    count : int
    """

    def __cinit__(self, mark=None, *args):
        check_maker(mark, "Contexts are made by PageWalk.prepare()")

    def __len__(self):
        return self.count

    cdef ContextWalks walks_over(self, SlotTable table):
        if self.walks.table != table.number:
            self.own_walks().use_table(table)
        return self.walks

    cdef ContextWalks own_walks(self):
        """The walks, to be changed: a copy if somebody else has those that were."""
        if Py_REFCNT(<PyObject *>self.walks) > 1:
            self.walks = self.walks.copy()
        return self.walks

    cdef int check(self, cpu, SecondStage under, bint npt_host) except -1:
        if self.cpu is not cpu and self.cpu != cpu:
            raise ValueError(f"regs: prepared for another processor model, {differences(self.cpu, cpu)}; prepare() them with "
                             f"this walk")
        if self.npt_host != npt_host:
            raise ValueError(f"regs: prepared for a host {'with' if self.npt_host else 'without'} NPT, this walk is for one "
                             f"{'with' if npt_host else 'without'}; prepare() them with this walk")
        if not self.takes_second or self.second is under:
            return 0
        if self.second is None or under is None or under.n.pml is not NULL or self.second.stage != under.stage:
            raise ValueError(f"regs: prepared {in_words(self.second)}, this walk is {in_words(under)}; prepare() them now, or "
                             f"say the second stage of each: (Regs, Ept or Npt or None)")
        return 0

    cdef SecondStage second_of(self, Py_ssize_t i):
        if not 0 <= i < self.count:
            raise ValueError(f"row {i} is beyond the {self.count} register sets")
        return self.walks.seconds[self.walks.walks[i].second]

    cdef int reload(self, Py_ssize_t i, legal) except -1:
        """Take the registers of row i again, PDPTEs included; the role must not change."""
        cdef vcpu_arch arch
        cdef bint nested = self.second_of(i) is not None
        load_arch(&arch, legal)
        arch.nested_pgd = 0
        if role_of(&arch, False, nested) != self.walks.walks[i].cpu_role:
            raise ValueError(f"row {i}: the registers make another role; prepare() the sets anew")
        self.own_walks().arches[i] = arch
        return 0


cdef str differences(one, other):
    """Name the fields in which two processor models differ."""
    return ", ".join(f"{name} {getattr(one, name)} and not {getattr(other, name)}" for name in one.__dataclass_fields__
                     if getattr(one, name) != getattr(other, name))


cdef str in_words(SecondStage second):
    return "without a second stage" if second is None else f"under {second.stage}"


cdef list rows_with_seconds(list rows, admit, const cpu_caps *caps, SecondStage second):
    """(legal Regs, SecondStage or None, whether that is the one in force) of each row. Equal second stages are one."""
    cdef SecondStage under
    admitted, seconds, checked = {}, {}, []
    for i, row in enumerate(rows):
        under = second
        regs = row
        own = isinstance(row, tuple) and len(row) == 2
        if own:
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
        checked.append((legal, under, not own))
    return checked


cdef Contexts prepare_contexts(list rows, admit, cpu, const cpu_caps *caps, SecondStage second):
    """Check and prepare register sets. Equal roles share a format, equal second stages a walk."""
    cdef list checked = rows_with_seconds(rows, admit, caps, second)
    cdef dict formats = {}, numbers = {}
    cdef ContextWalks walks
    cdef kvm_pagewalk *w
    cdef Py_ssize_t i
    cdef uint64_t role
    cdef PageFormat fmt
    cdef SecondStage under
    for _, under, _ in checked:
        numbers.setdefault(under, len(numbers))
    walks = ContextWalks.__new__(ContextWalks, maker(), len(checked), len(numbers))
    walks.formats, walks.seconds = [], list(numbers)
    for under, i in numbers.items():
        if under is not None:
            walks.stages[i] = under.n
    cdef Contexts contexts = Contexts.__new__(Contexts, maker())
    contexts.walks, contexts.count = walks, walks.count
    contexts.cpu, contexts.second, contexts.npt_host = cpu, second, caps.npt_host
    for i, (legal, under, takes_second) in enumerate(checked):
        w = &walks.walks[i]
        contexts.takes_second = contexts.takes_second or takes_second
        load_arch(&walks.arches[i], legal)
        role = role_of(&walks.arches[i], False, under is not None)
        fmt = formats.get(role)
        if fmt is None:
            fmt = formats[role] = PageFormat()
            if not role & ROLE_DIRECT_MASK:
                fill_format(fmt, role, caps, False)
            walks.formats.append(fmt)
        init_pagewalk(w, role, caps)
        w.vcpu, w.fmt = &walks.arches[i], &fmt.fmt
        w.second = numbers[under]
        use_second_stage(w, &walks.stages[w.second] if under is not None else NULL,
                         is_npt(under) if under is not None else caps.npt_host)
    return contexts


cdef object widths_of(Contexts contexts, ctx):
    cdef ContextWalks walks = contexts.walks
    cdef Py_ssize_t i
    masks = np.array([walks.walks[i].gva_mask for i in range(contexts.count)], np.uint64)
    return masks[0] if ctx is None else masks[ctx]
