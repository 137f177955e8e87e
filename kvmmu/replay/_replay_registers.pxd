"""The register sets of a replay: which is in force on each vCPU, and what register events lead to.

What an event does to the registers is decided in Python (`register_events.py`), once for each event, value and set in force
before it. It is remembered here, so that the loop of rows carries out the same event by itself the next time.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kvmmu._walk cimport kvm_pagewalk
from kvmmu.memory._memory cimport SlotTable, guest_mem
from kvmmu.walk.pagewalk cimport PageWalk

cdef enum:
    TRANSITIONS = 1 << 12           # remembered at a time, in slots by a hash; each 72 bytes
    NO_SET = 0xFFFFFFFF

# A register event that was carried out before.
cdef struct transition:
    uint8_t op                      # 0: none
    bint loads                      # PDPTEs are loaded from memory at pdpt, and were then `pdptes`
    uint32_t before, after          # sets in force
    uint64_t value
    uint64_t pdpt
    uint64_t pdptes[4]


cdef class ReplayRegisters:
    cdef PageWalk walk
    cdef list owners                # RegisterSets of one row each, by number
    cdef list bound                 # their walks over the table with the number `table`: own what walks points to
    cdef dict taken                 # numbers by the identity of their owners
    cdef dict stages                # numbers of second stages, equal ones being one
    cdef kvm_pagewalk *walks        # by number
    cdef readonly uint32_t count
    cdef uint32_t room
    cdef readonly uint32_t vcpus
    cdef uint32_t *current          # set in force, by vCPU
    cdef uint32_t *last_nested      # that of a nested guest which was in force last, by vCPU; NO_SET: none
    cdef transition *transitions
    cdef uint64_t table
    cdef uint64_t version           # changes whenever walks do
    # Walk all sets over a table, for as long as it is kept
    cdef int bind(self, SlotTable table) except -1
    cdef int bind_one(self, uint32_t number, SlotTable table) except -1
    cdef int check_vcpu(self, Py_ssize_t vcpu) except -1
    cdef void put_in_force(self, uint32_t vcpu, uint32_t number) noexcept nogil
    # Carry out an event as the last time, if nothing that it depends on has changed. IN vcpu: below `vcpus`
    cdef bint follow(self, const guest_mem *mem, uint32_t vcpu, uint8_t op, uint64_t value) noexcept nogil

cdef ReplayRegisters new_registers(PageWalk walk, Py_ssize_t vcpus)
