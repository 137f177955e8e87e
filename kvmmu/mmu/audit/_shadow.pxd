"""The audit of a shadow MMU.

    hash      every page in use stands in the bucket of its frame, once, no two alike; those that are valid in the list of active
              pages too, and of the present generation; an invalid one is a root in use, and empty
    roots     have as many references as vCPUs have roots, present and before; the role that registers asked for
    parents   every entry that points to a page is in the page's list, and every entry of the list points to the page
    children  have the role that follows from the parent's, and the frame of their place
    rmaps     hold each leaf once, under its frame and level, and nothing else
    unsync    leaf tables alone; every way from above knows; bitmaps and counts agree
    counters  write tracking, huge pages that tables forbid, shadowed tables, pages in use, unsync pages, NX lists
    guest     entries of pages in sync say no more than the guest's entries (`_guest.pyx`)
"""

from libc.stddef cimport size_t
from libc.stdint cimport uint64_t

from kvmmu.mmu.audit._leaf cimport _Findings
from kvmmu.mmu.core._kvm cimport kvm
from kvmmu.mmu.core._spte cimport SpteFormat


# True if a present entry points into the arena
cdef bint is_page_of_entries(const kvm *k, uint64_t spte) noexcept
# Audit all shadow pages; returns their number, with the pages that belong to vCPUs. OUT f.synced, and all counts
cdef size_t audit_shadow(_Findings f, SpteFormat sptes, bint guest_tables) except? 0
