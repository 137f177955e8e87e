"""The rules of last entries, for a block of lanes; see `_verdicts.pxd`."""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memcpy

from kvmmu._bits cimport ACCESS_WRITE_MASK, PG_LEVEL_4K
from kvmmu._directories cimport find_own, is_void, void_lanes
from kvmmu._format cimport KVMMU_ACCESS_BYTES, KVMMU_LOOK_ACCESS_SHIFT, explicit_access
from kvmmu._gpte cimport KVMMU_FORMAT_32, KVMMU_FORMAT_64, KVMMU_FORMAT_EPT
from kvmmu._lanes cimport (
    KVMMU_LANES, PREFIX_COLD_SHIFT, PREFIX_LIKE_MASK, PREFIX_READONLY_SHIFT, PREFIX_REFUSED_SHIFT, kvmmu_count_bits,
    kvmmu_first_bit, kvmmu_lane_ops, kvmmu_lanes, kvmmu_pass, kvmmu_prefix_level, kvmmu_read_entry, kvmmu_split_passes,
    kvmmu_sure_pass,
)
from kvmmu._memory cimport kvmmu_cmpxchg32, kvmmu_cmpxchg64, kvmmu_read64
from kvmmu._prefixes cimport (
    JUDGED_FAULT, JUDGED_OK, JUDGED_SLOW, judge_one, judged_entry, lane_space, sure_passes,
)
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


cdef void find_passes(kvmmu_pass *passes, const lane_space *s, uint64_t like, uint64_t sample) noexcept nogil:
    """Learn which last entries surely pass each access after such a prefix. IN sample: one of the entries."""
    cdef size_t access
    for access in range(<size_t>KVMMU_ACCESS_BYTES):
        if explicit_access(<uint32_t>access) != access:
            passes[access] = passes[explicit_access(<uint32_t>access)]
        elif access % 2 or not kvmmu_sure_pass(s.w.format, &s.lane, like, s.lane.fmt.looks[access], sample, &passes[access]):
            passes[access].care, passes[access].want = 0, 1                 # none


cdef int judge_lane(lane_space *s, kvmmu_lanes *l, size_t lane, const uint8_t *access, uint64_t *gpa) noexcept nogil:
    """Judge one lane by its own prefix."""
    cdef judged_entry judged
    cdef int said
    judged.gpa = 0
    if not l.apart & lane_bit(lane) and (kvmmu_prefix_level(l.like) != PG_LEVEL_4K or is_void(l, lane)):
        if not find_own(s, l, lane):
            return JUDGED_OK                                # unknown: in l.miss
    l.look[lane] = s.lane.fmt.looks[access[lane]]
    said = judge_one(s, l.ref[lane], l.entry[lane], l.addr[lane], <uint32_t>l.look[lane], &judged)
    l.pte[lane], l.pte_access[lane], l.error[lane] = judged.pte, judged.pte_access, judged.error
    gpa[lane] = l.gpa[lane] = judged.gpa
    return said


cdef uint64_t lanes_left(const kvmmu_lane_ops *ops, lane_space *s, kvmmu_lanes *l, uint64_t lanes, const uint8_t *access,
                         uint64_t *gpa) noexcept nogil:
    """Of these lanes, those that do not surely pass after a prefix of the second kind."""
    cdef sure_passes *p = s.sure
    cdef uint64_t left, passed
    cdef size_t lane
    if not p.beside_like:
        return lanes
    left = ops.beside[s.w.format](l, lanes, s.prefixes, s.lane.asid, p.beside_like, p.beside, access, gpa)
    passed = lanes & ~left
    if passed:
        lane = kvmmu_first_bit(passed)
        s.strangers += <size_t>kvmmu_count_bits(passed)
        s.stranger, s.stranger_addr = l.ref[lane], l.addr[lane]
    return left


cdef void consider_beside(lane_space *s, const kvmmu_lanes *l, size_t lane) noexcept nogil:
    """A lane that passed by itself: perhaps its prefix is of a kind that is frequent."""
    cdef sure_passes *p = s.sure
    cdef uint64_t like = l.ref[lane] & PREFIX_LIKE_MASK
    if like == s.directory.like or (like == p.beside_like and s.w.format != KVMMU_FORMAT_EPT):
        return
    p.beside_misses += 1
    if not p.beside_like or p.beside_misses > MAX_PATIENCE:
        p.beside_like = like
        p.beside_misses = 0
        find_passes(p.beside, s, like, l.pte[lane])


