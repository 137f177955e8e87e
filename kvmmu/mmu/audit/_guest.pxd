"""Shadow pages in sync against the guest's own tables.

Writes to such tables are carried out by KVM, which lets the entry go that the guest's stood for. So an entry that is there says
what the guest's says: the same frame, rights no wider, and it was accessed. What a VMM writes there itself KVM does not learn of.
"""

from libc.stdint cimport uint32_t, uint64_t

from kvmmu._walk cimport kvm_pagewalk
from kvmmu.mmu.audit._leaf cimport _Findings
from kvmmu.mmu.core._kvm cimport kvm


# A walk of tables that a page may shadow a part of; NULL: nobody walks such tables now
cdef const kvm_pagewalk *shadowed_walk(const kvm *k, uint32_t sp) noexcept
# Entry i of a page that shadows a guest's table
cdef audit_guest_entry(_Findings f, const kvm_pagewalk *w, uint32_t sp, int i, uint64_t spte)
