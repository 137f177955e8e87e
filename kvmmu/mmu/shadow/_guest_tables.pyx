"""Walks of guest tables for a shadow MMU, as `_guest_tables.pxd` describes them."""

from libc.stdint cimport uint32_t, uint64_t

from kvmmu._walk cimport kvm_pagewalk, walk_result, walk_step
from kvmmu.arch._bits cimport ACCESS_PFEC_MASK, ACCESS_WRITE_MASK, ACC_ALL, PAGE_SHIFT, PG_LEVEL_1G, STATUS_OK
from kvmmu.arch._gpte cimport KVMMU_FORMAT_64
from kvmmu.mmu.core._fault cimport host_reads
from kvmmu.mmu.core._kvm cimport kvm_vcpu, memslots_of
from kvmmu.mmu.core._slots cimport gfn_to_memslot, kvm_memory_slot, mark_slot_dirty
from kvmmu.mmu.core._trace cimport (
    TRACE_PAGETABLE_WALK, TRACE_PAGING_ELEMENT, TRACE_SET_ACCESSED_BIT, TRACE_SET_DIRTY_BIT, TRACE_WALKER_ERROR, trace,
)


cdef uint64_t as_read(const kvm_pagewalk *w, const walk_step *step) noexcept nogil:
    """Return an entry as it was before the walk set bits in it."""
    cdef uint64_t pte = step.pte
    if step.sets_accessed:
        pte &= ~w.accessed_mask
    if step.sets_dirty:
        pte &= ~(w.accessed_mask << 1)
    return pte


cdef void account_walk(kvm_vcpu *vcpu, const kvm_pagewalk *w, uint64_t addr, uint32_t access, const walk_result *r,
                       const walk_step *steps, int n) noexcept nogil:
    cdef kvm_memory_slot *slot
    cdef int i
    trace(&vcpu.kvm.trace, TRACE_PAGETABLE_WALK, addr, access & ACCESS_PFEC_MASK)
    for i in range(n):
        trace(&vcpu.kvm.trace, TRACE_PAGING_ELEMENT, as_read(w, &steps[i]), steps[i].level)
    if r.status != STATUS_OK:
        trace(&vcpu.kvm.trace, TRACE_WALKER_ERROR, r.error_code)
    for i in range(n):
        slot = gfn_to_memslot(memslots_of(vcpu.kvm, vcpu.as_id), steps[i].pte_gpa >> PAGE_SHIFT)
        if slot is not NULL:
            host_reads(slot, steps[i].pte_gpa >> PAGE_SHIFT)
        if not steps[i].sets_accessed and not steps[i].sets_dirty:
            continue
        if steps[i].sets_accessed:
            trace(&vcpu.kvm.trace, TRACE_SET_ACCESSED_BIT, steps[i].pte_gpa)
        if steps[i].sets_dirty:
            trace(&vcpu.kvm.trace, TRACE_SET_DIRTY_BIT, steps[i].pte_gpa)
        if slot is not NULL:
            mark_slot_dirty(slot, steps[i].pte_gpa >> PAGE_SHIFT)


cdef bint walk_guest(kvm_vcpu *vcpu, const kvm_pagewalk *w, uint64_t addr, uint32_t access, guest_walk *walk) noexcept nogil:
    cdef walk_step steps[5]
    cdef uint32_t rights = <uint32_t>ACC_ALL
    cdef int i, level, n = w.walk_addr(w, addr, access, &walk.result, steps)
    account_walk(vcpu, w, addr, access, &walk.result, steps, n)
    if walk.result.status != STATUS_OK:
        return False
    walk.top_level = w.level
    for i in range(n):
        level = steps[i].level
        if level == PG_LEVEL_1G and w.level == PG_LEVEL_1G and w.format == KVMMU_FORMAT_64:
            walk.top_level = level - 1                  # a PDPTE: no table of the guest's that is shadowed, and no rights
            continue
        walk.ptes[level - 1], walk.pte_gpa[level - 1] = steps[i].pte, steps[i].pte_gpa
        walk.table_gfn[level - 1] = steps[i].pte_gpa >> PAGE_SHIFT
        walk.pt_access[level - 1] = rights
        rights &= steps[i].access
    walk.level = walk.result.level
    walk.pte_access = walk.result.pte_access
    if not access & ACCESS_WRITE_MASK:
        walk.pte_access = protect_clean(w, walk.pte_access, walk.ptes[walk.level - 1])
    walk.gfn = walk.result.gpa >> PAGE_SHIFT
    return True


cdef bint gpte_changed(kvm_vcpu *vcpu, const kvm_pagewalk *w, const guest_walk *walk, int level) noexcept nogil:
    cdef uint64_t now
    return not read_guest_pte(vcpu, w, walk.pte_gpa[level - 1], &now) or now != walk.ptes[level - 1]
