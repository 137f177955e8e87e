"""The TLB: the processor's cache of translations."""
# Below: arch, memory, walk
# Order: _tlb, _structure, _hierarchy, hierarchy
