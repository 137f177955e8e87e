"""May these leaves be used: 64 rows of one stage; see `_leaves.pxd`."""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kvmmu._walk cimport kvm_pagewalk, second_stage_access
from kvmmu.arch._bits cimport ACC_ALL, PERMISSIONS_COUNT, PERMISSIONS_INDEX_SHIFT, PG_LEVEL_4K
from kvmmu.arch._format cimport access_info_of, kvm_page_format
from kvmmu.arch._gpte cimport kvmmu_is_canonical
from kvmmu.walk.batch._kernels cimport (
    KVMMU_BLOCK_ROWS, PSCE_ACCESSED_CLEAR_SHIFT, kvmmu_count_bits, kvmmu_entry_hva, kvmmu_first_bit, kvmmu_kernels,
    kvmmu_leaf_block, kvmmu_leaf_rules, kvmmu_make_accept_masks, kvmmu_narrow_accept_masks, kvmmu_prefetch, kvmmu_psce_level,
    kvmmu_read_entry, kvmmu_set_psce, kvmmu_use_tables,
)
from kvmmu.walk.batch._leaf cimport LEAF_FAULT, LEAF_SLOW, check_leaf, leaf_result, asks_rights, set_leaf_bits
from kvmmu.walk.batch._leaves cimport MAX_REMAINING_IN_BLOCK, can_descend, lane_bit, seek_leaves
from kvmmu.walk.batch._psc cimport (
    MANY_DEPEND, back_off, cached_walk, is_backing_off, mark_word, psce_of, remember_psce, remember_table, reset_backoff,
    table_of,
)

cdef enum:
    # Lanes that are not cached from which on they are looked up all at once, which costs as much as some walks. Tuned by hand
    MANY_MISSES = 6
    MOST_FORMATS = 16               # of walks that are alike: there are fewer combinations of WP, SMEP, SMAP and so on in a trace


cdef inline void mark_descent(const cached_walk *s, const kvmmu_leaf_block *l, size_t lane) noexcept nogil:
    """Mark the entry of level 2 that led to the table of a lane."""
    if kvmmu_psce_level(l.psce[lane]) == PG_LEVEL_4K:
        mark_word(s.touched, l.pte[lane], MANY_DEPEND)


cdef uint64_t descend(const kvmmu_kernels *kernels, cached_walk *s, kvmmu_leaf_block *l, const uint64_t *gva,
                      bint far) noexcept nogil:
    cdef uint64_t missed
    cdef size_t lane
    kernels.find[s.w.format](l, &s.directories, gva, False)
    missed = kernels.descend[s.w.format](l, &s.descent, gva, far)
    if s.touched is not NULL:
        for lane in range(KVMMU_BLOCK_ROWS):
            mark_descent(s, l, lane)
    return missed


cdef uint64_t descend_lanes(const kvmmu_kernels *kernels, cached_walk *s, kvmmu_leaf_block *l, const uint64_t *gva,
                            uint64_t lanes) noexcept nogil:
    """Find psce of lanes below tables of level 2 that are cached, and cache them. Returns the lanes left."""
    cdef kvmmu_leaf_block below
    cdef uint64_t known
    cdef size_t lane
    kernels.find[s.w.format](&below, &s.directories, gva, False)
    known = lanes & ~kernels.descend[s.w.format](&below, &s.descent, gva, False)
    lanes &= ~known
    l.miss &= ~known
    while known:
        lane = kvmmu_first_bit(known)
        known &= known - 1
        mark_descent(s, &below, lane)
        remember_psce(s, gva[lane] & s.checker.gva_mask, below.psce[lane])
        l.psce[lane], l.entry[lane] = below.psce[lane], below.entry[lane]
    return lanes


