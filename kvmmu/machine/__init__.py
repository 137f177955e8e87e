"""The machine of one vCPU: what one access costs in walks, TLB look-ups, exits and page faults."""
# Below: arch, memory, _walk, walk, tlb, mmu
# Order: _rights, _state, _roots, _exits, _emulation, _access, _explain, _modes, _mmus, _flushes, _machine, _audit_tlb
