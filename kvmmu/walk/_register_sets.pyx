"""Walks of one moment, and of many register sets; see `_register_sets.pxd`."""

import numpy as np

from cpython.object cimport PyObject
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from kvmmu._walk cimport WALK_TABLES, cpu_caps, kvm_pagewalk, linear_address, vcpu_arch
from kvmmu.arch._bits cimport PG_LEVEL_1G, PKRU_AD_MASK, PKRU_SHIFT, PKRU_WD_MASK, ROLE_DIRECT_MASK
from kvmmu.arch._format cimport PageFormat
from kvmmu.memory._maker cimport check_maker, maker
from kvmmu.memory._memory cimport NEVER_SEEN, SlotTable
from kvmmu.walk._second_stage cimport SecondStage, is_npt, second_stage
from kvmmu.walk._setup cimport fill_format, init_pagewalk, use_second_stage
from kvmmu.walk._vcpu_arch cimport VcpuArch, lam_of, load_arch, role_of

from kvmmu.arch.registers import Regs
from kvmmu.arch.second_stages import Ept, Npt


cdef extern from "Python.h":
    Py_ssize_t Py_REFCNT(PyObject *o)           # of a pointer: Cython takes a reference of its own to an object that it passes


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

cdef class RegisterSetWalks:
    def __cinit__(self, mark=None, walk_count=None, walk_stage_count=None, *args):
        cdef Py_ssize_t count, stage_count
        check_maker(mark, "RegisterSetWalks are made by PageWalk.prepare()")
        count, stage_count = walk_count, walk_stage_count
        self.count, self.stage_count = count, stage_count
        self.table = NEVER_SEEN
        self.arches = <vcpu_arch *>calloc(max(count, 1), sizeof(vcpu_arch))
        self.walks = <kvm_pagewalk *>calloc(max(count, 1), sizeof(kvm_pagewalk))
        self.stages = <kvm_pagewalk *>calloc(max(stage_count, 1), sizeof(kvm_pagewalk))
        self.alike = <uint32_t *>calloc(max(count, 1), sizeof(uint32_t))
        if self.arches is NULL or self.walks is NULL or self.stages is NULL or self.alike is NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.arches)
        free(self.walks)
        free(self.stages)
        free(self.alike)

    cdef RegisterSetWalks copy(self):
        cdef RegisterSetWalks other = RegisterSetWalks.__new__(RegisterSetWalks, maker(), self.count, self.stage_count)
        cdef Py_ssize_t i
        other.formats, other.seconds = self.formats, self.seconds
        memcpy(other.arches, self.arches, self.count * sizeof(vcpu_arch))
        memcpy(other.walks, self.walks, self.count * sizeof(kvm_pagewalk))
        memcpy(other.stages, self.stages, self.stage_count * sizeof(kvm_pagewalk))
        memcpy(other.alike, self.alike, self.count * sizeof(uint32_t))
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


cdef class RegisterSets:
    """Register sets prepared once for many `translate(regs=...)` calls; made by `PageWalk.prepare()`.

    They are of one processor model, and sets without a second stage of their own are of the one that was in force then. They may
    be used through any `gva_walk` with the same.

    Attributes
    ----------
    count : int
    """

    def __cinit__(self, mark=None, *args):
        check_maker(mark, "RegisterSets are made by PageWalk.prepare()")

    def __len__(self):
        return self.count

    def __repr__(self):
        return f"<RegisterSets: {self.count} sets>"

    cdef RegisterSetWalks walks_over(self, SlotTable table):
        if self.walks.table != table.number:
            self.own_walks().use_table(table)
        return self.walks

    cdef RegisterSetWalks own_walks(self):
        """Return the walks, to be changed: a copy if somebody else has those that were."""
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


cdef object tables_of(const kvm_pagewalk *w):
    """Return what a walk reads of memory, and the rules for it, rights aside: equal ones find the same last entries.

    None: blocks of several walks do not take this one.
    """
    cdef uint64_t keys = w.vcpu.keys
    if w.kind != WALK_TABLES or w.ngpa is not NULL or w.pre_processes or w.level == PG_LEVEL_1G:
        return None
    if w.fmt.pkru_mask and (keys | keys >> PKRU_SHIFT) & (PKRU_AD_MASK | PKRU_WD_MASK):     # key 0 has nearly all pages
        return None
    return (w.format, w.level, w.canonical_shift, w.gva_mask, w.present_mask, w.base_mask, w.address_mask, w.page_size_mask,
            w.pse36_mask, w.accessed_mask, w.vcpu.cr3 & w.base_mask, w.fmt.bad_mt_xwr,
            (<const char *>w.fmt.rsvd_bits_mask)[:sizeof(w.fmt.rsvd_bits_mask)])


cdef RegisterSets prepare_register_sets(list rows, admit, cpu, const cpu_caps *caps, SecondStage second):
    """Check and prepare register sets. Equal roles share a format, equal second stages a walk."""
    cdef list checked = rows_with_seconds(rows, admit, caps, second)
    cdef dict formats = {}, numbers = {}, firsts = {}
    cdef RegisterSetWalks walks
    cdef kvm_pagewalk *w
    cdef Py_ssize_t i
    cdef uint64_t role
    cdef PageFormat fmt
    cdef SecondStage under
    for _, under, _ in checked:
        numbers.setdefault(under, len(numbers))
    walks = RegisterSetWalks.__new__(RegisterSetWalks, maker(), len(checked), len(numbers))
    walks.formats, walks.seconds = [], list(numbers)
    for under, i in numbers.items():
        if under is not None:
            walks.stages[i] = under.n
    cdef RegisterSets contexts = RegisterSets.__new__(RegisterSets, maker())
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
        init_pagewalk(w, role, lam_of(&walks.arches[i]), caps)
        w.vcpu, w.fmt = &walks.arches[i], &fmt.fmt
        w.second = numbers[under]
        use_second_stage(w, &walks.stages[w.second] if under is not None else NULL,
                         is_npt(under) if under is not None else caps.npt_host)
        tables = tables_of(w)
        walks.alike[i] = firsts.setdefault(tables, i) if tables is not None else i
    return contexts


cdef object linear_addresses(const kvm_pagewalk *walks, ctx, gva, access):
    cdef const uint64_t[::1] rows = gva
    cdef const uint8_t[::1] accesses = access
    cdef const uint32_t[::1] contexts = ctx
    cdef bint many = accesses.shape[0] > 1, own = ctx is not None
    found = np.empty(rows.shape[0], np.uint64)
    cdef uint64_t[::1] out = found
    cdef Py_ssize_t i
    for i in range(rows.shape[0]):
        out[i] = linear_address(&walks[contexts[i] if own else 0], rows[i], accesses[i if many else 0])
    return found
