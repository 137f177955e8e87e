"""Guest-physical memory: where the bytes lie, and who keeps them alive."""
# Below: arch
# Order: _maker, _alloc, _lock, _mapping, saved_bytes, _regions, _memory, _callbacks, _saved
