"""Shadow pages to damage: for the tests of the audit. Nothing of the package uses it."""

from libc.stdint cimport uint32_t, uint64_t

from kvmmu.arch._bits cimport ROLE_INVALID_MASK, SPTE_ENT_PER_PAGE
from kvmmu.mmu.core._kvm cimport KVM_SHADOW_MMU, kvm, kvm_mmu_page, sp_level, spte_to_child
from kvmmu.mmu.core._page cimport (
    first_spte, list_remove, sp_get_gfn, track_possible_nx_huge_page, unhash_page, unlink_parent,
    untrack_possible_nx_huge_page,
)
from kvmmu.mmu.core._pte_list cimport pte_list_add, pte_list_remove, reserve_descs
from kvmmu.mmu.core._rmap cimport rmap_head, slot_of_sp
from kvmmu.mmu.core._slots cimport account_disallow_lpage, kvm_memory_slot
from kvmmu.mmu.kvm._state cimport Kvm


def damage(Kvm machine not None, what, uint32_t sp, int index=0, uint64_t value=0):
    """Break one thing of a shadow page, or of its entry at index, and leave all others as they are."""
    if not 0 < sp < machine.k.page_end or not machine.k.pages[sp].in_use or not 0 <= index < SPTE_ENT_PER_PAGE:
        raise ValueError(f"entry {index} of page {sp}: there is no such entry")
    with machine.lock:
        break_one(machine, what, sp, index, value)


cdef int break_one(Kvm machine, what, uint32_t sp, int index, uint64_t value) except -1:
    cdef kvm *k = machine.k
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
