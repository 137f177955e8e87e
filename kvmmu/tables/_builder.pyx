"""TableBuilder: one set of page tables over arrays of rows. `PageTables` checks the arguments and supplies the frames."""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free

from kvmmu.arch._bits cimport (
    EPT_EXECUTABLE_MASK, EPT_READABLE_MASK, EPT_RWX_MASK, EPT_USER_EXECUTABLE_MASK, EPT_WRITABLE_MASK, PT32_INDEX_BITS,
    PT64_INDEX_BITS, PT_PRESENT_MASK, PT_USER_MASK, PT_WRITABLE_MASK,
)
from kvmmu.arch._gpte cimport KVMMU_FORMAT_32, KVMMU_FORMAT_64, KVMMU_FORMAT_EPT, kvmmu_level_shift
from kvmmu.memory._memory cimport GuestMemory, SlotTable
from kvmmu.tables._edit cimport (
    BUILD_DONE, build_status, descend, level_of, map_row, protect_row, push_frame, store_entry, table_hva, take_frame, unmap_row,
)

# By build_status.
STATUS_NAMES = (
    "done", "no frame", "a frame for tables lies in no slot that can be written",
    "an entry on the way points to a table that lies in no slot that can be written",
    "a 4M page above 4 GiB cannot be split into 4K pages", "is not mapped", "is mapped by smaller pages", "no memory")

cdef enum:
    PAE_ROOT_ENTRIES = 4


