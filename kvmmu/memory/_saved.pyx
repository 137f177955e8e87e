"""Guest memory as it was at one moment."""

from kvmmu.memory._memory cimport GuestMemory

from kvmmu.memory._regions import _Regions
from kvmmu.memory.saved_bytes import SavedBytes


cdef class SavedMemory:
    """The slots of a memory and their bytes, as they are now. As long as it lives it exports the buffers of these slots.

    Attributes
    ----------
    mem : GuestMemory
    """

    def __init__(self, GuestMemory mem not None):
        self.table = mem.current()
        self.slots = [SavedBytes(region.data) for region in self.table.regions]
        self.mem = mem

    @property
    def nbytes(self):
        """The bytes of memory that it keeps."""
        return sum(slot.pages.nbytes for slot in self.slots or ())

    def restore(self):
        """Give the memory the slots and the bytes of then. Those of read-only buffers are their owner's."""
        if self.mem is None:
            raise RuntimeError("this SavedMemory is of no memory")
        for slot in self.slots:
            slot.restore()
        regions = _Regions()
        for region in self.table.regions:
            regions.add(region)
        self.mem.changes += 1
        self.mem.regions, self.mem.table, self.mem.number = regions, self.table, self.table.number

    def __reduce__(self):
        raise TypeError("a SavedMemory cannot be copied or pickled")
