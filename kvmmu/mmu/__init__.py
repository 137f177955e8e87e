"""The builders of host page tables, as KVM has them. From the bottom up:

`host`     what the host is: its paging, its features, its kernel.
`core`     what both MMUs are made of: SPTEs, memslots, reverse maps, shadow pages, a page fault.
`tdp`      TdpMmu, which maps guest-physical addresses. `shadow`: ShadowMmu, which follows the guest's tables.
`kvm`      what knows both: the way in, memslots and notifiers, inspection. `audit` checks all of it.
"""
# Below: arch, memory, _walk, walk
# Order: host, core, tdp, shadow, kvm, audit