cdef void find_leaves(const kvmmu_kernels *kernels, cached_walk *s, kvmmu_leaf_block *l, const uint64_t *gva, uint64_t wanted,
                      bint far) noexcept nogil:
    cdef uint64_t lanes = seek_leaves(kernels, s, l, gva, far), fresh, addr, psce
    cdef size_t lane
    cdef bint descends = can_descend(s)
    l.noncanonical = l.accessed_clear = 0
    l.level = s.checker.level
    l.miss = lanes
    lanes &= wanted
    fresh = lanes
    while lanes:
        lane = kvmmu_first_bit(lanes)
        lanes &= lanes - 1
        addr = gva[lane] & s.checker.gva_mask
        if not kvmmu_is_canonical(addr, s.w.canonical_shift):
            l.noncanonical |= lane_bit(lane)
            continue
        if addr & s.w.ngpa_rsvd_mask:
            continue
        psce = psce_of(s, addr)
        if psce:
            if s.checker.level > PG_LEVEL_4K:
                remember_table(s, psce, addr)
            kvmmu_set_psce(s.w.format, l, lane, addr, psce)
            l.miss &= ~lane_bit(lane)
            if (psce >> PSCE_ACCESSED_CLEAR_SHIFT) & 1:
                l.accessed_clear |= lane_bit(lane)
        if descends and kvmmu_count_bits(lanes) >= MANY_MISSES:         # now that a table of level 2 is known
            lanes = descend_lanes(kernels, s, l, gva, lanes)
        descends = False
    l.miss &= ~l.noncanonical
    # One behind the other: a processor that waits for the translation of one address has those of the others on the way
    while fresh:
        lane = kvmmu_first_bit(fresh)
        fresh &= fresh - 1
        kvmmu_prefetch(l.entry[lane])


cdef bint make_accept_masks(cached_walk *s, uint64_t gva) noexcept nogil:
    cdef uint64_t addr = gva & s.checker.gva_mask, psce, pte
    cdef uint8_t seconds[16]
    cdef const uint8_t *asked = NULL
    cdef uint32_t i
    if addr & s.w.ngpa_rsvd_mask or not kvmmu_is_canonical(addr, s.w.canonical_shift):
        return False
    psce = psce_of(s, addr)
    if not psce:
        return False
    if s.w.is_nested and not asks_rights(s.w):
        for i in range(<uint32_t>PERMISSIONS_COUNT):
            seconds[i] = <uint8_t>second_stage_access(s.w, i << PERMISSIONS_INDEX_SHIFT, True, ACC_ALL)
        asked = seconds
    kvmmu_use_tables(s.w.format, &s.checker, s.rules.walk_id,
                     <int>kvmmu_psce_level(psce) if table_of(s, psce, addr) else PG_LEVEL_4K)
    pte = kvmmu_read_entry(s.w.format, kvmmu_entry_hva(s.w.format, psce, addr))
    s.has_masks = kvmmu_make_accept_masks(s.w.format, &s.checker, &s.rules, pte, asked)
    return s.has_masks


cdef bint make_common_masks(cached_walk *s, uint64_t gva, const kvm_pagewalk *walks, const uint32_t *alike,
                            uint64_t count) noexcept nogil:
    cdef kvmmu_leaf_rules rules = s.rules
    cdef const kvm_page_format *formats[MOST_FORMATS]
    cdef const kvm_page_format *fmt
    cdef uint32_t group = alike[s.w - walks]
    cdef size_t found = 0, i, k
    cdef bint known
    if not make_accept_masks(s, gva):
        return False
    s.has_masks = False
    rules.keys = 0
    for i in range(count):
        if alike[i] == group:
            rules.keys |= walks[i].vcpu.keys            # what none of them denies
    for i in range(count):
        fmt = walks[i].fmt
        if alike[i] != group or (found and fmt is formats[found - 1]):
            continue
        known = False
        for k in range(found):
            known = known or formats[k] is fmt
        if known:
            continue
        if found == MOST_FORMATS:
            return False
        formats[found] = rules.fmt = fmt
        found += 1
        if not kvmmu_narrow_accept_masks(s.w.format, &s.checker, &rules):
            return False
    s.has_masks = True
    return True