cdef class TableBuilder:
    """One set of page tables, as `PageTables` sees it.

    Parameters
    ----------
    mem : GuestMemory
    format : int
        0 entries of 4 bytes, 1 of 8 bytes, 2 of EPT.
    levels, large_level, fixed_level : int
        Levels of the walk; the highest with pages; the lowest whose tables are never released.
    keeps_stores : bool
        List the stores, for `take_stores()`.

    Attributes
    ----------
    root : int
        Guest-physical address of the root table; 0 before `make_root()`.
    made : int
        Tables made so far, the root among them.
    """

    def __cinit__(self, GuestMemory mem not None, int format, int levels, int large_level, int fixed_level, bint keeps_stores,
                  *_of_subclass):
        if format not in (KVMMU_FORMAT_32, KVMMU_FORMAT_64, KVMMU_FORMAT_EPT) or not 1 <= large_level <= levels <= 5:
            raise ValueError(f"no such tables: format {format}, {levels} levels, pages up to level {large_level}")
        self.mem = mem
        self.b.format, self.b.levels, self.b.large_level, self.b.fixed_level = format, levels, large_level, fixed_level
        self.b.entry_bytes = sizeof(uint32_t) if format == KVMMU_FORMAT_32 else sizeof(uint64_t)
        self.b.entries = <size_t>1 << (PT32_INDEX_BITS if format == KVMMU_FORMAT_32 else PT64_INDEX_BITS)
        self.b.table_bits = PT_PRESENT_MASK | PT_WRITABLE_MASK | PT_USER_MASK
        self.b.present_mask = PT_PRESENT_MASK
        if format == KVMMU_FORMAT_EPT:
            self.b.table_bits = EPT_READABLE_MASK | EPT_WRITABLE_MASK | EPT_EXECUTABLE_MASK | EPT_USER_EXECUTABLE_MASK
            self.b.present_mask = EPT_RWX_MASK | EPT_USER_EXECUTABLE_MASK
        self.b.root_bits = PT_PRESENT_MASK if fixed_level < levels else self.b.table_bits       # of a PDPTE of PAE paging
        self.b.keeps_stores = keeps_stores

    def __dealloc__(self):
        free(self.b.pool.frames)
        free(self.b.freed.frames)
        free(self.b.stores)

    @property
    def root(self):
        return int(self.b.root)

    @property
    def made(self):
        return int(self.b.made)

    def supply(self, const uint64_t[::1] frames not None):
        """Add frames to the pool; the last one is used first."""
        cdef Py_ssize_t i
        for i in range(frames.shape[0]):
            if not push_frame(&self.b.pool, frames[i]):
                raise MemoryError

    def take_pool(self):
        """List the frames of the pool, which is empty then; the last one given first."""
        cdef size_t i
        frames = [int(self.b.pool.frames[i]) for i in range(self.b.pool.count)]
        self.b.pool.count = 0
        return frames

    def take_released(self):
        """List the frames of tables that were released since the last call."""
        cdef size_t i
        frames = [int(self.b.freed.frames[i]) for i in range(self.b.freed.count)]
        self.b.freed.count = 0
        return frames

    def take_stores(self, bint undo):
        """List the stores since the last call as (gpa, value), in order. IN undo: put the old values back."""
        cdef size_t i
        cdef uint8_t *hva
        cdef bint kept = self.b.keeps_stores
        cdef SlotTable _table = self._begin()
        stores = [(int(self.b.stores[i].gpa), int(self.b.stores[i].new)) for i in range(self.b.store_count)]
        self.b.keeps_stores = False
        for i in range(self.b.store_count, 0, -1) if undo else range(0):
            hva = table_hva(&self.b, self.b.stores[i - 1].gpa)
            if hva is not NULL:
                store_entry(&self.b, hva, self.b.stores[i - 1].gpa, self.b.stores[i - 1].old)
        self.b.keeps_stores = kept
        self.b.store_count = 0
        return stores

    # The table of slots that a call works on is kept in a local until it is over.

    cdef SlotTable _begin(self):
        """Look at memory as it is now: slots and entries may have changed since the last call. Returns what keeps it alive."""
        cdef SlotTable table = self.mem.current()
        self.b.mem = &table.mem
        self.b.path_level = self.b.levels
        self.b.path_gpa[self.b.levels] = self.b.root
        self.b.path[self.b.levels] = table_hva(&self.b, self.b.root)
        return table

    def make_root(self):
        """Take the root table from the pool, and those below it that are never released (PAE: four); returns a status."""
        cdef uint8_t *hva = NULL
        cdef uint64_t gpa = 0
        cdef size_t i
        cdef SlotTable _table = self._begin()
        cdef build_status status = take_frame(&self.b, &self.b.root, &hva)
        if status == BUILD_DONE:
            self._begin()
        if self.b.fixed_level < self.b.levels:
            for i in range(PAE_ROOT_ENTRIES):
                if status == BUILD_DONE:
                    status = descend(&self.b, <uint64_t>i << kvmmu_level_shift(self.b.format, self.b.levels), self.b.fixed_level,
                                     True, &hva, &gpa)
        return int(status)

    def map_rows(self, const uint64_t[::1] gva not None, const uint64_t[::1] gpa not None, const uint8_t[::1] level not None,
                 const uint64_t[::1] bits not None, Py_ssize_t start):
        """Map pages from row start on. Arrays of one row serve all rows.

        Returns
        -------
        int, int
            Rows that are done, and the status of the row that stopped.
        """
        cdef Py_ssize_t i, n = gva.shape[0]
        cdef bint each_level = level.shape[0] > 1, each_bits = bits.shape[0] > 1
        cdef build_status status = BUILD_DONE
        cdef SlotTable _table = self._begin_rows(
            gpa.shape[0] == n and level.shape[0] in (1, n) and bits.shape[0] in (1, n) and 0 <= start <= n)
        i = start
        with nogil:
            while i < n:
                status = map_row(&self.b, gva[i], gpa[i], level_of(&self.b, level[i if each_level else 0]),
                                 bits[i if each_bits else 0])
                if status != BUILD_DONE:
                    break
                i += 1
        return i, int(status)

    def unmap_rows(self, const uint64_t[::1] gva not None, const uint8_t[::1] level not None, Py_ssize_t start):
        """Remove pages from row start on; as `map_rows()`."""
        cdef Py_ssize_t i, n = gva.shape[0]
        cdef bint each_level = level.shape[0] > 1
        cdef build_status status = BUILD_DONE
        cdef SlotTable _table = self._begin_rows(level.shape[0] in (1, n) and 0 <= start <= n)
        i = start
        with nogil:
            while i < n:
                status = unmap_row(&self.b, gva[i], level_of(&self.b, level[i if each_level else 0]))
                if status != BUILD_DONE:
                    break
                i += 1
        return i, int(status)

    def protect_rows(self, const uint64_t[::1] gva not None, const uint8_t[::1] level not None, uint64_t clear, uint64_t bits,
                     Py_ssize_t start):
        """Clear and set bits in the entries of pages from row start on; as `map_rows()`."""
        cdef Py_ssize_t i, n = gva.shape[0]
        cdef bint each_level = level.shape[0] > 1
        cdef build_status status = BUILD_DONE
        cdef SlotTable _table = self._begin_rows(level.shape[0] in (1, n) and 0 <= start <= n)
        i = start
        with nogil:
            while i < n:
                status = protect_row(&self.b, gva[i], level_of(&self.b, level[i if each_level else 0]), clear, bits)
                if status != BUILD_DONE:
                    break
                i += 1
        return i, int(status)

    cdef SlotTable _begin_rows(self, bint lengths):
        cdef SlotTable table = self._begin()
        if not lengths:
            raise ValueError("columns of different lengths, or a first row beyond them")
        if self.b.path[self.b.levels] is NULL:
            raise ValueError(f"the root table at {self.b.root:#x} lies in no slot that can be written")
        return table
