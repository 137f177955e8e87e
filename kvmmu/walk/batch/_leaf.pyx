"""Blocks of lanes, one stage; see `_leaf.pxd`."""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t

from kvmmu._walk cimport second_stage_access
from kvmmu.arch._bits cimport ACCESS_WRITE_MASK, ACC_ALL, PERMISSIONS_COUNT, PERMISSIONS_INDEX_SHIFT, PG_LEVEL_4K
from kvmmu.arch._format cimport KVMMU_LOOK_ACCESS_SHIFT, look_of
from kvmmu.arch._gpte cimport KVMMU_FORMAT_32
from kvmmu.memory._memory cimport kvmmu_cmpxchg32, kvmmu_cmpxchg64
from kvmmu.walk.batch._lanes cimport (
    PREFIX_COLD_SHIFT, PREFIX_READONLY_SHIFT, PREFIX_REFUSED_SHIFT, kvmmu_count_bits, kvmmu_entry_hva, kvmmu_first_bit,
    kvmmu_lane_ops, kvmmu_lanes, kvmmu_learn_passes, kvmmu_prefix_level, kvmmu_read_entry, kvmmu_set_prefix,
    kvmmu_use_tables,
)
from kvmmu.walk.batch._leaf cimport FEW_ODD, lane_bit, rights_count
from kvmmu.walk.batch._psc cimport (
    JUDGED_FAULT, JUDGED_SLOW, is_canonical, is_resting, judge_one, judged_entry, lane_space, prefix_of, remember_table,
    rest_longer, start_patience, table_of,
)


cdef void find_lanes(const kvmmu_lane_ops *ops, lane_space *s, kvmmu_lanes *l, const uint64_t *gva, uint64_t wanted,
                     bint far) noexcept nogil:
    cdef uint64_t lanes, addr, ref
    cdef size_t lane
    lanes = ops.find[s.w.format](l, &s.stage, gva, far)
    l.noncanonical = l.cold = 0
    l.level = s.stage.level
    l.miss = lanes
    lanes &= wanted
    while lanes:
        lane = kvmmu_first_bit(lanes)
        lanes &= lanes - 1
        addr = gva[lane] & s.stage.gva_mask
        if not is_canonical(s.w, addr):
            l.noncanonical |= lane_bit(lane)
            continue
        if addr & s.w.ngpa_rsvd_mask:
            continue
        ref = prefix_of(s, addr)
        if ref:
            if s.stage.level > PG_LEVEL_4K:
                remember_table(s, ref, addr)
            kvmmu_set_prefix(s.w.format, l, lane, addr, ref)
            l.miss &= ~lane_bit(lane)
            if (ref >> PREFIX_COLD_SHIFT) & 1:
                l.cold |= lane_bit(lane)
    l.miss &= ~l.noncanonical


cdef bint learn_passes(lane_space *s, uint64_t gva) noexcept nogil:
    cdef uint64_t addr = gva & s.stage.gva_mask, ref, pte
    cdef uint8_t seconds[16]
    cdef const uint8_t *asked = NULL
    cdef uint32_t i
    if addr & s.w.ngpa_rsvd_mask or not is_canonical(s.w, addr):
        return False
    ref = prefix_of(s, addr)
    if not ref:
        return False
    if s.w.is_nested and not rights_count(s.w):
        for i in range(<uint32_t>PERMISSIONS_COUNT):
            seconds[i] = <uint8_t>second_stage_access(s.w, i << PERMISSIONS_INDEX_SHIFT, True, ACC_ALL)
        asked = seconds
    kvmmu_use_tables(s.w.format, &s.stage, s.lane.asid, <int>kvmmu_prefix_level(ref) if table_of(s, ref, addr) else PG_LEVEL_4K)
    pte = kvmmu_read_entry(s.w.format, kvmmu_entry_hva(s.w.format, ref, addr))
    s.known = kvmmu_learn_passes(s.w.format, &s.stage, &s.lane, pte, asked)
    return s.known


cdef void judge_own(lane_space *s, kvmmu_lanes *l, size_t lane, const uint64_t *gva, const uint8_t *access,
                    uint64_t *gpa) noexcept nogil:
    """Judge one lane, by a prefix of its own."""
    cdef judged_entry judged
    cdef int said
    cdef uint64_t addr = gva[lane] & s.stage.gva_mask, ref
    if l.level > PG_LEVEL_4K:
        ref = prefix_of(s, addr)
        if not ref:
            l.miss |= lane_bit(lane)
            return
        kvmmu_set_prefix(s.w.format, l, lane, addr, ref)
    judged.gpa = 0
    l.look[lane] = look_of(s.lane.fmt, access[lane])
    said = judge_one(s, l.ref[lane], l.entry[lane], addr, <uint32_t>l.look[lane], &judged)
    l.pte[lane], l.pte_access[lane], l.error[lane] = judged.pte, judged.pte_access, judged.error
    gpa[lane] = judged.gpa
    if said == JUDGED_FAULT:
        l.fault |= lane_bit(lane)
    elif said == JUDGED_SLOW:
        l.slow |= lane_bit(lane)


