"""KvmMemory: the memory of one virtual machine: its lock, its memslots, and the memory that they are over."""

from libc.stdint cimport uint32_t, uint64_t

from kvmmu.memory._lock cimport MachineLock
from kvmmu.memory._memory cimport guest_mem, guest_slot
from kvmmu.mmu.core._kvm cimport kvm
from kvmmu.mmu.core._slots cimport kvm_memory_slot


# ValueError unless it is the number of an address space
cdef int check_space(int as_id) except -1
# What an mmu notifier makes of frames whose host page goes
cdef void unmap_gfns(kvm *k, kvm_memory_slot *slot, uint64_t start, uint64_t end) noexcept nogil
cdef void zap_all_fast(kvm *k) noexcept nogil
# Memslots changed: MMIO entries of the generations before are stale
cdef void next_generation(kvm *k, uint64_t count) noexcept nogil


cdef class KvmMemory:
    cdef kvm *k
    cdef readonly object host
    cdef readonly MachineLock lock      # mmu_lock: held by every method
    cdef readonly int backing
    cdef list spaces                    # GuestMemory of each address space
    cdef list tables                    # SlotTable that the memslots of each were made from
    cdef dict slots_by_region           # (address space, region) to the address of its kvm_memory_slot
    cdef uint32_t next_slot_id
    cdef guest_slot *ram_slots
    cdef guest_mem ram                  # host-physical memory behind the memslots, as the processor sees it
    cdef guest_slot arena_slot
    cdef guest_mem arena                # host-physical memory that holds the SPTEs
    # The memslots are those of the memory now, and vCPUs that nobody runs any more are gone. With the lock held
    cdef int sync(self) except -1
    cdef void reap(self) noexcept
    cdef object fmt                     # SpteFormat
    cdef kvm_memory_slot *slot_at(self, gpa, int as_id) except NULL
    cdef void rebuild_ram(self, guest_slot *slots) noexcept
