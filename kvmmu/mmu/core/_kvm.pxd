"""The state of one virtual machine (struct kvm), of its vCPUs, and of an MMU of theirs.

Shadow pages are named by number. Page n has the 512 entries `kvm.sptes[512 * n]` on, the words `kvm.pages[n]`, and lies at the
host-physical address `kvm.arena_hpa + 4096 * n`, where the processor's walk finds it. Page 0 is the dummy root: always empty,
and so the number 0 means "none" in every link. Both arrays move when they grow: after `reserve_pages()`, which alone grows
them, pointers into them are stale, numbers are not.

Everything here is plain data; no Python object is reached from a fault. One lock for each virtual machine, which the compiled
classes hold, stands for mmu_lock.
"""

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from kvmmu._walk cimport kvm_pagewalk, walk_result
from kvmmu.arch._bits cimport PAGE_SHIFT, ROLE_LEVEL_MASK, SPTE_BASE_ADDR_MASK, SPTE_ENT_PER_PAGE
from kvmmu.arch._format cimport kvm_page_format
from kvmmu.mmu.core._pte_list cimport pte_list_pool
from kvmmu.mmu.core._slots cimport kvm_memory_slot, slot_table
from kvmmu.mmu.core._spte cimport spte_format
from kvmmu.mmu.core._trace cimport trace_ring

cdef enum:
    KVM_MMU_HASH_BUCKETS = 4096
    KVM_SHADOW_MMU = 0              # index of the lists that each kind of MMU has for itself
    KVM_TDP_MMU = 1
    PREV_ROOTS = 3
    ROOT_CURRENT = 1                # a set of roots of an MMU: the present one, and bit i + 1 for prev_roots[i]
    ROOTS_PREVIOUS = 14
    ROOTS_ALL = 15
    # requests: work of a vCPU before it runs again
    REQ_TLB_FLUSH = 1
    REQ_FREE_OBSOLETE_ROOTS = 2
    REQ_LOAD_MMU_PGD = 4
    REQ_MMU_SYNC = 8
    REQ_TLB_FLUSH_GUEST = 16

cdef struct kvm_mmu_page:
    uint64_t gfn
    uint32_t role                   # ROLE_*, the low half
    uint32_t hash_next              # next in its bucket; of a free page the next free one
    uint32_t prev, next             # in the list that it is on
    uint32_t nx_prev, nx_next       # in a list of possible NX huge pages
    uint64_t parents                # list head (`_pte_list.pxd`): the entries that point here
    uint64_t *shadowed_translation  # gfn << 12 | ACC_* of each entry; NULL for a direct page
    uint64_t unsync_child_bitmap[8]
    uint32_t unsync_children
    uint32_t root_count
    uint8_t mmu_valid_gen
    uint8_t write_flooding_count
    bint unsync
    bint tdp_mmu_page
    bint held                       # a root of a TdpMmu: the virtual machine has a reference of its own
    bint special                    # pae_root, pml4_root or pml5_root of an MMU: no child counts it a parent
    bint nx_huge_page_disallowed
    bint in_use

# A list of shadow pages, oldest first.
cdef struct page_list:
    uint32_t head, tail
    size_t count

# Counters by KVM's names. pages_*, mmu_unsync and nx_lpage_splits tell how many there are at present.
cdef struct kvm_stats:
    int64_t pf_taken, pf_fixed, pf_emulate, pf_spurious, pf_fast, pf_guest, pf_mmio_spte_created
    int64_t invlpg, tlb_flush, remote_tlb_flush_requests
    int64_t mmu_shadow_zapped, mmu_pte_write, mmu_pde_zapped, mmu_flooded, mmu_recycled, mmu_cache_miss, mmu_unsync
    int64_t pages_4k, pages_2m, pages_1g, nx_lpage_splits
    int64_t max_mmu_rmap_size, max_mmu_page_hash_collisions
    int64_t exits, mmio_exits, insn_emulation, insn_emulation_fail, pml_full
    int64_t bugs                    # of invariants that were found broken

cdef struct kvm
cdef struct kvm_vcpu

# The operations that both MMUs have a part in; `kvm/_gfns.pxd` describes them.
ctypedef void (*unmap_gfns_fn)(kvm *k, kvm_memory_slot *slot, uint64_t start, uint64_t end) noexcept nogil
ctypedef bint (*write_protect_gfn_fn)(kvm *k, kvm_memory_slot *slot, uint64_t gfn, int min_level) noexcept nogil

cdef struct kvm:
    spte_format spte
    slot_table slots[2]             # by address space: 1 is SMM
    bint one_address_space          # both are slots[0]
    uint64_t memslot_gen            # of MMIO entries; bit 63 while an update is under way
    uint64_t next_pfn
    pte_list_pool lists
    trace_ring trace
    kvm_stats stats
    uint64_t *sptes
    kvm_mmu_page *pages
    size_t page_capacity
    size_t page_end                 # pages below were in use at some time
    size_t pages_in_use
    uint32_t free_page
    uint64_t arena_hpa
    uint32_t hash[4096]
    page_list active_mmu_pages
    page_list tdp_mmu_pages         # all but roots
    page_list tdp_mmu_roots
    page_list possible_nx_huge_pages[2]     # linked by nx_prev and nx_next
    uint64_t n_used_mmu_pages, n_max_mmu_pages
    uint64_t indirect_shadow_pages
    uint8_t mmu_valid_gen
    uint64_t mmu_invalidate_start, mmu_invalidate_end       # gfns of an invalidation under way; equal: none
    kvm_vcpu **vcpus
    size_t nr_vcpus
    bint vcpu_is_gone               # `gone` is set in one of them, or more
    unmap_gfns_fn unmap_gfns
    write_protect_gfn_fn write_protect_gfn
    bint tdp_enabled
    bint slot_zap_all               # a memslot that goes takes all page tables with it, not only its own
    bint has_shadow_roots           # memslots have rmaps
    bint limit_requested            # n_max_mmu_pages is the VMM's choice, not that of the memory's size
    bint smep_andnot_wp             # role bits of an older kernel: SMEP counts only while CR0.WP is clear

