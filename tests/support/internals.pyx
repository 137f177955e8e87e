# SPDX-License-Identifier: Apache-2.0
"""What tests need of the inside of a machine and no user does; `internals.py` compiles it."""

import numpy as np

from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from kvmmu._walk cimport kvm_pagewalk, second_stage_access
from kvmmu.arch._bits cimport (
    ACC_USER_MASK, GPA_LIMIT, PAGE_SHIFT, PERMISSIONS_INDEX_SHIFT, ROLE_DIRECT_MASK, ROLE_INVALID_MASK, SPTE_ENT_PER_PAGE,
)
from kvmmu.arch._format cimport permission_fault
from kvmmu.machine._machine cimport Machine
from kvmmu.machine._state cimport machine
from kvmmu.mmu.core._kvm cimport KVM_SHADOW_MMU, kvm, kvm_mmu_page, sp_level, spte_to_child
from kvmmu.mmu.core._page cimport (
    first_spte, list_remove, sp_get_gfn, track_possible_nx_huge_page, unhash_page, unlink_parent,
    untrack_possible_nx_huge_page,
)
from kvmmu.mmu.core._pte_list cimport (
    free_pool, pte_list_add, pte_list_count, pte_list_get, pte_list_pool, pte_list_remove, reserve_descs,
)
from kvmmu.mmu.core._rmap cimport rmap_head, slot_of_sp
from kvmmu.mmu.core._slots cimport (
    account_disallow_lpage, account_write_track, free_memslot, host_page_of, host_pfn_of, is_write_tracked, kvm_memory_slot,
    max_mapping_level, new_memslot,
)
from kvmmu.mmu.kvm._state cimport Kvm


# ---- rights of a TLB entry ---------------------------------------------------------------------------------------------

cdef bint rules_allow(const kvm_pagewalk *hw, const kvm_pagewalk *stage, uint32_t acc, uint32_t nacc, uint32_t pkey,
                      uint32_t access) noexcept nogil:
    """The rules themselves: the rights of both stages, and the protection key, allow the access."""
    cdef uint32_t nested = second_stage_access(stage, access, True, acc)
    if not hw.cpu_role & ROLE_DIRECT_MASK and permission_fault(hw.fmt, hw.vcpu.keys, acc, pkey, access):
        return False
    if hw.ngpa is NULL:
        return True
    return not (stage.fmt.permissions[nested >> PERMISSIONS_INDEX_SHIFT] >> nacc) & 1


def hit_rights(Machine vcpu not None):
    """(tables, rules), bool arrays (acc, nacc, pkey, index): what a TLB entry allows, and what the rules say."""
    cdef uint32_t acc, nacc, pkey, i
    cdef uint16_t word
    cdef const machine *m = vcpu.m
    vcpu.update()
    tables, rules = np.zeros((16, 16, 16, 16), bool), np.zeros((16, 16, 16, 16), bool)
    for acc in range(16):
        for nacc in range(16):
            for pkey in range(16):
                word = m.rights.guest[acc] & m.rights.nested[(acc & ACC_USER_MASK) != 0][nacc]
                if acc & ACC_USER_MASK:
                    word &= m.rights.keys[pkey]
                for i in range(16):
                    tables[acc, nacc, pkey, i] = (word >> i) & 1
                    rules[acc, nacc, pkey, i] = rules_allow(&m.hw, &m.stage.w, acc, nacc, pkey, i << PERMISSIONS_INDEX_SHIFT)
    return tables, rules


# ---- lists of SPTEs ----------------------------------------------------------------------------------------------------

cdef enum:
    SPTEP_BITS = 62                 # a head has a number and two bits in a word


