"""The root that the processor walks from, as `_roots.pxd` describes it."""

from libc.errno cimport ENOMEM
from libc.stdint cimport uint32_t, uint64_t

from kvmmu.arch._bits cimport (
    CR3_PCID_MASK, CR4_PCIDE_MASK, EPTP_AD_MASK, EPTP_LEVEL_SHIFT, EPTP_MT_WB, ROLE_AD_DISABLED_MASK, ROLE_LEVEL_MASK,
)
from kvmmu.machine._state cimport machine, use_arena
from kvmmu.mmu.core._kvm cimport REQ_TLB_FLUSH, kvm, sp_hpa
from kvmmu.mmu.core._page cimport first_spte
from kvmmu.mmu.core._spte cimport is_shadow_present_pte
from kvmmu.mmu.kvm._entry cimport prepare_mmu
from kvmmu.mmu.tdp._tdp cimport tdp_page_fault
from kvmmu.tlb._tlb cimport tlb_flush_all, tlb_use


cdef void machine_use_tags(machine *m) noexcept nogil:
    """Use the tags. A space of the TLB is a role of host tables; under L1's second stage it is a root."""
    cdef uint64_t space = m.mmu.root_role
    if m.mmu == &m.vcpu.guest_mmu:
        space = sp_hpa(m.k, m.mmu.root.sp) if m.mmu.root.valid else 0
    tlb_use(m.tlb, space, <uint32_t>(m.arch.cr3 & CR3_PCID_MASK) if m.arch.cr4 & CR4_PCIDE_MASK else 0)


cdef int machine_prepare_root(machine *m) noexcept nogil:
    cdef kvm *k = m.k
    if prepare_mmu(m.vcpu):
        return -ENOMEM
    if use_root(m) and m.mmu.page_fault == tdp_page_fault:
        m.vcpu.requests |= REQ_TLB_FLUSH
    if m.vcpu.requests & REQ_TLB_FLUSH:
        m.vcpu.requests &= ~<uint32_t>REQ_TLB_FLUSH
        k.stats.tlb_flush += 1
        m.stage.epoch += 1
        tlb_flush_all(m.tlb)
    return 0


cdef bint use_root(machine *m) noexcept nogil:
    """Load the root into the processor's CR3, EPTP or nested CR3; True if it is another one than before."""
    cdef kvm *k = m.k
    cdef uint64_t level = m.mmu.root_role & ROLE_LEVEL_MASK, hpa = sp_hpa(k, m.mmu.root.sp), spte
    cdef bint other = m.root_hpa != hpa
    cdef int i
    use_arena(m)
    m.root_hpa = hpa
    if other:
        m.stage.epoch += 1
    m.host.cr3 = m.host.nested_pgd = hpa
    if not k.tdp_enabled:
        for i in range(4):                              # level 3: the processor loads four registers
            spte = k.sptes[first_spte(m.mmu.root.sp) + i]
            m.host.pdptrs[i] = spte if is_shadow_present_pte(spte) else 0
    elif k.spte.ept:
        m.host.nested_pgd |= EPTP_MT_WB | ((level - 1) << EPTP_LEVEL_SHIFT)
        if not m.mmu.root_role & ROLE_AD_DISABLED_MASK:
            m.host.nested_pgd |= EPTP_AD_MASK
    if m.mmu == &m.vcpu.guest_mmu:
        machine_use_tags(m)
    return other
