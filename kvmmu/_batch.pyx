"""The walk over arrays. Rows are independent; columns, shapes and contexts were checked by the caller (`_pagewalk.pyx`)."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kvmmu._batch cimport batch_columns
from kvmmu._format cimport explicit_access
from kvmmu._walk cimport kvm_pagewalk, walk_result


cdef void translate_rows(const kvm_pagewalk *walks, const uint32_t *ctx, const uint64_t *gva, const uint8_t *access,
                         size_t access_stride, size_t start, size_t stop, bint set_ad, const batch_columns *out) noexcept nogil:
    cdef const kvm_pagewalk *w = walks
    cdef walk_result r
    cdef size_t i
    for i in range(start, stop):
        if ctx is not NULL:
            w = &walks[ctx[i]]
        w.gva_to_gpa(w, gva[i], explicit_access(access[i * access_stride]), set_ad, &r)
        if out.gpa is not NULL:
            out.gpa[i] = r.gpa
        if out.status is not NULL:
            out.status[i] = r.status
        if out.error_code is not NULL:
            out.error_code[i] = r.error_code
        if out.level is not NULL:
            out.level[i] = r.level
        if out.pte is not NULL:
            out.pte[i] = r.pte
        if out.pte_gpa is not NULL:
            out.pte_gpa[i] = r.pte_gpa
        if out.pte_access is not NULL:
            out.pte_access[i] = r.pte_access
        if out.refs is not NULL:
            out.refs[i] = r.refs