cdef class PteLists:
    """Lists of SPTE numbers, as the reverse map keeps them. IN n: how many lists."""
    cdef pte_list_pool pool
    cdef uint64_t *heads
    cdef Py_ssize_t n

    def __cinit__(self, Py_ssize_t n):
        if n < 1:
            raise ValueError(f"n: want at least one list, got {n}")
        self.heads = <uint64_t *>calloc(n, sizeof(uint64_t))
        if self.heads is NULL:
            raise MemoryError
        self.n = n

    def __dealloc__(self):
        free(self.heads)
        free_pool(&self.pool)

    cdef uint64_t *head(self, i) except NULL:
        if not 0 <= i < self.n:
            raise IndexError(f"list {i} of {self.n}")
        return &self.heads[i]

    def add(self, i, sptep):
        """Append an SPTE number (of at most 62 bits) to list i; returns how many entries it had."""
        cdef uint64_t *head = self.head(i)
        if sptep < 0 or sptep >> SPTEP_BITS:
            raise ValueError(f"sptep: want {SPTEP_BITS} bits, got {sptep:#x}")
        if reserve_descs(&self.pool, 1):
            raise MemoryError
        return pte_list_add(&self.pool, head, sptep)

    def remove(self, i, sptep):
        """Remove an SPTE number; whether it was there."""
        cdef uint64_t *head = self.head(i)
        return sptep >= 0 and not sptep >> SPTEP_BITS and bool(pte_list_remove(&self.pool, head, sptep))

    def entries(self, i):
        """The SPTE numbers of list i."""
        cdef uint64_t head = self.head(i)[0]
        return [int(pte_list_get(&self.pool, head, k)) for k in range(int(pte_list_count(&self.pool, head)))]

    @property
    def descriptors(self):
        """Descriptors that were ever in use: they are taken again."""
        return int(self.pool.count) - 1 if self.pool.count else 0


# ---- a memslot by itself -----------------------------------------------------------------------------------------------

cdef class Memslot:
    """One memslot by itself.

    Parameters
    ----------
    gfn, npages : int
        First guest frame, and how many; of 40 bits, as of guest-physical addresses.
    backing : int
        Level that the host maps it at: 1, 2 or 3.
    pfn : int
        First host frame that is free.
    """

    cdef kvm_memory_slot *slot

    def __cinit__(self, gfn, npages, backing=3, pfn=0):
        cdef uint64_t first
        frames = int(GPA_LIMIT >> PAGE_SHIFT)
        if not npages > 0 or backing not in (1, 2, 3):
            raise ValueError(f"npages: want at least 1, got {npages}; backing: want 1, 2 or 3, got {backing}")
        if not 0 <= gfn <= frames - npages or not 0 <= pfn < frames:
            raise ValueError(f"want frames below {frames:#x}, got gfn {gfn:#x}, npages {npages:#x}, pfn {pfn:#x}")
        first = pfn
        self.slot = new_memslot(0, 0, gfn, npages, NULL, backing, False, &first)
        if self.slot is NULL:
            raise MemoryError

    def __dealloc__(self):
        if self.slot is not NULL:
            free_memslot(self.slot)

    cdef uint64_t frame(self, gfn) except? 0:
        if not self.slot.base_gfn <= gfn < self.slot.base_gfn + self.slot.npages:
            raise ValueError(f"gfn: {gfn:#x} is not in the slot")
        return gfn

    def max_mapping_level(self, gfn, max_level=3):
        """Largest page that may map gfn."""
        cdef uint64_t frame = self.frame(gfn)
        if max_level not in (1, 2, 3):
            raise ValueError(f"max_level: want 1, 2 or 3, got {max_level}")
        return max_mapping_level(self.slot, frame, max_level, host_page_of(self.slot, frame))

    def pfn(self, gfn):
        """The host frame behind gfn."""
        cdef uint64_t frame = self.frame(gfn)
        return int(host_pfn_of(self.slot, frame, host_page_of(self.slot, frame)))

    def disallow_lpage(self, gfn, count=1):
        """Give one reason more (1) or fewer (-1) against huge pages around gfn."""
        account_disallow_lpage(self.slot, self.frame(gfn), count)

    def track_writes(self, gfn, count=1):
        """Track writes to gfn once more (1) or less (-1)."""
        if account_write_track(self.slot, self.frame(gfn), count):
            raise MemoryError

    def is_write_tracked(self, gfn):
        """Whether writes to gfn are tracked."""
        return bool(is_write_tracked(self.slot, self.frame(gfn)))


