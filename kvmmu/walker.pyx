"""Walker: a handle on a walk, for translations from Cython and C. The contract stands in `walker.pxd`."""

import os

from libc.stdint cimport uint32_t, uint64_t

from kvmmu._walk cimport WALK_TABLES, kvm_pagewalk, use_walker, walk_result
from kvmmu.arch._bits cimport PG_LEVEL_512G, PT_PRESENT_MASK
from kvmmu.arch._format cimport PageFormat
from kvmmu.arch._gpte cimport KVMMU_FORMAT_64
from kvmmu.memory._memory cimport SlotTable, guest_mem, guest_slot
from kvmmu.walk._register_sets cimport WalkCopy
from kvmmu.walk._fast cimport init_fast_walk
from kvmmu.walk.pagewalk cimport PageWalk
from kvmmu.walker cimport translate_fully, translation, walk_handle


# The memory of a handle that was never refreshed: one slot of no bytes.
cdef guest_slot NO_SLOT
cdef guest_mem NO_MEMORY
cdef PageFormat NO_FORMAT = PageFormat()
NO_MEMORY.slots, NO_MEMORY.count = &NO_SLOT, 1


def get_include():
    """Return the directory that holds `kvmmu/`: its `.pxd` files name their C headers by the path from there.

    Returns
    -------
    str
    """
    return os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


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

    def __cinit__(self, *args, **kwargs):
        cdef kvm_pagewalk *w = &self.state.w
        w.mem, w.vcpu, w.fmt = &NO_MEMORY, &self.arch, &NO_FORMAT.fmt
        w.kind, w.format, w.level = WALK_TABLES, KVMMU_FORMAT_64, PG_LEVEL_512G
        w.gva_mask, w.present_mask = ~<uint64_t>0, PT_PRESENT_MASK
        w.address_mask = w.base_mask = ~<uint64_t>0
        use_walker(w)
        init_fast_walk(&self.state.fast, w)
        self.handle = &self.state

    def __init__(self, PageWalk walk not None):
        self.walk = walk
        self.refresh()

    cpdef refresh(self):
        """Take registers, formats, second stage and memory slots as they are now.

        No translation through the handle may run meanwhile.

        Raises
        ------
        RuntimeError
            The walk is not in use any more; the handle stays as it was.
        """
        cdef SlotTable table
        cdef WalkCopy copy
        if self.walk is None:
            raise RuntimeError("this Walker has no walk: a subclass with an __init__() of its own has to call super().__init__()")
        table = self.walk.mem.current()
        copy = self.walk.now(table)
        self.state.w = copy.w
        init_fast_walk(&self.state.fast, &self.state.w)
        self.copy, self.table = copy, table

    def __reduce__(self):
        raise TypeError("a Walker cannot be copied or pickled: make another one of its walk")

    def __repr__(self):
        return f"<Walker of {self.walk!r}>"
