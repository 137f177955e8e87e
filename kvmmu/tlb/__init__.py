"""The TLB: the processor's cache of translations."""
# Below: arch, memory, _walk, walk
# Order: _tlb, _structure, _recency, _counts, _details, _levels, _hierarchy, _saved, counters, hierarchy, _stream, processor
