"""The findings of an audit, and the checks of a leaf that hold in the tables of both MMUs."""

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint32_t, uint64_t

from kvmmu.arch._format cimport PageFormat
from kvmmu.mmu.core._kvm cimport kvm
from kvmmu.mmu.core._slots cimport kvm_memory_slot


cdef class _Findings:
    """The state of one audit."""
    cdef kvm *k
    cdef list errors
    cdef int64_t leaves[4]          # by level
    cdef size_t tdp_pages
    cdef size_t nx[2]               # pages of the NX mitigation, by kind of MMU
    cdef set synced                 # (slot, gfn) of guest tables whose shadow is taken to be true: none may write there unseen
    cdef object logged              # (address space, gfn) that processors have logged: as good as in the dirty log
    cdef report(self, uint32_t sp, uint64_t gfn, int level, uint64_t spte, text)
    cdef check(self, name, want, have)
    # Check an entry by itself. IN fmt: of its MMU
    cdef entry(self, PageFormat fmt, uint32_t sp, uint64_t gfn, int level, uint64_t spte)
    # Check a leaf against slot and host. IN access: ACC_* that it may grant
    cdef leaf(self, uint32_t sp, uint64_t gfn, int level, uint64_t spte, uint32_t access)
    cdef dirty_log(self, const kvm_memory_slot *slot, uint32_t sp, uint64_t gfn, int level, uint64_t spte)
    # Check an entry that is not present
    cdef not_present(self, uint32_t sp, uint64_t gfn, int level, uint64_t spte)
