"""The builders of host page tables, KVM's two MMUs. From the bottom up:

`host`     the host: its paging, its features, its kernel.
`core`     the parts of both MMUs: SPTEs, memslots, reverse maps, shadow pages, a page fault.
`tdp`      TdpMmu, which maps guest-physical addresses. `shadow`: ShadowMmu, which follows the guest's tables.
`kvm`      the users of both MMUs: the entry from an exit, memslots and notifiers, inspection. `audit` checks all of it.
"""
# Below: arch, memory, _walk, walk
# Order: host, core, tdp, shadow, kvm, audit
