"""An extension of somebody else's, over the public `.pxd` files; tests/test_c_interface.py compiles it out of the tree."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t

from kvmmu.walk._fast cimport translate_fast
from kvmmu.walker cimport (
    ACCESS_USER_MASK, ACCESS_WRITE_MASK, INVALID_GPA, STATUS_OK, STATUS_PAGE_FAULT, Walker, translate,
    translate_fully, translation, walk_handle, walk_result,
)


def translate_rows(Walker walker, const uint64_t[::1] gva, const uint8_t[::1] access, bint set_ad, columns):
    """Translate row by row without the GIL into columns, a dict of arrays."""
    cdef walk_handle handle = walker.handle
    cdef walk_result r
    cdef uint64_t[::1] gpa = columns["gpa"], pte = columns["pte"], pte_gpa = columns["pte_gpa"], ngpa = columns["ngpa"]
    cdef uint64_t[::1] fault_gpa = columns["fault_gpa"], exit_qualification = columns["exit_qualification"]
    cdef uint32_t[::1] error_code = columns["error_code"]
    cdef uint8_t[::1] status = columns["status"], level = columns["level"], refs = columns["refs"]
    cdef uint8_t[::1] pte_access = columns["pte_access"]
    cdef Py_ssize_t i
    with nogil:
        for i in range(gva.shape[0]):
            status[i] = translate_fully(handle, gva[i], access[i], set_ad, &r)
            gpa[i], pte[i], pte_gpa[i], ngpa[i] = r.gpa, r.pte, r.pte_gpa, r.ngpa
            fault_gpa[i], exit_qualification[i] = r.fault_gpa, r.exit_qualification
            error_code[i] = r.error_code
            level[i], refs[i], pte_access[i] = r.level, r.refs, r.pte_access


def translate_few(Walker walker, const uint64_t[::1] gva, const uint8_t[::1] access, bint set_ad, columns):
    """The same of the columns that translate() has."""
    cdef walk_handle handle = walker.handle
    cdef translation t
    cdef uint64_t[::1] gpa = columns["gpa"]
    cdef uint32_t[::1] error_code = columns["error_code"]
    cdef uint8_t[::1] status = columns["status"], level = columns["level"]
    cdef Py_ssize_t i
    with nogil:
        for i in range(gva.shape[0]):
            t = translate(handle, gva[i], access[i], set_ad)
            gpa[i], error_code[i], status[i], level[i] = t.gpa, t.error_code, t.status, t.level


def one(Walker walker, uint64_t gva, uint32_t access=0):
    """(status, gpa) of one address."""
    cdef translation t = translate(walker.handle, gva, access, True)
    return t.status, t.gpa


def short_cut(Walker walker, uint64_t gva, uint32_t access):
    """Whether the short cut of `kvmmu/walk/_fast.pxd` answers, by the function and by its inlined form."""
    cdef walk_handle handle = walker.handle
    return (handle.fast.gva_to_gpa(&handle.fast.p, handle.w.vcpu, gva, access).gpa != INVALID_GPA,
            translate_fast(&handle.fast, handle.w.vcpu, gva, access).gpa != INVALID_GPA)


def place(Walker walker):
    """Where the handle lies."""
    return <uintptr_t>walker.handle


def numbers():
    return int(STATUS_OK), int(STATUS_PAGE_FAULT), int(ACCESS_WRITE_MASK), int(ACCESS_USER_MASK), int(INVALID_GPA)
