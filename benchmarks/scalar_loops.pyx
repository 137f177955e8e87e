"""Scalar translations from C, one at a time, and an empty method to hold gva_to_gpa() against."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kvmmu.walker cimport Walker, translate, translation, walk_handle


def walk_rows(Walker walker, const uint64_t[::1] gva, uint32_t access, uint64_t[::1] gpa, uint8_t[::1] status,
              uint32_t[::1] error_code):
    """Translate each address by a call of its own."""
    cdef walk_handle handle = walker.handle
    cdef translation t
    cdef Py_ssize_t i
    with nogil:
        for i in range(gva.shape[0]):
            t = translate(handle, gva[i], access, True)
            status[i] = t.status
            gpa[i] = t.gpa
            error_code[i] = t.error_code


def walk_chain(Walker walker, const uint64_t[::1] gva, uint32_t access, uint64_t[::1] gpa, uint8_t[::1] status,
               uint32_t[::1] error_code):
    """The same, but each address waits for the result before it."""
    cdef walk_handle handle = walker.handle
    cdef translation t
    cdef uint64_t last = 0
    cdef Py_ssize_t i
    with nogil:
        for i in range(gva.shape[0]):
            t = translate(handle, gva[i] ^ (last >> 63), access, True)
            status[i] = t.status
            gpa[i] = last = t.gpa
            error_code[i] = t.error_code


cdef class Empty:
    def gva_to_gpa(self, gva, access=0):
        """Nothing, with the arguments of PageWalk.gva_to_gpa()."""
        return None
