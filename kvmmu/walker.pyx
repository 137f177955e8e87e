"""Walker: a handle on a walk, for translations from Cython and C. The contract stands in `walker.pxd`."""

import os

from kvmmu._contexts cimport SecondStage
from kvmmu._pagewalk cimport PageWalk


def get_include():
    """The directory of the C headers that the `.pxd` files of kvmmu include: for the include path of extensions.

    Returns
    -------
    str
    """
    return os.path.dirname(os.path.abspath(__file__))


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
        self.handle = &self.w

    cpdef refresh(self):
        """Take registers, formats, second stage and memory slots as they are now.

        No translation through the handle may run meanwhile.

        Raises
        ------
        RuntimeError
            The walk is not in use any more; the handle stays as it was.
        """
        self.w = self.walk.current()[0]
        cdef SecondStage second = self.walk.second
        self.arch, self.fmt = self.w.vcpu[0], self.w.fmt[0]
        self.w.vcpu, self.w.fmt = &self.arch, &self.fmt
        if second is not None:
            self.n = second.n
            self.n_arch, self.n_fmt = self.n.vcpu[0], self.n.fmt[0]
            self.n.vcpu, self.n.fmt = &self.n_arch, &self.n_fmt
            self.w.ngpa = &self.n
        self.alive = (self.walk.table, second)

    def __repr__(self):
        return f"<Walker of {self.walk!r}>"