# ---- shadow pages to damage --------------------------------------------------------------------------------------------

def damage(Kvm kvm_object not None, what, uint32_t sp, int index=0, uint64_t value=0):
    """Break one thing of a shadow page, or of its entry at index, and leave all others as they are."""
    if not 0 < sp < kvm_object.k.page_end or not kvm_object.k.pages[sp].in_use or not 0 <= index < SPTE_ENT_PER_PAGE:
        raise ValueError(f"entry {index} of page {sp}: there is no such entry")
    with kvm_object.lock:
        break_one(kvm_object, what, sp, index, value)


cdef int break_one(Kvm kvm_object, what, uint32_t sp, int index, uint64_t value) except -1:
    cdef kvm *k = kvm_object.k
    cdef kvm_mmu_page *page = &k.pages[sp]
    cdef uint64_t sptep = first_spte(sp) + index
    cdef uint64_t gfn = sp_get_gfn(page, index)
    cdef kvm_memory_slot *slot = slot_of_sp(k, page, page.gfn)
    cdef kvm_memory_slot *mapped = slot_of_sp(k, page, gfn)
    if reserve_descs(&k.lists, 2):
        raise MemoryError
    if what == "spte":
        k.sptes[sptep] = value
    elif what == "rmap loses an entry":
        pte_list_remove(&k.lists, rmap_head(mapped, gfn, sp_level(page)), sptep)
    elif what == "rmap has an entry twice":
        pte_list_add(&k.lists, rmap_head(mapped, gfn, sp_level(page)), sptep)
    elif what == "rmap has a foreign entry":
        pte_list_add(&k.lists, rmap_head(mapped, value, 1), sptep)
    elif what == "parent is forgotten":
        unlink_parent(k, spte_to_child(k, k.sptes[sptep]), sptep)
    elif what == "parent is made up":
        pte_list_add(&k.lists, &page.parents, value)
    elif what == "hash loses a page":
        unhash_page(k, sp)
    elif what == "gfn":
        page.gfn = value
    elif what == "role":
        page.role = <uint32_t>value
    elif what == "invalid":
        page.role |= <uint32_t>ROLE_INVALID_MASK
    elif what == "generation":
        page.mmu_valid_gen ^= 1
    elif what == "active list loses a page":
        list_remove(k, &k.active_mmu_pages, sp)
    elif what == "root_count":
        page.root_count = <uint32_t>value
    elif what == "unsync":
        page.unsync = bool(value)
    elif what == "unsync_children":
        page.unsync_children = <uint32_t>value
    elif what == "unsync bit":
        page.unsync_child_bitmap[index >> 6] ^= <uint64_t>1 << (index & 63)
    elif what == "write_track":
        slot.write_track[page.gfn - slot.base_gfn] += <int>value
    elif what == "disallow_lpage":
        account_disallow_lpage(slot, page.gfn, 1)
    elif what == "translation":
        page.shadowed_translation[index] = value
    elif what == "nx":
        if page.nx_huge_page_disallowed:
            untrack_possible_nx_huge_page(k, sp, KVM_SHADOW_MMU)
            page.nx_huge_page_disallowed = True
        else:
            track_possible_nx_huge_page(k, sp, KVM_SHADOW_MMU)
            page.nx_huge_page_disallowed = False
    elif what == "used":
        k.n_used_mmu_pages += 1
    elif what == "indirect_shadow_pages":
        k.indirect_shadow_pages += 1
    else:
        raise ValueError(f"what: no such damage, {what!r}")