# One page fault. The first block comes from the exit; the MMU fills in the rest.
cdef struct kvm_page_fault:
    uint64_t addr
    uint64_t error_code
    bint exec, write, present, rsvd, user
    bint prefetch
    int max_level                   # largest page that may be mapped at all
    int req_level                   # largest that host and slot allow
    int goal_level                  # that will be mapped
    bint huge_page_disallowed       # by the NX mitigation
    bint map_writable               # the host lets the page be written
    uint8_t host_page
    uint64_t gfn
    uint64_t pfn
    kvm_memory_slot *slot           # NULL: no memory there, MMIO

ctypedef int (*page_fault_fn)(kvm_vcpu *vcpu, kvm_page_fault *fault) noexcept nogil

cdef struct kvm_mmu_root:
    uint64_t pgd                    # ignored by a TdpMmu
    uint32_t sp                     # 0: the dummy root
    bint valid

cdef struct kvm_mmu:
    page_fault_fn page_fault        # IN fault: addr and the bits of the error code. Returns RET_PF_*, or a negative errno
    const kvm_page_format *fmt      # of the SPTEs
    const kvm_pagewalk *w           # the walk that is shadowed; NULL: a TdpMmu
    kvm_mmu_root root
    kvm_mmu_root prev_roots[3]
    uint32_t root_role
    # pages for the levels 3, 4 and 5 of a root that no guest table stands behind; 0: not made yet
    uint32_t pae_root, pml4_root, pml5_root

cdef struct kvm_vcpu:
    kvm *kvm
    kvm_mmu *mmu                    # the active one
    kvm_mmu root_mmu
    kvm_mmu guest_mmu
    uint32_t id
    uint32_t requests
    uint8_t as_id
    bint guest_mode
    int maxphyaddr                  # of the guest
    uint32_t eflags_ac              # ACCESS_AC of the access under way
    uint64_t rip                    # of the instruction under way
    bint injected                   # the last fault was the guest's: it is in `guest_fault`
    bint allow_retry                # the last write may be repeated instead of emulated, after `unprotect_and_retry()`
    walk_result guest_fault
    uint64_t mmio_gva               # MMIO cache: the last MMIO page; 0: of no linear address
    uint64_t mmio_gfn, mmio_gen     # its frame, if not 0, and the memslot generation that this holds for
    uint32_t mmio_access
    uint64_t last_retry_eip, last_retry_addr
    uint32_t pml_page               # of the arena: the processor's log of dirty pages; 0: none
    uint16_t pml_index              # of its next entry, once `gone` is set
    bint gone                       # nobody runs it any more; the next `sync()` frees its roots


cdef inline kvm_mmu_page *sp_of(kvm *k, uint64_t sptep) noexcept nogil:
    """Return the page that an entry is in."""
    return &k.pages[sptep // SPTE_ENT_PER_PAGE]


cdef inline int sp_level(const kvm_mmu_page *sp) noexcept nogil:
    return <int>(sp.role & ROLE_LEVEL_MASK)


cdef inline uint64_t sp_hpa(const kvm *k, uint32_t sp) noexcept nogil:
    return k.arena_hpa + (<uint64_t>sp << PAGE_SHIFT)


cdef inline uint32_t spte_to_child(const kvm *k, uint64_t spte) noexcept nogil:
    """Return the page that a present entry other than a leaf points to."""
    return <uint32_t>(((spte & SPTE_BASE_ADDR_MASK) - k.arena_hpa) >> PAGE_SHIFT)


cdef inline slot_table *memslots_of(kvm *k, int as_id) noexcept nogil:
    return &k.slots[0 if k.one_address_space else as_id]


cdef inline bint invalidation_under_way(const kvm *k, uint64_t gfn) noexcept nogil:
    return gfn - k.mmu_invalidate_start < k.mmu_invalidate_end - k.mmu_invalidate_start


cdef kvm *new_kvm() noexcept nogil
cdef void free_kvm(kvm *k) noexcept nogil
# IN request: REQ_*
cdef void make_all_vcpus_request(kvm *k, uint32_t request) noexcept nogil
# Ask every vCPU to flush its TLB before it runs again
cdef void flush_remote_tlbs(kvm *k) noexcept nogil
cdef void count_leaf(kvm *k, int level, int64_t count) noexcept nogil
# NULL for want of memory
cdef kvm_vcpu *add_vcpu(kvm *k, uint32_t id) noexcept nogil
# Take a vCPU that holds no pages out of the virtual machine; the caller has it then. `return_vcpu()`: 0, or -1 for want of memory
cdef void withdraw_vcpu(kvm *k, const kvm_vcpu *vcpu) noexcept nogil
cdef int return_vcpu(kvm *k, kvm_vcpu *vcpu) noexcept nogil
# IN i: its place in k.vcpus; it holds no pages any more
cdef void remove_vcpu(kvm *k, size_t i) noexcept nogil
