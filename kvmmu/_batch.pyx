"""The walk over arrays. Rows are independent; columns, shapes and contexts were checked by the caller (`_pagewalk.pyx`)."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t

from kvmmu._batch cimport batch_columns
from kvmmu._format cimport explicit_access
from kvmmu._walk cimport kvm_pagewalk, walk_result


cdef bint wants_more(const batch_columns *out) noexcept nogil:
    """Whether a column beside gpa, status and error_code is wanted."""
    return (out.level is not NULL or out.pte is not NULL or out.pte_gpa is not NULL or out.pte_access is not NULL or
            out.refs is not NULL or out.ngpa is not NULL or out.fault_gpa is not NULL or out.exit_qualification is not NULL)


cdef void translate_rows(const kvm_pagewalk *walks, const uint32_t *ctx, const uint64_t *gva, const uint8_t *access,
                         size_t access_stride, size_t start, size_t stop, bint set_ad, const batch_columns *out) noexcept nogil:
    cdef const kvm_pagewalk *w = walks
    cdef walk_result r
    cdef size_t i
    cdef bint more = wants_more(out)
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
        if not more:
            continue
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
        if out.ngpa is not NULL:
            out.ngpa[i] = r.ngpa
        if out.fault_gpa is not NULL:
            out.fault_gpa[i] = r.fault_gpa
        if out.exit_qualification is not NULL:
            out.exit_qualification[i] = r.exit_qualification


cdef void *column(columns, name):
    """Data pointer of an output column, NULL if it is not wanted."""
    array = columns.get(name)
    if array is None:
        return NULL
    return <void *><uintptr_t>array.ctypes.data


cdef class Job:
    def __cinit__(self, dict columns, gva, access, bint set_ad):
        """IN columns: checked output arrays by name; gva, access: checked arrays of n >= 1 rows, access of n or one."""
        self.arrays = (columns, gva, access)
        self.gva = <const uint64_t *><uintptr_t>gva.ctypes.data
        self.access = <const uint8_t *><uintptr_t>access.ctypes.data
        self.access_stride = 1 if access.size > 1 else 0
        self.set_ad = set_ad
        self.columns.gpa = <uint64_t *>column(columns, "gpa")
        self.columns.status = <uint8_t *>column(columns, "status")
        self.columns.error_code = <uint32_t *>column(columns, "error_code")
        self.columns.level = <uint8_t *>column(columns, "level")
        self.columns.pte = <uint64_t *>column(columns, "pte")
        self.columns.pte_gpa = <uint64_t *>column(columns, "pte_gpa")
        self.columns.pte_access = <uint8_t *>column(columns, "pte_access")
        self.columns.refs = <uint8_t *>column(columns, "refs")
        self.columns.ngpa = <uint64_t *>column(columns, "ngpa")
        self.columns.fault_gpa = <uint64_t *>column(columns, "fault_gpa")
        self.columns.exit_qualification = <uint64_t *>column(columns, "exit_qualification")

    def run(self, size_t start, size_t stop):
        """Translate the rows start to stop."""
        with nogil:
            translate_rows(self.walks, self.ctx, self.gva, self.access, self.access_stride, start, stop, self.set_ad,
                           &self.columns)
