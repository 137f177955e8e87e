"""Accesses that KVM carries out itself, as `_emulation.pxd` describes them."""

from libc.stdint cimport uint32_t, uint64_t

from kvmmu._walk cimport walk_result, walk_step
from kvmmu.arch._bits cimport (
    ACCESS_FETCH_MASK, ACCESS_WRITE_MASK, CR4_PAE_MASK, INVALID_GPA, PAGE_OFFSET_MASK, PAGE_SHIFT, ROLE_DIRECT_MASK,
    STATUS_NON_CANONICAL, STATUS_OK,
)
from kvmmu.arch._format cimport permission_fault
from kvmmu.machine._exits cimport set_fault
from kvmmu.machine._state cimport access_result, machine
from kvmmu.memory._memory cimport kvmmu_store
from kvmmu.mmu.core._fault cimport host_reads, host_writes, is_mmio_cached
from kvmmu.mmu.core._kvm cimport kvm, memslots_of
from kvmmu.mmu.core._slots cimport gfn_to_memslot, host_page_of, host_pfn_of, kvm_memory_slot, mark_slot_dirty
from kvmmu.mmu.kvm._entry cimport account_guest_fault, unprotect_and_retry
from kvmmu.mmu.shadow._guest_tables cimport account_walk
from kvmmu.mmu.shadow._track cimport track_write
from kvmmu.tlb._tlb cimport tlb_invlpg


cdef void emulated_write(machine *m, kvm_memory_slot *slot, uint64_t gpa) noexcept nogil:
    """Write the bytes of the access to memory, if they are known, and zap what they make stale in shadow pages of the frame."""
    cdef kvm *k = m.k
    cdef uint64_t gfn = gpa >> PAGE_SHIFT, entry
    if m.data is not NULL and m.size == 0:              # only to see whether the write will go through
        return
    host_writes(k, slot, gfn)
    mark_slot_dirty(slot, gfn)
    if m.data is NULL:
        entry = sizeof(uint64_t) if m.arch.cr4 & CR4_PAE_MASK else sizeof(uint32_t)
        track_write(k, m.vcpu.as_id, gpa & ~(entry - 1), entry, False)
        return
    kvmmu_store(slot.hva + (gpa - (slot.base_gfn << PAGE_SHIFT)), m.data, m.size)
    track_write(k, m.vcpu.as_id, gpa, m.size, (m.arch.cr4 & CR4_PAE_MASK) != 0)


cdef bint is_known_as_mmio(const machine *m, uint64_t addr, uint32_t access) noexcept nogil:
    """True if the page is in the MMIO cache, whose rights allow the access: KVM does not walk then."""
    if access & ACCESS_FETCH_MASK or not is_mmio_cached(m.vcpu, addr, False):
        return False
    return m.sw.cpu_role & ROLE_DIRECT_MASK or not permission_fault(m.sw.fmt, m.sw.vcpu.keys, m.vcpu.mmio_access, 0, access)


cdef void machine_emulate(machine *m, uint64_t addr, uint32_t access, access_result *out) noexcept nogil:
    """Do step 6: walk the guest's tables. An access outside of memory, and a write to a read-only slot, is MMIO."""
    cdef kvm *k = m.k
    cdef kvm_memory_slot *slot
    cdef walk_result r
    cdef walk_step steps[5]
    cdef uint64_t gfn
    cdef bint by_ngpa_walk
    cdef int n
    k.stats.insn_emulation += 1
    if is_known_as_mmio(m, addr, access):
        k.stats.mmio_exits += 1
        out.status, out.error_code = STATUS_OK, 0
        out.gpa, out.hpa = (m.vcpu.mmio_gfn << PAGE_SHIFT) | (addr & PAGE_OFFSET_MASK), INVALID_GPA
        return
    n = m.sw.walk_addr(&m.sw, addr, access, &r, steps)
    k.trace.vcpu = m.vcpu.id
    account_walk(m.vcpu, &m.sw, addr, access, &r, steps, n)
    if r.status != STATUS_OK:
        set_fault(out, &r)
        by_ngpa_walk = r.fault_gpa != INVALID_GPA
        if r.status != STATUS_NON_CANONICAL:
            account_guest_fault(m.vcpu, r.fault_gpa if by_ngpa_walk else addr, &r, by_ngpa_walk)
            tlb_invlpg(m.tlb, addr)
        return
    out.status, out.error_code = STATUS_OK, 0
    out.gpa = r.gpa
    out.hpa = INVALID_GPA
    gfn = r.gpa >> PAGE_SHIFT
    slot = gfn_to_memslot(memslots_of(k, m.vcpu.as_id), gfn)
    if slot is NULL and access & ACCESS_FETCH_MASK:     # no instruction to carry out
        k.stats.insn_emulation_fail += 1
        return
    if slot is NULL or (slot.readonly and access & ACCESS_WRITE_MASK):
        k.stats.mmio_exits += 1
        return
    if access & ACCESS_WRITE_MASK:
        emulated_write(m, slot, r.gpa)
    else:
        host_reads(slot, gfn)
    out.hpa = (host_pfn_of(slot, gfn, host_page_of(slot, gfn)) << PAGE_SHIFT) | (r.gpa & PAGE_OFFSET_MASK)


cdef bint repeats_write(machine *m, uint64_t addr, uint32_t access, uint64_t exit_addr) noexcept nogil:
    cdef walk_result r
    cdef walk_step steps[5]
    cdef int n
    if m.page_table_writing or not m.vcpu.allow_retry:
        return False
    n = m.sw.walk_addr(&m.sw, addr, access, &r, steps)
    account_walk(m.vcpu, &m.sw, addr, access, &r, steps, n)
    if r.status != STATUS_OK or not unprotect_and_retry(m.vcpu, exit_addr, r.gpa >> PAGE_SHIFT):
        return False
    m.k.stats.insn_emulation += 1
    return True
