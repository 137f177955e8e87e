"""Shadow pages in sync against the guest's own tables.

KVM carries out writes to such tables, and zaps the entry that shadows the written one. So a present entry has the frame of the
guest's entry and no wider rights, and the guest's entry was accessed. A VMM that writes there itself does not tell KVM.
"""

from libc.stdint cimport uint32_t, uint64_t

from kvmmu._walk cimport kvm_pagewalk
from kvmmu.mmu.audit._leaf cimport _Findings
from kvmmu.mmu.core._kvm cimport kvm


# Return the walk of some vCPU whose tables a page may shadow a part of; NULL: there is none now
cdef const kvm_pagewalk *shadowed_walk(const kvm *k, uint32_t sp) noexcept
# Check entry i of a page that shadows a guest's table
cdef audit_guest_entry(_Findings f, const kvm_pagewalk *w, uint32_t sp, int i, uint64_t spte)
