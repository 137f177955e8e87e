"""Walks over memory of callbacks, as `_fetch.pxd` says: each is repeated with the pages that it missed."""

import numpy as np

from libc.stdint cimport uint32_t, uint64_t

from kvmmu._walk cimport walk_result
from kvmmu.arch._bits cimport STATUS_OK
from kvmmu.memory._memory cimport SlotTable
from kvmmu.walk._contexts cimport WalkCopy
from kvmmu.walk._explain cimport record_of
from kvmmu.walk._mappings cimport TableQueries


cdef WalkCopy walk_wholly(TableQueries queries, uint64_t gva, uint32_t access, bint set_ad, walk_result *r):
    cdef SlotTable table
    cdef WalkCopy walk
    while True:
        table = queries.mem.walked()
        walk = queries.now(table)
        walk.w.gva_to_gpa(&walk.w, gva, access, set_ad, r)
        if r.status == STATUS_OK or not queries.mem.fetch_missing(table):
            return walk


cdef object whole_record(TableQueries queries, uint64_t gva, uint32_t access):
    cdef SlotTable table
    while True:
        table = queries.mem.walked()
        record = record_of(queries.now(table), gva, access)
        if not queries.mem.fetch_missing(table):
            return record


cdef int repeat_faults(TableQueries queries, out, tuple names, gva, access, ctx, dict options) except -1:
    rows = np.arange(gva.size) if out.status is None else np.flatnonzero(out.status)
    if rows.size and isinstance(access, np.ndarray) and access.size == gva.size:
        access = access[rows]
    queries.mem.keep(True)
    try:
        again = queries.translate(gva[rows], access, ctx=None if ctx is None else ctx[rows], fields=names, **options)
    finally:
        queries.mem.keep(False)
    for name in names:
        getattr(out, name)[rows] = getattr(again, name)
    return 0
