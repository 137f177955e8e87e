"""Kvm, a virtual machine as a Python object: its state, and the operations of the host and the VMM on it."""

from libc.stdint cimport uint64_t

from kvmmu.memory._lock cimport MachineLock
from kvmmu.memory._memory cimport guest_mem, guest_slot
from kvmmu.mmu.core._kvm cimport kvm
from kvmmu.mmu.core._slots cimport kvm_memory_slot
from kvmmu.mmu.kvm._memslots cimport Memslots


cdef class Kvm:
    """All of one virtual machine but its vCPUs. Made by a Vm."""
    cdef kvm *k
    cdef readonly object host
    cdef readonly MachineLock lock      # mmu_lock: held by every method
    cdef readonly int backing
    cdef Memslots memslots
    cdef guest_slot arena_slot
    cdef guest_mem arena                # host-physical memory that holds the SPTEs
    cdef object fmt                     # SpteFormat
    # The memslots are those of the memory now, and vCPUs that nobody runs any more are gone. With the lock held
    cdef int sync(self) except -1
    cdef void reap(self) noexcept
    cdef kvm_memory_slot *logged_slot(self, gpa, as_id) except NULL
    cdef int clear_dirty_words(self, kvm_memory_slot *slot, const uint64_t[::1] wanted) except -1
