"""Writes that KVM carries out for the guest, and the shadow pages of the written frame.

A write of four bytes or more within one entry, or of one byte at its start, zaps the shadow of this entry. Any other write zaps
the shadow pages of the frame, and so does the third write to an upper table that no fault has walked through meanwhile
(flooding): the frame is no table any more.
"""

from libc.stddef cimport size_t
from libc.stdint cimport uint64_t

from kvmmu.mmu.core._kvm cimport kvm

# Zap what a write by KVM makes stale. IN pae: the guest's entries are eight bytes, so that half of one is a write to all of it
cdef void track_write(kvm *k, int as_id, uint64_t gpa, size_t size, bint pae) noexcept nogil
# Zap every page that shadows a table in the frame; True if there was one
cdef bint unprotect_gfn(kvm *k, int as_id, uint64_t gfn) noexcept nogil
