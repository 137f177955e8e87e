"""The users of both MMUs.

`_entry`   from an exit to a return code; roots of a vCPU.
`_gfns`    guest frames in the tables of both MMUs: zap, write protection.
`_memslots`  Memslots: the memslots that follow a GuestMemory, and the host-physical memory behind them.
`_state`   Kvm, a virtual machine as a Python object: what the host and the VMM do to it. Backing, MMU notifiers, dirty log,
           eager splitting of huge pages, recovery of huge pages, zapping.
`_saved`   the state of a Kvm at one moment.
`_inspect` counters, events and pages as arrays.
"""
# Order: _entry, _gfns, _memslots, _state, _saved, _inspect
