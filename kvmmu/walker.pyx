"""Walker: a handle on a walk, for translations from Cython and C. The contract stands in `walker.pxd`."""

import os

from libc.stdint cimport uint32_t, uint64_t

from kvmmu._contexts cimport SecondStage
from kvmmu._pagewalk cimport PageWalk
from kvmmu._plain cimport init_plain_walk
from kvmmu._walk cimport kvm_pagewalk, walk_result
from kvmmu.walker cimport translate_fully, translation, walk_handle


def get_include():
    """The directory of the C headers that the `.pxd` files of kvmmu include: for the include path of extensions.

    Returns
    -------
    str
    """
    return os.path.dirname(os.path.abspath(__file__))


cdef translation translate_slowly(walk_handle handle, uint64_t gva, uint32_t access, bint set_ad) noexcept nogil:
    cdef walk_result r
    cdef translation t
    t.status = translate_fully(handle, gva, access, set_ad, &r)
    t.gpa, t.error_code, t.level = r.gpa, r.error_code, r.level
    return t


cdef class Walker:
    """A handle on a walk, for extensions that `cimport kvmmu.walker`.

    Parameters
    ----------
    walk : PageWalk
        `Vcpu.gva_walk` or `Vcpu.ngpa_walk`.

    Attributes
    ----------
    walk : PageWalk

    Raises
    ------
    RuntimeError
        The walk is not in use.

    Notes
    -----
    Registers, formats, second stage and memory slots are those of the moment that the Walker was made in, or refreshed.
    """

    def __init__(self, PageWalk walk not None):
        self.walk = walk
        self.refresh()
        self.handle = &self.state

    cpdef refresh(self):
        """Take registers, formats, second stage and memory slots as they are now.

        No translation through the handle may run meanwhile.

        Raises
        ------
        RuntimeError
            The walk is not in use any more; the handle stays as it was.
        """
        cdef const kvm_pagewalk *current = self.walk.current()
        cdef kvm_pagewalk *w = &self.state.w
        cdef SecondStage second = self.walk.second
        w[0] = current[0]
        self.arch, self.fmt = w.vcpu[0], w.fmt[0]
        w.vcpu, w.fmt = &self.arch, &self.fmt
        if second is not None:
            self.n = second.n
            self.n_arch, self.n_fmt = self.n.vcpu[0], self.n.fmt[0]
            self.n.vcpu, self.n.fmt = &self.n_arch, &self.n_fmt
            w.ngpa = &self.n
        init_plain_walk(&self.state.plain, w)
        self.alive = (self.walk.table, second)

    def __repr__(self):
        return f"<Walker of {self.walk!r}>"
