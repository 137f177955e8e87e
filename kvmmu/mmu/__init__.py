"""The builders of host page tables: SPTEs, memslots, shadow pages, and the MMUs that put them together.

From the bottom up, each module importing those before it:

`_spte`    the entries: layouts, make_spte(), checks, access tracking, MMIO entries. No state.
`_slots`   memslots: host backing, large-page limits, write tracking, dirty log.
`_rmap`    lists of SPTEs: of a frame (reverse map), and of the parents of a shadow page.
`_trace`   the ring that tracepoints write to.
`_kvm`     struct kvm, kvm_vcpu, kvm_mmu: all state of one virtual machine; requests to its vCPUs.
`_page`    shadow pages: the arena, the hash, the lists, parents.
`_unsync`  shadow pages that the guest may write to: who may become unsync, and what its parents know of it.
`_fault`   one page fault: what it asks for, host look-up, huge-page adjustment, the SPTE it ends in, MMIO.
`_tdp`     TdpMmu: roots and the mapping of a fault. `_range`: zap, age, write protection, split, recovery.
`_zap`     entries and shadow pages that go; the limit on their number. `_range`: by frames, through the reverse maps.
`_guest_tables`  walks of the guest's tables, and what one entry of them says.
`_leaf`    leaf entries of shadow pages: of a fault, prefetched, synchronized.
`_sync`    unsync pages become what the guest's tables say; invalidation of an address.
`_shadow`  ShadowMmu: pages found by frame and role, and the mapping of a fault.
`_roots`   roots of a ShadowMmu: made, kept for later, left.
`_track`   writes that KVM carries out for the guest.
`_entry`   from an exit to a return code; roots of a vCPU.
`_memory`, `_state`  Kvm: a virtual machine's state as a Python object: memslots; notifiers, dirty log. `_audit` checks all
           of it, `_inspect` shows counters, events and pages as arrays.
"""
# Below: arch, memory, _walk, walk, host
# Order: core, tdp, shadow, kvm, audit
