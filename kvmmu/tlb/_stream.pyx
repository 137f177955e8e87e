"""Blocks of accesses through several TLB hierarchies, as `_stream.pxd` describes it."""

import numpy as np

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from kvmmu._walk cimport kvm_pagewalk, walk_step
from kvmmu.arch._bits cimport INVALID_GPA, PT_GLOBAL_MASK, STATUS_OK
from kvmmu.tlb._hierarchy cimport TlbLevels
from kvmmu.tlb._levels cimport NOWHERE, WAY_FASTEST, run_levels, tlb_levels, tlb_rows
from kvmmu.tlb._stream cimport MOST_WALK_REFS, STREAM_BUFFER, stream_hierarchy, tlb_stream

cdef enum:
    MOST_STEPS = 5
    MOST_HOST_ADDRESSES = 6             # of a walk: its entries, and the address of the access
    WORD_BUFFERS = MOST_HOST_ADDRESSES + 7
    BYTE_BUFFERS = MOST_HOST_ADDRESSES + 8


# ---- rows of a block ---------------------------------------------------------------------------------------------------

cdef void stream_begin(tlb_stream *s, const uint64_t *gva, const uint8_t *access, const uint64_t *gpa, const uint8_t *level,
                       const uint8_t *status, size_t first, size_t n) noexcept nogil:
    cdef size_t i
    s.rows, s.gva, s.access, s.gpa = n, gva, access, gpa
    s.block_ip = NULL
    if s.ip is not NULL:
        s.block_ip = s.ip + first
    if status is NULL:
        memcpy(s.leaf, level, n)
    else:
        for i in range(n):
            s.leaf[i] = level[i] if status[i] == STATUS_OK else 0
    if s.any_global:
        for i in range(n):
            s.is_global[i] = (s.pte[i] & PT_GLOBAL_MASK) != 0


cdef void stream_hold(tlb_stream *s) noexcept nogil:
    if s.gva == s.own_gva:
        return
    memcpy(s.own_gva, s.gva, s.rows * sizeof(uint64_t))
    memcpy(s.own_access, s.access, s.rows)
    memcpy(s.own_gpa, s.gpa, s.rows * sizeof(uint64_t))
    s.gva, s.access, s.gpa = s.own_gva, s.own_access, s.own_gpa
    if s.block_ip is not NULL:
        memcpy(s.own_ip, s.block_ip, s.rows * sizeof(uint64_t))
        s.block_ip = s.own_ip


cdef void stream_insert(tlb_stream *s, const uint32_t *row, const uint64_t *gva, const uint8_t *access, const uint64_t *gpa,
                        const uint8_t *level, const uint8_t *status, size_t n) noexcept nogil:
    cdef size_t to = s.rows + n, i = s.rows, k = n
    if not n:
        return
    stream_hold(s)
    while k:                                            # from the end: each row moves up behind those that are left to insert
        to -= 1
        if row[k - 1] + 1 == i:
            k -= 1
            s.own_gva[to], s.own_access[to], s.own_gpa[to] = gva[k], access[k], gpa[k]
            s.leaf[to] = level[k] if status[k] == STATUS_OK else 0
            s.is_global[to] = s.any_global and (s.pte[k] & PT_GLOBAL_MASK) != 0
            if s.block_ip is not NULL:
                s.own_ip[to] = s.own_ip[i - 1]
            # the row itself follows
            to -= 1
        i -= 1
        s.own_gva[to], s.own_access[to], s.own_gpa[to] = s.own_gva[i], s.own_access[i], s.own_gpa[i]
        s.leaf[to], s.is_global[to] = s.leaf[i], s.is_global[i]
        if s.block_ip is not NULL:
            s.own_ip[to] = s.own_ip[i]
    s.rows += n


# ---- two stages --------------------------------------------------------------------------------------------------------

cdef void host_walks(tlb_stream *s, stream_hierarchy *h, tlb_levels *nested, const kvm_pagewalk *w, tlb_rows *rows,
                     const uint64_t *gpa) noexcept nogil:
    """Translate the addresses of the page walks of some rows by the host's tables."""
    cdef walk_step steps[MOST_STEPS]
    cdef tlb_rows host
    cdef uint8_t load = 0               # no bit of an access: a load by the supervisor
    cdef uint32_t count = 0, k = 0, refs
    cdef int levels, first
    cdef size_t i
    for i in range(rows.rows):
        if rows.level[i] == NOWHERE and rows.leaf[i]:
            levels = w.walk_steps(w, rows.gva[i], rows.access[i], steps)
            for first in range(max(0, levels - rows.references[i]), levels):
                if steps[first].pte_gpa != INVALID_GPA:
                    s.host_addr[count] = steps[first].pte_gpa
                    count += 1
            s.host_addr[count] = gpa[i]
            count += 1
        s.host_stop[i] = count
    if not count:
        return
    memset(&host, 0, sizeof(host))
    host.rows, host.gva, host.access, host.leaf, host.references = count, s.host_addr, &load, &h.host_leaf, s.host_references
    run_levels(nested, &host, WAY_FASTEST)
    for i in range(rows.rows):
        if rows.level[i] != NOWHERE or not rows.leaf[i]:
            continue
        refs = rows.references[i]
        while k < s.host_stop[i]:
            refs += s.host_references[k]
            k += 1
        h.walks_by_refs[min(refs, <uint32_t>(MOST_WALK_REFS - 1))] += 1


