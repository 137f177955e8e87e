"""Rows under construction, a map of 64-bit numbers, and the set of pages that a trace touches."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memset

from cpython.ref cimport Py_REFCNT

from kvmmu.arch._bits cimport ACCESS_WRITE_MASK, INVALID_GPA, OP_EVENT, OP_KIND_MASK, OP_LOAD, OP_STORE, PAGE_SHIFT

import numpy as np

ROWS = 1 << 18                      # of a chunk
_DTYPES = {"op": np.uint8, "addr": np.uint64, "access": np.uint8, "size": np.uint8, "ip": np.uint64, "vcpu": np.uint16,
           "gpa": np.uint64, "value": np.uint64}


# Write an access of more than 255 bytes as a row of 255, and one row for each further page that it reaches, so that it
# touches the pages that it touched.
cdef void put_wide(row_sink *s, uint8_t op, uint64_t addr, uint8_t access, uint64_t size, uint64_t ip,
                   uint64_t gpa) noexcept nogil:
    cdef uint64_t page, last = (addr + size - 1) >> PAGE_SHIFT, left
    put(s, op, addr, access, 255, ip, gpa)
    page = (addr + 254) >> PAGE_SHIFT
    while page != last and page < last:
        page += 1
        left = addr + size - (page << PAGE_SHIFT)
        put(s, op, page << PAGE_SHIFT, access, min(left, <uint64_t>255), ip, INVALID_GPA)


# ---- the map -----------------------------------------------------------------------------------------------------------

cdef inline size_t slot_of(const u64_map *m, uint64_t key) noexcept nogil:
    cdef size_t slot = ((key * <uint64_t>0x9E3779B97F4A7C15ULL) >> 20) & m.mask
    while m.keys[slot] != 0 and m.keys[slot] != key:
        slot = (slot + 1) & m.mask
    return slot


cdef int map_init(u64_map *m) noexcept nogil:
    memset(m, 0, sizeof(u64_map))
    m.keys = <uint64_t *>calloc(1024, sizeof(uint64_t))
    m.values = <uint64_t *>malloc(1024 * sizeof(uint64_t))
    m.mask = 1023
    return 0 if m.keys != NULL and m.values != NULL else -1


cdef void map_free(u64_map *m) noexcept nogil:
    free(m.keys)
    free(m.values)
    m.keys = m.values = NULL


cdef int map_grow(u64_map *m) noexcept nogil:
    cdef u64_map larger = m[0]
    cdef size_t i, slot, slots = 2 * (m.mask + 1)
    larger.keys = <uint64_t *>calloc(slots, sizeof(uint64_t))
    larger.values = <uint64_t *>malloc(slots * sizeof(uint64_t))
    if larger.keys == NULL or larger.values == NULL:
        free(larger.keys)
        free(larger.values)
        return -1
    larger.mask = slots - 1
    for i in range(m.mask + 1):
        if m.keys[i]:
            slot = slot_of(&larger, m.keys[i])
            larger.keys[slot] = m.keys[i]
            larger.values[slot] = m.values[i]
    map_free(m)
    m[0] = larger
    return 0


cdef int map_set(u64_map *m, uint64_t key, uint64_t value) noexcept nogil:
    cdef size_t slot
    cdef bint was
    if key == 0:
        was = m.has_zero
        m.has_zero = True
        m.zero_value = value
        return 0 if was else 1
    slot = slot_of(m, key)
    if m.keys[slot] == key:
        m.values[slot] = value
        return 0
    if 2 * (m.used + 1) > m.mask:
        if map_grow(m) < 0:
            return -1
        slot = slot_of(m, key)
    m.keys[slot] = key
    m.values[slot] = value
    m.used += 1
    return 1


cdef uint64_t map_get(const u64_map *m, uint64_t key, uint64_t missing) noexcept nogil:
    cdef size_t slot
    if key == 0:
        return m.zero_value if m.has_zero else missing
    slot = slot_of(m, key)
    return m.values[slot] if m.keys[slot] == key else missing


# ---- rows --------------------------------------------------------------------------------------------------------------

cdef bint is_unused(dict arrays) except -1:
    """True if nobody has a view of one of the arrays: they can be filled again, which saves the faults of fresh memory."""
    for name in arrays:
        if Py_REFCNT(arrays[name]) != 2:            # the dict's reference, and that of this expression
            return False
    return True


cdef class Sink:
    """Arrays that a reader fills with rows.

    Parameters
    ----------
    vcpu, gpa, size, value : bool
        The format tells processors, physical addresses, sizes, and events with values.
    rows : int
        Of a chunk, at most.
    """

    def __cinit__(self, *, bint vcpu=False, bint gpa=False, bint size=True, bint value=False, size_t rows=ROWS):
        self.with_vcpu, self.with_gpa, self.with_size, self.with_value = vcpu, gpa, size, value
        self.rows.capacity = rows + SLACK
        self.arrays, self.spare = {}, []
        self.refill()

    cdef int refill(self) except -1:
        cdef uint8_t[::1] op, access, size
        cdef uint64_t[::1] addr, ip, gpa, value
        cdef uint16_t[::1] vcpu
        names = ["op", "addr", "access", "size", "ip"]
        names += ["vcpu"] * self.with_vcpu + ["gpa"] * self.with_gpa + ["value"] * self.with_value
        if self.arrays:
            self.spare.append(self.arrays)
        self.arrays = None
        for place, arrays in enumerate(self.spare):
            if is_unused(arrays):
                self.arrays = self.spare.pop(place)
                break
        if self.arrays is None:
            self.arrays = {name: np.empty(self.rows.capacity, _DTYPES[name]) for name in names}
            del self.spare[:-SPARE_SETS]
        op, addr, access, size, ip = (self.arrays[name] for name in names[:5])
        self.rows.op, self.rows.addr, self.rows.access = &op[0], &addr[0], &access[0]
        self.rows.size, self.rows.ip = &size[0], &ip[0]
        if self.with_vcpu:
            vcpu = self.arrays["vcpu"]
            self.rows.vcpu = &vcpu[0]
        if self.with_gpa:
            gpa = self.arrays["gpa"]
            self.rows.gpa = &gpa[0]
        if self.with_value:
            value = self.arrays["value"]
            self.rows.value = &value[0]
        self.rows.n = 0
        self.rows.vcpus_seen = 0
        self.rows.gpa_seen = False
        self.rows.ips_seen = 0
        return 0

    def __len__(self):
        return self.rows.n

    def take(self):
        """Return the rows by column, and make room for others. Columns that say nothing are left out."""
        cdef size_t n = self.rows.n
        left_out = {"size"} if not self.with_size else set()
        if not self.rows.vcpus_seen:
            left_out.add("vcpu")
        if not self.rows.gpa_seen:
            left_out.add("gpa")
        if not self.rows.ips_seen:
            left_out.add("ip")
        few = n < self.rows.capacity // 4           # a view would hold the memory of all
        columns = {name: array[:n].copy() if few else array[:n] for name, array in self.arrays.items() if name not in left_out}
        if few:
            self.rows.n = 0
            self.rows.vcpus_seen = 0
            self.rows.gpa_seen = False
            self.rows.ips_seen = 0
        else:
            self.refill()
        return columns


MODIFY = OP_KIND_MASK               # a kind of add_rows(): a load and a store


def add_rows(Sink sink, const uint8_t[::1] op, const uint64_t[::1] addr, Py_ssize_t start, *, access=None, size=None, ip=None,
             vcpu=None, gpa=None):
    """Write rows that are columns already, from `start` on, until they end or the sink is full.

    Parameters
    ----------
    op : ndarray of uint8, shape (n,)
        LOAD, STORE, FETCH, each with MMIO or not, or MODIFY.
    addr : ndarray of uint64, shape (n,)
    access : ndarray of uint8, shape (n,), optional
        As told by ip or addr otherwise.
    size : ndarray of uint32, shape (n,), optional
        0 counts as 1.
    ip, gpa : ndarray of uint64, shape (n,), optional
    vcpu : ndarray of uint16, shape (n,), optional

    Returns
    -------
    stop : int
    """
    cdef const uint8_t[::1] accesses
    cdef const uint32_t[::1] sizes
    cdef const uint64_t[::1] ips, gpas
    cdef const uint16_t[::1] vcpus
    cdef bint has_access = access is not None, has_size = size is not None, has_ip = ip is not None
    cdef bint has_vcpu = vcpu is not None, has_gpa = gpa is not None
    cdef size_t i, n = op.shape[0]
    cdef uint8_t kind, how
    cdef uint64_t who, where, count
    for column in (addr, access, size, ip, vcpu, gpa):
        if column is not None and len(column) != n:
            raise ValueError(f"a column has {len(column)} rows, op has {n}")
    if not 0 <= start <= <Py_ssize_t>n:
        raise ValueError(f"start: is {start}; allowed is 0 to {n}")
    accesses = access if has_access else None
    sizes = size if has_size else None
    ips = ip if has_ip else None
    vcpus = vcpu if has_vcpu else None
    gpas = gpa if has_gpa else None
    i = start
    with nogil:
        while i < n and not is_full(&sink.rows):
            if has_vcpu:
                sink.rows.vcpu_now = vcpus[i]
            count = min(max(sizes[i], <uint32_t>1), <uint32_t>65535) if has_size else 1
            who = ips[i] if has_ip and ips[i] else addr[i]
            where = gpas[i] if has_gpa else INVALID_GPA
            kind = op[i]
            if (kind & OP_KIND_MASK) == OP_KIND_MASK:
                how = accesses[i] & ~<uint8_t>ACCESS_WRITE_MASK if has_access else access_of(OP_LOAD, addr[i], who)
                put(&sink.rows, kind & ~OP_KIND_MASK | OP_LOAD, addr[i], how, count, ips[i] if has_ip else 0, where)
                kind = kind & ~OP_KIND_MASK | OP_STORE
            how = accesses[i] if has_access else access_of(kind, addr[i], who)
            put(&sink.rows, kind, addr[i], how, count, ips[i] if has_ip else 0, where)
            i += 1
    return i


# ---- pages -------------------------------------------------------------------------------------------------------------

cdef class PageSet:
    """The pages of 4096 bytes that accesses touch. An access that runs into the next page touches both."""

    cdef u64_map pages

    def __cinit__(self):
        if map_init(&self.pages) < 0:
            raise MemoryError()

    def __dealloc__(self):
        map_free(&self.pages)

    def __len__(self):
        return self.pages.used + self.pages.has_zero

    def add(self, const uint8_t[::1] op, const uint64_t[::1] addr, size=None):
        """Add the pages of the rows that are accesses.

        Parameters
        ----------
        op : ndarray of uint8, shape (n,)
        addr : ndarray of uint64, shape (n,)
        size : ndarray of uint8, shape (n,), optional
            1 if it is not given.
        """
        cdef const uint8_t[::1] sizes
        cdef size_t i, n = op.shape[0]
        cdef uint64_t first, last, before = INVALID_GPA
        cdef bint sized = size is not None
        cdef int failed = 0
        if <size_t>addr.shape[0] != n or (sized and <size_t>len(size) != n):
            raise ValueError(f"op has {n} rows, addr {addr.shape[0]}, size {len(size) if sized else n}; want one length")
        if sized:
            sizes = size
        with nogil:
            for i in range(n):
                if op[i] >= OP_EVENT:
                    continue
                first = addr[i] >> PAGE_SHIFT
                last = (addr[i] + sizes[i] - 1) >> PAGE_SHIFT if sized and sizes[i] else first
                if first != before and map_set(&self.pages, first, 0) < 0 or last != first and map_set(&self.pages, last, 0) < 0:
                    failed = 1
                    break
                before = first
        if failed:
            raise MemoryError(f"no memory for {len(self)} pages")