cdef void check_own_leaf(cached_walk *s, kvmmu_leaf_block *l, size_t lane, const uint64_t *gva, const uint8_t *access,
                         uint64_t *gpa) noexcept nogil:
    """Check the leaf of one lane, by a psce of its own."""
    cdef leaf_result leaf
    cdef int result
    cdef uint64_t addr = gva[lane] & s.checker.gva_mask, psce
    if l.level > PG_LEVEL_4K:
        psce = psce_of(s, addr)
        if not psce:
            l.miss |= lane_bit(lane)
            return
        kvmmu_set_psce(s.w.format, l, lane, addr, psce)
    leaf.gpa = 0
    l.access_info[lane] = access_info_of(s.rules.fmt, access[lane])
    result = check_leaf(&s.rules, l.psce[lane], l.entry[lane], addr, l.access_info[lane], &leaf)
    l.pte[lane], l.pte_access[lane], l.error[lane] = leaf.pte, leaf.pte_access, leaf.error
    gpa[lane] = leaf.gpa
    if result == LEAF_FAULT:
        l.fault |= lane_bit(lane)
    elif result == LEAF_SLOW:
        l.slow |= lane_bit(lane)


cdef bint check_most_leaves(const kvmmu_kernels *kernels, cached_walk *s, kvmmu_leaf_block *l, uint64_t lanes,
                            const uint64_t *gva, const uint8_t *access, uint64_t *gpa) noexcept nogil:
    """Check a block in which most leaves are accepted, the others one by one. False: too many are not accepted."""
    cdef uint64_t remaining
    cdef size_t lane
    if is_backing_off(&s.mask_backoff):
        return False
    if not lanes:
        l.fault = l.slow = 0
        return True
    remaining = lanes
    if (s.has_masks or make_accept_masks(s, gva[kvmmu_first_bit(lanes)])) and l.level == s.checker.level:
        remaining = kernels.accept[s.w.format](l, &s.checker, gva, access, gpa, NULL, NULL, NULL, NULL)
        remaining = (remaining | l.accessed_clear) & lanes
    if kvmmu_count_bits(remaining) > MAX_REMAINING_IN_BLOCK:
        s.has_masks = False                                 # masks from another entry may accept more
        back_off(&s.mask_backoff)
        return False
    reset_backoff(&s.mask_backoff, 1)
    l.fault = l.slow = 0
    while remaining:
        lane = kvmmu_first_bit(remaining)
        remaining &= remaining - 1
        check_own_leaf(s, l, lane, gva, access, gpa)
    return True


cdef void recheck_leaves(cached_walk *s, kvmmu_leaf_block *l, uint64_t lanes, const uint64_t *gva, const uint8_t *access,
                         uint64_t *gpa) noexcept nogil:
    """Check those of these lanes whose entry leads to another table by a psce of their own."""
    cdef size_t lane
    while lanes:
        lane = kvmmu_first_bit(lanes)
        lanes &= lanes - 1
        if not l.pte[lane] & s.rules.page_size_mask:
            l.slow &= ~lane_bit(lane)
            check_own_leaf(s, l, lane, gva, access, gpa)


cdef void check_leaves(const kvmmu_kernels *kernels, cached_walk *s, kvmmu_leaf_block *l, uint64_t held, const uint64_t *gva,
                       const uint8_t *access, bint whole, uint64_t *gpa) noexcept nogil:
    if whole or not check_most_leaves(kernels, s, l, ~(held | l.miss | l.noncanonical), gva, access, gpa):
        kernels.check[s.w.format](l, &s.rules, s.checker.gva_mask, gva, access, gpa)
        if l.level > PG_LEVEL_4K:
            recheck_leaves(s, l, l.slow & ~(held | l.miss | l.noncanonical), gva, access, gpa)


cdef uint64_t set_bits_of(cached_walk *s, kvmmu_leaf_block *l, uint64_t lanes) noexcept nogil:
    cdef uint64_t left = 0
    cdef size_t lane
    while lanes:
        lane = kvmmu_first_bit(lanes)
        lanes &= lanes - 1
        if not set_leaf_bits(&s.rules, l.psce[lane], l.entry[lane], l.pte[lane], l.access_info[lane]):
            left |= lane_bit(lane)
    return left
