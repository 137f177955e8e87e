"""The parts of both MMUs.

`_spte`    the entries: layouts, make_spte(), checks, access tracking, MMIO entries. No state.
`_slots`   memslots: host backing, large-page limits, write tracking, dirty log.
`_pte_list`  lists of SPTEs: of a frame (reverse map), and of the parents of a shadow page.
`_trace`   the ring that tracepoints write to.
`_kvm`     struct kvm, kvm_vcpu, kvm_mmu: all state of one virtual machine; requests to its vCPUs.
`_page`    shadow pages: the arena, the hash, the lists, parents.
`_rmap`    the reverse map: the leaf SPTEs of a frame.
`_unsync`  shadow pages whose tables the guest may write to: which may become unsync, and the marks in their parents.
`_copy`    copies of all of it but the vCPUs.
`_fault`   one page fault: its arguments, host look-up, huge-page adjustment, the leaf SPTE, MMIO.
"""
# Order: _spte, _slots, _pte_list, _trace, _kvm, _page, _rmap, _unsync, _copy, _fault
