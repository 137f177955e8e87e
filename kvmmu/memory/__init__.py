"""Guest-physical memory: where the bytes lie, and who keeps them alive."""
# Below: arch
# Order: _maker, _alloc, _lock, _mapping, saved_bytes, _regions, _memory, _callbacks, _saved, _vmx_memory

from kvmmu.memory import _callbacks  # noqa: F401    # GuestMemory.from_callbacks() makes its class