cdef bint judge_surely(const kvmmu_lane_ops *ops, lane_space *s, kvmmu_lanes *l, uint64_t held, const uint8_t *access,
                       uint64_t *gpa) noexcept nogil:
    """Judge a block in which most lanes surely pass, and the others one by one. False: too many others."""
    cdef sure_passes *p = s.sure
    cdef uint64_t lanes = ~(held | l.miss | l.noncanonical), odd
    cdef size_t lane
    cdef int said
    cdef bint alike = False
    if p.rest:
        p.rest -= 1
        return False
    if l.like != s.directory.like or not lanes & ~l.apart:
        return False
    if not p.known:
        lane = kvmmu_first_bit(lanes & ~l.apart)
        find_passes(p.passes.of, s, l.like, kvmmu_read_entry(s.w.format, l.entry[lane]))
        kvmmu_split_passes(&p.passes)
        p.known = True
    if s.w.format != KVMMU_FORMAT_64:                   # that one is no faster for it
        alike = all_alike(access)
    odd = (ops.sure[s.w.format](l, &p.passes, access, alike, l.like, gpa) | l.apart) & lanes
    if kvmmu_count_bits(odd) > FEW_ODD:
        if s.w.format == KVMMU_FORMAT_EPT:              # another entry may be a better sample
            p.known = False
        p.patience = min(2 * p.patience + 1, MAX_PATIENCE)
        p.rest = p.patience
        return False
    p.patience = 0
    l.fault = l.slow = 0
    odd = lanes_left(ops, s, l, odd, access, gpa)
    while odd:
        lane = kvmmu_first_bit(odd)
        odd &= odd - 1
        said = judge_lane(s, l, lane, access, gpa)
        if said == JUDGED_OK and not l.miss & lane_bit(lane):
            consider_beside(s, l, lane)
        elif said == JUDGED_FAULT:
            l.fault |= lane_bit(lane)
        elif said == JUDGED_SLOW:
            l.slow |= lane_bit(lane)
    return True


cdef void judge_block(const kvmmu_lane_ops *ops, lane_space *s, kvmmu_lanes *l, uint64_t held, const uint8_t *access,
                      bint whole, uint64_t *gpa) noexcept nogil:
    cdef size_t lane
    cdef uint64_t lanes = ~(held | l.miss | l.noncanonical), again
    cdef int said
    if not whole and judge_surely(ops, s, l, held, access, gpa):
        return
    again = void_lanes(l) & lanes & ~l.apart
    while again:
        find_own(s, l, kvmmu_first_bit(again))
        again &= again - 1
    for lane in range(KVMMU_LANES):
        l.look[lane] = s.lane.fmt.looks[access[lane]]
    ops.judge[s.w.format](l, &s.lane)
    if gpa != l.gpa:
        memcpy(gpa, l.gpa, sizeof(l.gpa))
    if kvmmu_prefix_level(l.like) == PG_LEVEL_4K:
        return
    again = l.slow & lanes & ~l.apart                   # of a higher level: some may lead to another table
    while again:
        lane = kvmmu_first_bit(again)
        again &= again - 1
        if l.pte[lane] & s.lane.page_size_mask:
            continue
        said = judge_lane(s, l, lane, access, gpa)
        if said != JUDGED_SLOW:
            l.slow &= ~lane_bit(lane)
        if said == JUDGED_FAULT:
            l.fault |= lane_bit(lane)


cdef bint set_leaf_bits(lane_space *s, const kvmmu_lanes *l, size_t lane) noexcept nogil:
    """Step 7 of the walk for a lane with nothing else to set than bits of its leaf. False: not so, or the race is lost."""
    cdef uint64_t pte = l.pte[lane], bits = s.lane.accessed_mask, now
    cdef uint8_t *hva = <uint8_t *><uintptr_t>l.entry[lane]
    if not s.sets_ad or ((l.ref[lane] >> PREFIX_COLD_SHIFT) | (l.ref[lane] >> PREFIX_REFUSED_SHIFT)) & 1:
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


cdef uint64_t set_bits_of(lane_space *s, kvmmu_lanes *l, uint64_t lanes) noexcept nogil:
    cdef uint64_t left = 0
    cdef size_t lane
    while lanes:
        lane = kvmmu_first_bit(lanes)
        lanes &= lanes - 1
        if not set_leaf_bits(s, l, lane):
            left |= lane_bit(lane)
    return left