# ---- running -----------------------------------------------------------------------------------------------------------

cdef void run_of_one(tlb_stream *s, size_t vcpu, const kvm_pagewalk *w, tlb_rows *rows, const uint64_t *gpa) noexcept nogil:
    """Let rows of one vCPU go through all hierarchies."""
    cdef stream_hierarchy *h
    cdef size_t i
    if not s.has_global[vcpu]:
        rows.is_global = NULL
    for i in range(s.hierarchies):
        h = &s.each[i]
        rows.level, rows.references = NULL, NULL
        if h.nested is not NULL:
            rows.level, rows.references = s.found, s.references
        run_levels(h.levels[vcpu], rows, WAY_FASTEST)
        if h.nested is not NULL:
            host_walks(s, h, h.nested[vcpu], w, rows, gpa)


cdef void stream_run(tlb_stream *s, const kvm_pagewalk *walks, const uint32_t *sets, const uint32_t *vcpu) noexcept nogil:
    cdef tlb_rows rows
    cdef size_t v, i, n
    memset(&rows, 0, sizeof(rows))
    rows.access_stride = rows.leaf_stride = 1
    if vcpu is NULL:
        rows.rows, rows.gva, rows.access, rows.leaf, rows.is_global = s.rows, s.gva, s.access, s.leaf, s.is_global
        rows.ip = s.block_ip
        run_of_one(s, 0, &walks[sets[0]], &rows, s.gpa)
        return
    for v in range(s.vcpus):
        n = 0
        for i in range(s.rows):
            s.part_gva[n], s.part_gpa[n], s.part_access[n], s.part_leaf[n] = s.gva[i], s.gpa[i], s.access[i], s.leaf[i]
            s.part_global[n] = s.is_global[i]
            if s.block_ip is not NULL:
                s.part_ip[n] = s.block_ip[i]
            n += vcpu[i] == v
        if not n:
            continue
        rows.rows, rows.gva, rows.access, rows.leaf, rows.is_global = n, s.part_gva, s.part_access, s.part_leaf, s.part_global
        if s.block_ip is not NULL:
            rows.ip = s.part_ip
        run_of_one(s, v, &walks[sets[v]], &rows, s.part_gpa)


# ---- memory ------------------------------------------------------------------------------------------------------------

cdef uint64_t *next_words(uint64_t **rest, size_t n) noexcept:
    """Return the first n words of what is left of a block, and take them from it."""
    cdef uint64_t *found = rest[0]
    rest[0] = found + n
    return found


cdef uint8_t *next_bytes(uint8_t **rest, size_t n) noexcept:
    """The same of bytes."""
    cdef uint8_t *found = rest[0]
    rest[0] = found + n
    return found


# ---- from Python -------------------------------------------------------------------------------------------------------

