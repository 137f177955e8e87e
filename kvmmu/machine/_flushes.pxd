"""Invalidations by the guest, in the TLB and in tables that shadow the guest's.

The caller holds the lock, and has updated the modes.
"""

from libc.stdint cimport uint32_t, uint64_t

from kvmmu.machine._modes cimport Modes
from kvmmu.machine._state cimport machine

# INVLPG, and the delivery of a fault: invalidate a linear address; one that is not canonical has no translations. IN current,
# prev_roots: in tables of the present root, of the previous roots
cdef int invalidate_gva(Modes modes, uint64_t gva, uint32_t roots) except -1
# The same of an address of L2's in the tables that shadow L1's second stage
cdef int invalidate_ngpa(Modes modes, uint64_t ngpa, uint32_t roots) except -1
# INVPCID. IN type, pcid, gva: as of the instruction, checked
cdef int flush_by_pcid(Modes modes, int type, uint32_t pcid, uint64_t gva) except -1
# MOV to CR3: flush translations of its PCID, global ones excepted, unless noflush; take a root of the new CR3. IN before: the
# CR3 until now
cdef int load_cr3(Modes modes, uint64_t before, bint noflush, bint pdptrs_changed) except -1
# Free the roots of a shadow MMU: registers that roles are made of were written
cdef void leave_roots(machine *m) noexcept nogil
# Flush all translations of the guest, global ones too, and synchronize every root of a shadow MMU before the guest runs
cdef void flush_all(machine *m) noexcept nogil
# INVEPT: free roots that shadow L1's EPT with this EPTP. IN every: of any EPTP
cdef void flush_ept(machine *m, bint every, uint64_t eptp) noexcept nogil
# INVVPID: flush translations of L2's, whatever their VPID. IN type, addr: as of the instruction
cdef void flush_vpid(machine *m, int type, uint64_t addr) noexcept nogil
