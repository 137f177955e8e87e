"""What knows both MMUs.

`_entry`   from an exit to a return code; roots of a vCPU.
`_memory`, `_state`  Kvm: a virtual machine's state as a Python object: memslots; notifiers, dirty log.
`_inspect` counters, events and pages as arrays.
"""
# Order: _entry, _memory, _state, _inspect
