"""Writes that KVM carries out for the guest: what they mean for the pages that shadow the frame.

A write of a whole entry costs the shadow of this entry. After a write of another kind, or the third one to an upper table that no
fault has walked through meanwhile (flooding), the frame is taken for a table no longer, and its shadow pages go.
"""

from libc.stddef cimport size_t
from libc.stdint cimport uint64_t

from kvmmu.mmu.core._kvm cimport kvm

# KVM has written memory of the guest. IN pae: the guest's entries are eight bytes, so that half of one is a write to all of it
cdef void track_write(kvm *k, int as_id, uint64_t gpa, size_t size, bint pae) noexcept nogil
# Every page that shadows a table in the frame goes; whether there was one
cdef bint unprotect_gfn(kvm *k, int as_id, uint64_t gfn) noexcept nogil
