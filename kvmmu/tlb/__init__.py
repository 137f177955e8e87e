"""The TLB: what the processor remembers of translations."""
# Below: arch, memory, walk
# Order: _tlb, _structure, _hierarchy, hierarchy