cdef class TlbStream:
    """Levels of several hierarchies that a replay feeds.

    Parameters
    ----------
    hierarchies : sequence of (levels, nested, host_leaf)
        levels: TlbLevels, one per vCPU; nested: likewise, those of host translations, or None; host_leaf: level of the host's
        pages. Nobody else may use them while a replay runs.
    vcpus : int
    """

    def __cinit__(self, hierarchies=(), size_t vcpus=1, *args):
        cdef TlbLevels one
        cdef tlb_stream *s = &self.s
        cdef stream_hierarchy *h
        cdef size_t i
        hierarchies = list(hierarchies)
        if not 1 <= vcpus <= 1 << 16:
            raise ValueError(f"vcpus: want 1 to {1 << 16}, got {vcpus}")
        self.owners = hierarchies
        s.vcpus = vcpus
        s.each = <stream_hierarchy *>calloc(max(1, len(hierarchies)), sizeof(stream_hierarchy))
        s.has_global = <uint8_t *>calloc(vcpus, 1)
        if s.each is NULL or s.has_global is NULL:
            raise MemoryError
        for levels, nested, host_leaf in hierarchies:
            h = &s.each[s.hierarchies]
            s.hierarchies += 1
            if len(levels) != vcpus or (nested is not None and len(nested) != vcpus) or not 1 <= host_leaf <= 3:
                raise ValueError(f"{len(levels)} levels for {vcpus} vCPUs, host pages of level {host_leaf}")
            h.host_leaf = host_leaf
            h.levels = <tlb_levels **>calloc(vcpus, sizeof(void *))
            if h.levels is NULL:
                raise MemoryError
            for i in range(vcpus):
                one = levels[i]
                h.levels[i] = &one.h
            if nested is None:
                continue
            s.two_stages = True
            h.nested = <tlb_levels **>calloc(vcpus, sizeof(void *))
            if h.nested is NULL:
                raise MemoryError
            for i in range(vcpus):
                one = nested[i]
                h.nested[i] = &one.h
        self.make_buffers()

    cdef int make_buffers(self) except -1:
        cdef tlb_stream *s = &self.s
        cdef uint64_t *words
        cdef uint8_t *bytes
        s.memory = calloc(STREAM_BUFFER, WORD_BUFFERS * sizeof(uint64_t) + sizeof(uint32_t) + BYTE_BUFFERS)
        if s.memory is NULL:
            raise MemoryError
        words = <uint64_t *>s.memory
        s.host_addr = next_words(&words, MOST_HOST_ADDRESSES * STREAM_BUFFER)
        s.pte = next_words(&words, STREAM_BUFFER)
        s.own_gva = next_words(&words, STREAM_BUFFER)
        s.own_gpa = next_words(&words, STREAM_BUFFER)
        s.own_ip = next_words(&words, STREAM_BUFFER)
        s.part_gva = next_words(&words, STREAM_BUFFER)
        s.part_gpa = next_words(&words, STREAM_BUFFER)
        s.part_ip = next_words(&words, STREAM_BUFFER)
        s.host_stop = <uint32_t *>words
        bytes = <uint8_t *>(s.host_stop + STREAM_BUFFER)
        s.host_references = next_bytes(&bytes, MOST_HOST_ADDRESSES * STREAM_BUFFER)
        s.own_access = next_bytes(&bytes, STREAM_BUFFER)
        s.leaf = next_bytes(&bytes, STREAM_BUFFER)
        s.is_global = next_bytes(&bytes, STREAM_BUFFER)
        s.part_access = next_bytes(&bytes, STREAM_BUFFER)
        s.part_leaf = next_bytes(&bytes, STREAM_BUFFER)
        s.part_global = next_bytes(&bytes, STREAM_BUFFER)
        s.found = next_bytes(&bytes, STREAM_BUFFER)
        s.references = next_bytes(&bytes, STREAM_BUFFER)
        return 0

    def __dealloc__(self):
        cdef tlb_stream *s = &self.s
        cdef size_t i
        for i in range(s.hierarchies):
            free(s.each[i].levels)
            free(s.each[i].nested)
        free(s.each)
        free(s.has_global)
        free(s.memory)

    def __reduce__(self):
        raise TypeError("a TlbStream cannot be copied or pickled")

    def use_global(self, size_t vcpu, bint has_global):
        """Say whether a vCPU has global pages: CR4.PGE."""
        cdef size_t i
        if vcpu >= self.s.vcpus:
            raise ValueError(f"vcpu: want 0 to {self.s.vcpus - 1}, got {vcpu}")
        self.s.has_global[vcpu] = has_global
        self.s.any_global = False
        for i in range(self.s.vcpus):
            self.s.any_global = self.s.any_global or self.s.has_global[i] != 0

    def use_ips(self, const uint64_t[::1] ip, size_t rows):
        """Say where the instructions of the rows of the chunk that comes next lie; None: unknown."""
        self.s.ip = NULL
        if ip is not None and <size_t>ip.shape[0] != rows:
            raise ValueError(f"ip: want {rows} rows, got {ip.shape[0]}")
        self.chunk_ip = ip
        if ip is not None and rows:
            self.s.ip = &ip[0]

    def walks_by_refs(self, size_t hierarchy):
        """Return the walks of a hierarchy under two stages, by the entries that they read in both: ndarray of uint64."""
        cdef uint64_t[::1] rows
        if hierarchy >= self.s.hierarchies:
            raise ValueError(f"hierarchy: want 0 to {self.s.hierarchies - 1}, got {hierarchy}")
        found = np.empty(MOST_WALK_REFS, np.uint64)
        rows = found
        memcpy(&rows[0], self.s.each[hierarchy].walks_by_refs, sizeof(self.s.each[hierarchy].walks_by_refs))
        return found
