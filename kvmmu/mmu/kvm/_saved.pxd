"""The state of a Kvm at one moment, but for its vCPUs and the bytes of its memory."""

from libc.stdint cimport uint32_t

from kvmmu.memory._memory cimport SlotTable, guest_slot
from kvmmu.mmu.core._kvm cimport kvm
from kvmmu.mmu.kvm._state cimport Kvm


cdef class SavedKvm:
    cdef kvm *k                         # without vCPUs
    cdef list regions                   # (address space, region) of each memslot, in the order of k.slots
    cdef uint32_t next_slot_id
    cdef SlotTable table, smm_table     # that the memslots were made from
    # of one that `ready()` made: what a Kvm has besides
    cdef dict slots_by_region
    cdef guest_slot *ram_slots
    # A copy to be put in force: over these tables, whose slots are at the same places. IN tables: None for the same ones
    cdef SavedKvm ready(self, SlotTable table, SlotTable smm_table)

# The present state. With the lock held, and after `sync()`
cdef SavedKvm save_kvm(Kvm owner)
# Put a state that `ready()` made in force; it is the one before then. With the lock held
cdef int put_kvm(Kvm owner, SavedKvm fresh) except -1
