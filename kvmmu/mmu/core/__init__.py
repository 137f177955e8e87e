"""What both MMUs are made of.

`_spte`    the entries: layouts, make_spte(), checks, access tracking, MMIO entries. No state.
`_slots`   memslots: host backing, large-page limits, write tracking, dirty log.
`_pte_list`  lists of SPTEs: of a frame (reverse map), and of the parents of a shadow page.
`_trace`   the ring that tracepoints write to.
`_kvm`     struct kvm, kvm_vcpu, kvm_mmu: all state of one virtual machine; requests to its vCPUs.
`_page`    shadow pages: the arena, the hash, the lists, parents.
`_rmap`    the reverse map: the leaf SPTEs of a frame.
`_unsync`  shadow pages that the guest may write to: who may become unsync, and what its parents know of it.
`_fault`   one page fault: what it asks for, host look-up, huge-page adjustment, the SPTE it ends in, MMIO.
"""
# Order: _spte, _slots, _pte_list, _trace, _kvm, _page, _rmap, _unsync, _fault
