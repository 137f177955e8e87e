"""The rules of last entries, for a block of lanes; see `_verdicts.pxd`."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memcpy

from kvmmu._bits cimport ACCESS_WRITE_MASK, PG_LEVEL_4K
from kvmmu._format cimport KVMMU_ACCESS_BYTES, KVMMU_LOOK_ACCESS_SHIFT, explicit_access
from kvmmu._gpte cimport KVMMU_FORMAT_32, KVMMU_FORMAT_EPT
from kvmmu._lanes cimport (
    KVMMU_LANES, PREFIX_COLD_SHIFT, PREFIX_LIKE_MASK, PREFIX_READONLY_SHIFT, kvmmu_count_bits, kvmmu_first_bit,
    kvmmu_lane_ops, kvmmu_lanes, kvmmu_prefix_level, kvmmu_read_entry, kvmmu_sure_pass,
)
from kvmmu._memory cimport kvmmu_cmpxchg32, kvmmu_cmpxchg64, kvmmu_read64
from kvmmu._prefixes cimport JUDGED_FAULT, JUDGED_SLOW, judge_one, judged_entry, lane_space, sure_passes
from kvmmu._verdicts cimport FEW_ODD, lane_bit

# Blocks to go without trying again whether most lanes surely pass, at most.
cdef int MAX_PATIENCE = 31


cdef inline bint all_alike(const uint8_t *access) noexcept nogil:
    """Whether 64 access bytes are the same."""
    cdef uint64_t differ = 0, first = access[0] * (~<uint64_t>0 // 255)
    cdef size_t i
    for i in range(KVMMU_LANES // sizeof(uint64_t)):
        differ |= kvmmu_read64(&access[i * sizeof(uint64_t)]) ^ first
    return differ == 0


cdef bint find_sure(sure_passes *p, const lane_space *s, const kvmmu_lanes *l, uint64_t lanes) noexcept nogil:
    """Learn from one of these lanes which last entries surely pass each access."""
    cdef size_t lane, access
    cdef uint64_t ref, sample
    while lanes:
        lane = kvmmu_first_bit(lanes)
        lanes &= lanes - 1
        ref = l.ref[lane] & PREFIX_LIKE_MASK
        if (ref >> PREFIX_COLD_SHIFT) & 1:
            continue
        sample = kvmmu_read_entry(s.w.format, l.entry[lane])
        if p.of is s.w and p.like == ref and (s.w.format != KVMMU_FORMAT_EPT or p.sample == sample):
            return True                             # what is known is for lanes like this
        p.of, p.like, p.sample = s.w, ref, sample
        for access in range(<size_t>KVMMU_ACCESS_BYTES):
            if explicit_access(access) != access:
                p.passes[access] = p.passes[explicit_access(access)]
            elif access % 2 or not kvmmu_sure_pass(s.w.format, &s.lane, ref, s.lane.fmt.looks[access], sample, &p.passes[access]):
                p.passes[access].care, p.passes[access].want = 0, 1             # none
        return True
    return False


cdef bint judge_surely(const kvmmu_lane_ops *ops, const lane_space *s, kvmmu_lanes *l, uint64_t held, const uint8_t *access,
                       sure_passes *p, uint64_t *gpa) noexcept nogil:
    """Judge a block in which most lanes surely pass, and the others one by one. False: too many others."""
    cdef uint64_t lanes = ~(held | l.miss | l.noncanonical), odd
    cdef size_t lane
    cdef judged_entry judged
    cdef int said
    if p.rest:
        p.rest -= 1
        return False
    if p.of is not s.w or not p.fits:
        if not find_sure(p, s, l, lanes):
            return False
    if all_alike(access):
        odd = ops.sure[s.w.format](l, &p.passes[access[0]], NULL, p.like, gpa) & lanes
    else:
        odd = ops.sure[s.w.format](l, p.passes, access, p.like, gpa) & lanes
    p.fits = kvmmu_count_bits(odd) <= FEW_ODD
    if not p.fits:
        p.patience = min(2 * p.patience + 1, MAX_PATIENCE)
        p.rest = p.patience
        return False
    p.patience = 0
    l.fault = l.slow = 0
    while odd:
        lane = kvmmu_first_bit(odd)
        odd &= odd - 1
        l.look[lane] = s.lane.fmt.looks[access[lane]]
        said = judge_one(s, l.ref[lane], l.addr[lane], <uint32_t>l.look[lane], &judged)
        l.pte[lane], l.pte_access[lane], l.error[lane] = judged.pte, judged.pte_access, judged.error
        gpa[lane] = judged.gpa
        if said == JUDGED_FAULT:
            l.fault |= lane_bit(lane)
        elif said == JUDGED_SLOW:
            l.slow |= lane_bit(lane)
    return True


cdef void judge_block(const kvmmu_lane_ops *ops, const lane_space *s, kvmmu_lanes *l, uint64_t held, const uint8_t *access,
                      sure_passes *p, uint64_t *gpa) noexcept nogil:
    cdef size_t lane
    if p is not NULL and judge_surely(ops, s, l, held, access, p, gpa):
        return
    for lane in range(KVMMU_LANES):
        l.look[lane] = s.lane.fmt.looks[access[lane]]
    ops.judge[s.w.format](l, &s.lane)
    if gpa != l.gpa:
        memcpy(gpa, l.gpa, sizeof(l.gpa))


cdef bint set_leaf_bits(const lane_space *s, const kvmmu_lanes *l, size_t lane) noexcept nogil:
    """Step 7 of the walk for a lane with nothing else to set than bits of its leaf. False: not so, or the race is lost."""
    cdef uint64_t pte = l.pte[lane], bits = s.lane.accessed_mask, now
    cdef uint8_t *hva = <uint8_t *><uintptr_t>l.entry[lane]
    if not s.sets_ad or (l.ref[lane] >> PREFIX_COLD_SHIFT) & 1:
        return False
    if kvmmu_prefix_level(l.ref[lane]) > PG_LEVEL_4K and not pte & s.lane.page_size_mask:
        return False
    if l.look[lane] & <uint64_t>ACCESS_WRITE_MASK << KVMMU_LOOK_ACCESS_SHIFT:
        if s.w.pml is not NULL:
            return False
        bits |= bits << 1
    if (l.ref[lane] >> PREFIX_READONLY_SHIFT) & 1:
        return True
    if s.w.format == KVMMU_FORMAT_32:
        if kvmmu_cmpxchg32(hva, <uint32_t>pte, <uint32_t>(pte | bits)):
            return True
    elif kvmmu_cmpxchg64(hva, pte, pte | bits):
        return True
    now = kvmmu_read_entry(s.w.format, l.entry[lane])
    return now & bits == bits and (now ^ pte) & ~(s.lane.accessed_mask * 3) == 0        # somebody else set them


cdef uint64_t set_bits_of(const lane_space *s, kvmmu_lanes *l, uint64_t lanes) noexcept nogil:
    cdef uint64_t left = 0
    cdef size_t lane
    while lanes:
        lane = kvmmu_first_bit(lanes)
        lanes &= lanes - 1
        if not set_leaf_bits(s, l, lane):
            left |= lane_bit(lane)
    return left
