"""Copies of the state of a virtual machine, but for its vCPUs.

All links between pages, entries and lists are numbers, so that copies of the arrays are a copy of the tables. The pointers to
the bytes of memslots (`hva`) are those of the original.
"""

from kvmmu.mmu.core._kvm cimport kvm

# A copy without vCPUs, which `free_kvm()` takes back; NULL for want of memory
cdef kvm *copy_kvm(const kvm *k) noexcept nogil
# Exchange all of two states but the vCPUs. Both are of one host
cdef void swap_kvm(kvm *a, kvm *b) noexcept nogil
