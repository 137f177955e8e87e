"""Unsync pages: shadow pages whose guest tables may be written to while they are shadowed.

A leaf page (level 1) may go unsync: the guest writes to the table freely, and the page is compared with it when the guest says
INVLPG or loads CR3. A parent marks the entries below which unsync pages are (`unsync_child_bitmap`), and has their number.

How the pieces are used: `fault_make_spte()` calls `try_to_unsync()` before a frame becomes writable. A shadow MMU that syncs or
zaps a page calls `clear_unsync()`; on REQ_MMU_SYNC it follows the marks from its root. When a page that is unsync, or has unsync
children, is linked below a parent, `mark_unsync_child()` marks it there.
"""

from libc.stdint cimport uint32_t, uint64_t

from kvmmu.mmu.core._kvm cimport kvm
from kvmmu.mmu.core._slots cimport kvm_memory_slot

cdef enum unsync_result:
    UNSYNC_OK = 0                   # the frame may be writable
    UNSYNC_TRACKED = 1              # it holds upper tables, or a table that is being synced
    UNSYNC_PREFETCH = 2             # not for the sake of a prefetch

# IN can_unsync: shadow pages of the frame may become unsync (else their being there is a denial)
cdef int try_to_unsync(kvm *k, kvm_memory_slot *slot, uint64_t gfn, bint can_unsync, bint prefetch) noexcept nogil
# Mark entry sptep, whose page is unsync or has unsync children, and the entries of all parents above
cdef void mark_unsync_child(kvm *k, uint64_t sptep) noexcept nogil
cdef void clear_unsync_child(kvm *k, uint64_t sptep) noexcept nogil
cdef void clear_unsync(kvm *k, uint32_t sp) noexcept nogil
