"""Memory that a processor reads and writes beside page tables while a guest runs under EPT: the sub-page permission table, and
the information area of virtualization exceptions.

Sources: SDM vol. 3, "Sub-Page Write Permissions", "Virtualization Exceptions", "Convertible EPT Violations".
"""

from libc.stdint cimport uint64_t

from kvmmu.memory._memory cimport guest_mem

# What a sub-page permission table says of a write.
cdef enum:
    SUB_PAGE_ALLOWS
    SUB_PAGE_REFUSES            # an EPT violation
    SUB_PAGE_EVENT              # the table itself is to blame

# Look a write to a guest-physical address up. IN root: address of the table; maxphyaddr: of the processor. OUT qualification: of
# an event
cdef int sub_page_verdict(const guest_mem *mem, uint64_t root, int maxphyaddr, uint64_t gpa,
                          uint64_t *qualification) noexcept nogil
# Take the information area for a virtualization exception, and fill it. False: the guest has not left it free. IN store: False:
# nothing is written
cdef bint take_ve_area(const guest_mem *mem, uint64_t area, uint64_t qualification, uint64_t gva, uint64_t gpa,
                       bint store) noexcept nogil
