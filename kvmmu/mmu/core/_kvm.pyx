"""Birth and death of a virtual machine's state, and requests to its vCPUs."""

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint32_t
from libc.stdlib cimport calloc, free
from libc.string cimport memmove

from kvmmu.arch._bits cimport PG_LEVEL_2M, PG_LEVEL_4K
from kvmmu.memory._alloc cimport kvmmu_grow_array
from kvmmu.mmu.core._kvm cimport REQ_TLB_FLUSH, kvm, kvm_vcpu
from kvmmu.mmu.core._pte_list cimport free_pool
from kvmmu.mmu.core._slots cimport free_memslot


cdef kvm *new_kvm() noexcept nogil:
    return <kvm *>calloc(1, sizeof(kvm))


cdef void free_kvm(kvm *k) noexcept nogil:
    cdef size_t i, as_id
    if k is NULL:
        return
    for i in range(k.page_end):
        free(k.pages[i].shadowed_translation)
    for as_id in range(2):
        for i in range(k.slots[as_id].count):
            free_memslot(k.slots[as_id].slots[i])
        free(k.slots[as_id].slots)
    for i in range(k.nr_vcpus):
        free(k.vcpus[i])
    free_pool(&k.lists)
    free(k.trace.events)
    free(k.sptes)
    free(k.pages)
    free(k.vcpus)
    free(k)


cdef void make_all_vcpus_request(kvm *k, uint32_t request) noexcept nogil:
    cdef size_t i
    for i in range(k.nr_vcpus):
        k.vcpus[i].requests |= request


cdef void flush_remote_tlbs(kvm *k) noexcept nogil:
    k.stats.remote_tlb_flush_requests += 1
    make_all_vcpus_request(k, REQ_TLB_FLUSH)


cdef void count_leaf(kvm *k, int level, int64_t count) noexcept nogil:
    if level == PG_LEVEL_4K:
        k.stats.pages_4k += count
    elif level == PG_LEVEL_2M:
        k.stats.pages_2m += count
    else:
        k.stats.pages_1g += count


cdef kvm_vcpu *add_vcpu(kvm *k, uint32_t id) noexcept nogil:
    cdef kvm_vcpu *vcpu = <kvm_vcpu *>calloc(1, sizeof(kvm_vcpu))
    if vcpu is NULL or return_vcpu(k, vcpu):
        free(vcpu)
        return NULL
    vcpu.kvm, vcpu.id = k, id
    vcpu.mmu = &vcpu.root_mmu
    return vcpu


cdef int return_vcpu(kvm *k, kvm_vcpu *vcpu) noexcept nogil:
    cdef kvm_vcpu **grown = <kvm_vcpu **>kvmmu_grow_array(k.vcpus, k.nr_vcpus + 1, sizeof(kvm_vcpu *))
    if grown is NULL:
        return -1
    k.vcpus = grown
    k.vcpus[k.nr_vcpus] = vcpu
    k.nr_vcpus += 1
    return 0


cdef void withdraw_vcpu(kvm *k, const kvm_vcpu *vcpu) noexcept nogil:
    cdef size_t i = 0
    while i < k.nr_vcpus and k.vcpus[i] != vcpu:
        i += 1
    if i < k.nr_vcpus:
        k.nr_vcpus -= 1
        memmove(&k.vcpus[i], &k.vcpus[i + 1], (k.nr_vcpus - i) * sizeof(kvm_vcpu *))


cdef void remove_vcpu(kvm *k, size_t i) noexcept nogil:
    cdef kvm_vcpu *vcpu = k.vcpus[i]
    withdraw_vcpu(k, vcpu)
    free(vcpu)