cdef bint judge_surely(const kvmmu_lane_ops *ops, lane_space *s, kvmmu_lanes *l, uint64_t lanes, const uint64_t *gva,
                       const uint8_t *access, uint64_t *gpa) noexcept nogil:
    """Judge a block in which most lanes surely pass, and the others one by one. False: too many others."""
    cdef uint64_t odd
    cdef size_t lane
    if is_resting(&s.sure):
        return False
    if not lanes:
        l.fault = l.slow = 0
        return True
    odd = lanes
    if (s.known or learn_passes(s, gva[kvmmu_first_bit(lanes)])) and l.level == s.stage.level:
        odd = (ops.read[s.w.format](l, &s.stage, gva, access, gpa, NULL, NULL, NULL) | l.cold) & lanes
    if kvmmu_count_bits(odd) > FEW_ODD:
        s.known = False                                 # another entry may be a better sample
        rest_longer(&s.sure)
        return False
    start_patience(&s.sure, 1)
    l.fault = l.slow = 0
    while odd:
        lane = kvmmu_first_bit(odd)
        odd &= odd - 1
        judge_own(s, l, lane, gva, access, gpa)
    return True


cdef void judge_again(lane_space *s, kvmmu_lanes *l, uint64_t lanes, const uint64_t *gva, const uint8_t *access,
                      uint64_t *gpa) noexcept nogil:
    """Judge those of these lanes whose entry leads to another table by prefixes of their own."""
    cdef size_t lane
    while lanes:
        lane = kvmmu_first_bit(lanes)
        lanes &= lanes - 1
        if not l.pte[lane] & s.lane.page_size_mask:
            l.slow &= ~lane_bit(lane)
            judge_own(s, l, lane, gva, access, gpa)


cdef void judge_block(const kvmmu_lane_ops *ops, lane_space *s, kvmmu_lanes *l, uint64_t held, const uint64_t *gva,
                      const uint8_t *access, bint whole, uint64_t *gpa) noexcept nogil:
    if whole or not judge_surely(ops, s, l, ~(held | l.miss | l.noncanonical), gva, access, gpa):
        ops.judge[s.w.format](l, &s.lane, s.stage.gva_mask, gva, access, gpa)
        if l.level > PG_LEVEL_4K:
            judge_again(s, l, l.slow & ~(held | l.miss | l.noncanonical), gva, access, gpa)


cdef bint set_leaf_bits(const lane_space *s, uint64_t ref, uint64_t entry, uint64_t pte, uint64_t look) noexcept nogil:
    cdef uint64_t bits = s.lane.accessed_mask, now
    cdef uint8_t *hva = <uint8_t *><uintptr_t>entry
    if not s.sets_ad or ((ref >> PREFIX_COLD_SHIFT) | (ref >> PREFIX_REFUSED_SHIFT)) & 1:
        return False
    if kvmmu_prefix_level(ref) > PG_LEVEL_4K and not pte & s.lane.page_size_mask:
        return False
    if look & <uint64_t>ACCESS_WRITE_MASK << KVMMU_LOOK_ACCESS_SHIFT:
        if s.w.pml is not NULL:
            return False
        bits |= bits << 1
    if (ref >> PREFIX_READONLY_SHIFT) & 1:
        return True
    if s.w.format == KVMMU_FORMAT_32:
        if kvmmu_cmpxchg32(hva, <uint32_t>pte, <uint32_t>(pte | bits)):
            return True
    elif kvmmu_cmpxchg64(hva, pte, pte | bits):
        return True
    now = kvmmu_read_entry(s.w.format, entry)
    return now & bits == bits and (now ^ pte) & ~(s.lane.accessed_mask * 3) == 0        # somebody else set them


cdef uint64_t set_bits_of(lane_space *s, kvmmu_lanes *l, uint64_t lanes) noexcept nogil:
    cdef uint64_t left = 0
    cdef size_t lane
    while lanes:
        lane = kvmmu_first_bit(lanes)
        lanes &= lanes - 1
        if not set_leaf_bits(s, l.ref[lane], l.entry[lane], l.pte[lane], l.look[lane]):
            left |= lane_bit(lane)
    return left
