"""Kvm: the state of one virtual machine as a Python object."""

from libc.stdint cimport uint64_t

from kvmmu.mmu.core._slots cimport kvm_memory_slot
from kvmmu.mmu.kvm._memory cimport KvmMemory


cdef class Kvm(KvmMemory):
    """All of one virtual machine but its vCPUs. Made by a Vm."""
    cdef kvm_memory_slot *logged_slot(self, gpa, as_id) except NULL
    cdef int clear_dirty_words(self, kvm_memory_slot *slot, const uint64_t[::1] wanted) except -1
