"""Memslots: the memslots of one virtual machine, which follow a GuestMemory, and host-physical memory behind them."""

from libc.stdint cimport uint32_t, uint64_t

from kvmmu.memory._memory cimport GuestMemory, SlotTable, guest_mem, guest_slot
from kvmmu.mmu.core._kvm cimport kvm
from kvmmu.mmu.core._slots cimport kvm_memory_slot


cdef class Memslots:
    """The memslots of a Kvm, which alone has it. Every method needs the lock."""
    cdef kvm *k                         # of the Kvm
    cdef object host
    cdef int backing                    # level of the pages that the host has behind new slots
    cdef GuestMemory mem, smm_mem       # of the two address spaces
    cdef SlotTable table, smm_table     # that the memslots were made from: they keep the bytes of the slots
    cdef uint64_t numbers[2]            # of those tables
    cdef dict slots_by_region           # (address space, region) to the address of its kvm_memory_slot
    cdef uint32_t next_slot_id
    cdef guest_slot *ram_slots
    cdef guest_mem ram                  # host-physical memory behind the memslots, as the processor sees it
    # The memslots become those of the memory now. ValueError if the host cannot back them, and nothing has changed
    cdef int sync(self) except -1
    cdef int follow(self) except -1
    cdef int default_limit(self) except -1
    cdef kvm_memory_slot *slot_at(self, gpa, int as_id) except NULL
    # [(slot address, first frame, last frame + 1)] of the slots within [gpa, gpa + size), all address spaces
    cdef list frames(self, gpa, size)
    cdef void rebuild_ram(self, guest_slot *slots) noexcept

# The memslots of a new virtual machine, none before sync()
cdef Memslots new_memslots(kvm *k, GuestMemory mem, GuestMemory smm_mem, int backing, host)
# ValueError unless it is the number of an address space
cdef int check_space(int as_id) except -1
