"""The accesses that the rights of a TLB entry allow under the registers in force, as tables.

An access is allowed if the guest's tables, the host's tables and the protection key allow it. Each condition has a table of
words, two by rights, the third by protection key; bit i of a word stands for the access with index i in permissions[]. The AND of
the three words is kept in the TLB entry, and made again after a change of registers.
"""

from libc.stdint cimport uint16_t, uint32_t

from kvmmu._walk cimport kvm_pagewalk
from kvmmu.arch._bits cimport ACC_USER_MASK
from kvmmu.tlb._tlb cimport tlb_entry

cdef struct rights_tables:
    uint32_t epoch                  # of the registers that the tables are made from; from 1
    uint16_t guest[16]              # by ACC_* of the guest's tables
    uint16_t nested[2][16]          # by ACC_USER of those, and ACC_* of the host's
    uint16_t keys[16]               # by protection key, of a user page
    uint16_t writes                 # which accesses write


cdef inline uint16_t allowed_accesses(const rights_tables *rights, const tlb_entry *entry) noexcept nogil:
    """Return a bit for each access, by its index in permissions[]: its rights allow it, and it has no D bit to set."""
    cdef uint32_t user = (entry.acc & <uint32_t>ACC_USER_MASK) != 0
    cdef uint16_t allowed = rights.guest[entry.acc] & rights.nested[user][entry.nacc]
    if user:
        allowed &= rights.keys[entry.pkey]
    if not entry.dirty:
        allowed &= ~rights.writes
    return allowed


# Make the tables anew: the registers that they depend on have changed. IN hw, stage: the processor's walks of both stages
cdef void load_rights(rights_tables *rights, const kvm_pagewalk *hw, const kvm_pagewalk *stage) noexcept nogil
