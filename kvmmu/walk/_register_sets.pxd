"""Walks of one moment: a copy of one walk, and the walks of many register sets prepared for batches."""

from libc.stdint cimport uint32_t, uint64_t

from kvmmu._walk cimport cpu_caps, kvm_pagewalk, vcpu_arch
from kvmmu.arch._format cimport PageFormat
from kvmmu.memory._memory cimport SlotTable
from kvmmu.walk._second_stage cimport SecondStage
from kvmmu.walk._vcpu_arch cimport VcpuArch


cdef class WalkCopy:
    """A walk as it was at one moment, with all that its pointers lead to but the table of slots. Immutable.

    Lifetime: who walks it keeps it, and the table with the number `table`.
    """
    cdef kvm_pagewalk w
    cdef kvm_pagewalk n             # the second stage
    cdef vcpu_arch arch
    cdef PageFormat fmt
    cdef SecondStage second
    cdef uint64_t loads             # of the registers, when it was made
    cdef uint64_t table

# IN w: but for the memory; second: under it, or itself, or None
cdef WalkCopy copy_walk(const kvm_pagewalk *w, VcpuArch vcpu, PageFormat fmt, SecondStage second, SlotTable table)


cdef class RegisterSetWalks:
    """The walks of register sets over one table of slots, with all that their pointers lead to but that table.

    Nobody changes them while somebody else has a reference. Lifetime: as of a WalkCopy.
    """
    cdef vcpu_arch *arches
    cdef kvm_pagewalk *walks        # one per register set
    cdef kvm_pagewalk *stages       # their second stages, each once
    cdef uint32_t *alike            # for each walk the first one that reads the same tables by the same rules, rights aside
    cdef Py_ssize_t count, stage_count
    cdef list formats, seconds      # PageFormat; SecondStage or None, by the number in `second` of a walk
    cdef uint64_t table
    cdef RegisterSetWalks copy(self)
    cdef void use_table(self, SlotTable table)


cdef class RegisterSets:
    """Register sets prepared for translate(regs=...): one walk each, formats shared by role."""
    cdef RegisterSetWalks walks
    cdef object cpu                 # the processor model that they were made for
    cdef bint npt_host              # the host has nested paging of SVM
    cdef bint takes_second          # some set runs under the second stage that was in force
    cdef SecondStage second         # that one, or None
    cdef readonly Py_ssize_t count
    # The walks over a table, for as long as the table is kept
    cdef RegisterSetWalks walks_over(self, SlotTable table)
    cdef RegisterSetWalks own_walks(self)
    # ValueError unless they are for walks of a processor model and host, under a second stage or without one
    cdef int check(self, cpu, SecondStage under, bint npt_host) except -1

# IN admit: maps (Regs, SecondStage or None) to a Regs that is legal, with PDPTEs loaded, or raises; cpu: that caps are of;
# second: of rows without one
cdef RegisterSets prepare_register_sets(list rows, admit, cpu, const cpu_caps *caps, SecondStage second)
# Addresses of rows as CR2 takes them. IN ctx: which of the walks each row uses, checked, or None; access: of each row, or of all
cdef object linear_addresses(const kvm_pagewalk *walks, ctx, gva, access)
