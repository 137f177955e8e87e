"""The root that the processor walks from, and the tag of its translations in the TLB."""

from kvmmu.machine._state cimport machine

# Use the tags of the registers and the root in the TLB
cdef void machine_use_tags(machine *m) noexcept nogil
# Step 1 of an access: leave obsolete roots, load one, flush the TLB if asked. 0, or -ENOMEM
cdef int machine_prepare_root(machine *m) noexcept nogil
