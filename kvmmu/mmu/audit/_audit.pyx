"""The audit: every invariant of the page tables of a machine, checked entry by entry.

    pages    each one of a TdpMmu is reached from a root once, knows its parent, has the level, frame and role of its place;
             for those of a shadow MMU see `_shadow.pxd`
    entries  W, MMU-writable and host-writable; reserved bits; A/D type; no executable huge page under the NX mitigation
    leaves   map the host page that is behind the frame now, no larger than slot and host allow, with no right that role, guest,
             slot, host, write tracking, shadowed tables or dirty log deny
    MMIO     entries of the present generation stand where no slot is
    lists    are as long as their counters say
"""

from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t

from kvmmu.arch._bits cimport (
    PG_LEVEL_4K, PT64_INDEX_BITS, ROLE_ACCESS_MASK, ROLE_ACCESS_SHIFT, ROLE_INVALID_MASK, ROLE_LEVEL_MASK,
    SHADOW_NONPRESENT_VALUE, SPTE_ENT_PER_PAGE,
)
from kvmmu.arch._format cimport PageFormat
from kvmmu.mmu.audit._leaf cimport _Findings
from kvmmu.mmu.audit._shadow cimport audit_shadow, is_page_of_entries
from kvmmu.mmu.core._kvm cimport KVM_SHADOW_MMU, KVM_TDP_MMU, kvm, kvm_vcpu, spte_to_child
from kvmmu.mmu.core._page cimport first_spte
from kvmmu.mmu.core._pte_list cimport pte_list_count, pte_list_first
from kvmmu.mmu.core._spte cimport SpteFormat, is_last_spte, is_shadow_present_pte
from kvmmu.mmu.kvm._state cimport Kvm
from kvmmu.mmu.tdp._tdp cimport tdp_page_fault


cdef audit_tdp_page(_Findings f, PageFormat fmt, uint32_t sp, uint64_t base):
    """Audit a page of a TdpMmu and all below it. IN base: the first frame that it maps."""
    cdef kvm *k = f.k
    cdef uint32_t role = k.pages[sp].role
    cdef int level = <int>(role & ROLE_LEVEL_MASK), i
    cdef uint64_t spte, gfn
    f.tdp_pages += 1
    f.nx[KVM_TDP_MMU] += k.pages[sp].nx_huge_page_disallowed
    for i in range(SPTE_ENT_PER_PAGE):
        spte = k.sptes[first_spte(sp) + i]
        if spte == SHADOW_NONPRESENT_VALUE:
            continue
        gfn = base + (<uint64_t>i << (PT64_INDEX_BITS * (level - 1)))
        if not is_shadow_present_pte(spte):
            f.not_present(sp, gfn, level, spte)
            continue
        f.entry(fmt, sp, gfn, level, spte)
        if is_last_spte(spte, level):
            f.leaf(sp, gfn, level, spte, (role & ROLE_ACCESS_MASK) >> ROLE_ACCESS_SHIFT)
        else:
            audit_tdp_table(f, fmt, sp, i, gfn, level, spte)


cdef audit_tdp_table(_Findings f, PageFormat fmt, uint32_t sp, int i, uint64_t gfn, int level, uint64_t spte):
    cdef kvm *k = f.k
    cdef uint32_t child
    if level == PG_LEVEL_4K or not is_page_of_entries(k, spte):
        f.report(sp, gfn, level, spte, "points to no page of entries")
        return
    child = spte_to_child(k, spte)
    if not k.pages[child].in_use or not k.pages[child].tdp_mmu_page:
        f.report(sp, gfn, level, spte, f"points to page {child}, which is free")
    elif k.pages[child].role != k.pages[sp].role - 1 or k.pages[child].gfn != gfn:
        f.report(sp, gfn, level, spte, f"points to a page of role {k.pages[child].role:#x}, gfn {k.pages[child].gfn:#x}")
    elif pte_list_count(&k.lists, k.pages[child].parents) != 1 or (
            pte_list_first(&k.lists, k.pages[child].parents) != first_spte(sp) + i):
        f.report(sp, gfn, level, spte, f"page {child} does not know its parent")
    else:
        audit_tdp_page(f, fmt, child, gfn)


cdef size_t references(const kvm *k, uint32_t root) noexcept:
    """Return how many references a root of a TdpMmu has: of vCPUs, and of the machine itself."""
    cdef size_t i, n = k.pages[root].held
    cdef const kvm_vcpu *vcpu
    for i in range(k.nr_vcpus):
        vcpu = k.vcpus[i]
        if vcpu.root_mmu.page_fault == tdp_page_fault and vcpu.root_mmu.root.valid and vcpu.root_mmu.root.sp == root:
            n += 1
    return n


cdef size_t audit_tdp(_Findings f, SpteFormat sptes):
    """Audit every root of a TdpMmu and all below; returns how many roots there are."""
    cdef kvm *k = f.k
    cdef uint32_t root = k.tdp_mmu_roots.head
    cdef size_t roots = 0
    while root:
        roots += 1
        f.check(f"references to root {root}", references(k, root), k.pages[root].root_count)
        if k.pages[root].root_count == 0:
            f.errors.append(f"root {root} has no references")
        if k.pages[root].role & ROLE_INVALID_MASK:
            f.tdp_pages += 1                        # its vCPUs leave it; it is empty
            for i in range(SPTE_ENT_PER_PAGE):
                if k.sptes[first_spte(root) + i] != SHADOW_NONPRESENT_VALUE:
                    f.report(root, 0, 0, k.sptes[first_spte(root) + i], "an invalid root still maps")
        else:
            audit_tdp_page(f, sptes.tdp_format(int(k.pages[root].role & ROLE_LEVEL_MASK)), root, 0)
        root = k.pages[root].next
    return roots


def audit(Kvm machine not None, guest_tables=False, logged=frozenset()):
    """Return the faults of the page tables of a machine: one line each.

    guest_tables: compare shadow pages with the guest's tables, too (see `_guest.pxd`). logged: (address space, guest frame) of
    what processors have in their logs of dirty pages, and the dirty log does not have yet.
    """
    cdef _Findings f = _Findings()
    cdef kvm *k = machine.k
    cdef size_t roots, pages
    f.k, f.errors, f.synced, f.logged = k, [], set(), logged
    with machine.lock:
        machine.sync()
        pages = audit_shadow(f, machine.fmt, bool(guest_tables))
        roots = audit_tdp(f, machine.fmt)
        for name, want, have in (
                ("pages_4k", f.leaves[1], k.stats.pages_4k), ("pages_2m", f.leaves[2], k.stats.pages_2m),
                ("pages_1g", f.leaves[3], k.stats.pages_1g), ("pages", f.tdp_pages, roots + k.tdp_mmu_pages.count),
                ("roots", roots, k.tdp_mmu_roots.count),
                ("nx_lpage_splits", f.nx[KVM_TDP_MMU] + f.nx[KVM_SHADOW_MMU], k.stats.nx_lpage_splits),
                ("NX list of the TdpMmu", f.nx[KVM_TDP_MMU], k.possible_nx_huge_pages[KVM_TDP_MMU].count),
                ("NX list of the shadow MMU", f.nx[KVM_SHADOW_MMU], k.possible_nx_huge_pages[KVM_SHADOW_MMU].count),
                ("pages in use", f.tdp_pages + pages + (k.page_end > 0), k.pages_in_use), ("bugs", 0, k.stats.bugs)):
            f.check(name, want, have)
    return f.errors
