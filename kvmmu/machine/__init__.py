"""The machine of one vCPU: an access by TLB look-up, walks, exits and page faults.

`_rights`  tables of the accesses that a TLB entry allows.
`_state`   the state of one vCPU on its host; the result of an access.
`_roots`   the root that the processor walks from. `_exits`: exits and faults of the guest. `_emulation`: accesses by KVM itself.
`_access`  one access, and batches of them. `_explain`: faults of the guest as exceptions.
`_modes`   registers taken: walks, formats, the active MMU. `_mmus`: TdpMmu and ShadowMmu. `_flushes`: invalidations.
`_machine` Machine, which a Vcpu uses. `_audit_tlb`: the audit of a TLB. `_saved`: the state of
          a machine at one moment. `_hw_record`: the processor's walk of one address.
"""
# Below: arch, memory, _walk, walk, tlb, mmu
# Order: _rights, _state, _roots, _exits, _emulation, _access, _explain, _modes, _mmus, _flushes, _machine, _audit_tlb, _saved,
#     _hw_record
