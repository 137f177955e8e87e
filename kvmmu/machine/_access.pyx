"""One access of one vCPU. The steps are listed in `_access.pxd`."""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memset
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from kvmmu._walk cimport kvm_pagewalk, walk_result
from kvmmu.arch._bits cimport (
    ACCESS_AC_MASK, ACCESS_MACHINE_MASK, ACCESS_PLAIN_MASK, ACCESS_SHADOW_STACK_MASK, ACCESS_WRITE_MASK, CR4_PGE_MASK,
    INVALID_GPA, PAGE_OFFSET_MASK, PAGE_SHIFT, PERMISSIONS_INDEX_SHIFT, PG_LEVEL_4K, PT32_INDEX_BITS, PT64_INDEX_BITS,
    PT64_PKEY_MASK, PT64_PKEY_SHIFT, PT_GLOBAL_MASK, RET_PF_CONTINUE, RET_PF_EMULATE, ROLE_DIRECT_MASK,
    ROLE_EXT_EFER_LMA_MASK, ROLE_HAS_4_BYTE_GPTE_MASK, SPTE_ENT_PER_PAGE, STATUS_NON_CANONICAL, STATUS_OK, STATUS_PAGE_FAULT,
)
from kvmmu.arch._format cimport explicit_access
from kvmmu.arch._gpte cimport kvmmu_is_canonical
from kvmmu.arch._linear cimport kvmmu_untagged
from kvmmu.machine._access cimport access_columns
from kvmmu.machine._emulation cimport machine_emulate, repeats_write
from kvmmu.machine._exits cimport handle_exit, set_fault, take_guest_fault
from kvmmu.machine._rights cimport allowed_accesses
from kvmmu.machine._roots cimport machine_prepare_root
from kvmmu.machine._state cimport access_result, cached_stage, gpa_entry, machine
from kvmmu.memory._memory cimport kvmmu_store
from kvmmu.mmu.core._fault cimport spte_walk, walk_sptes
from kvmmu.mmu.core._kvm cimport kvm, kvm_mmu_page, memslots_of, sp_level, sp_of, spte_to_child
from kvmmu.mmu.core._page cimport first_spte, sp_get_gfn, spte_index
from kvmmu.mmu.core._slots cimport gfn_to_memslot, kvm_memory_slot
from kvmmu.mmu.core._spte cimport is_last_spte, pages_per_hpage, spte_access, spte_ad_enabled
from kvmmu.mmu.tdp._tdp cimport tdp_page_fault
from kvmmu.tlb._tlb cimport (
    TLB_HINTS, TLB_LEVELS, tlb, tlb_drop, tlb_entry, tlb_fill, tlb_invlpg, tlb_lookup, tlb_page, tlb_remember_split,
)

cdef enum:
    MAX_EXITS = 64              # of one access: more means that the host never lets it through
    GPA_ENTRIES = 512
    SHIFT_MASK = 31
    CLEARED_ROWS = 256          # at a time: columns of so many rows stay in a first-level cache
    ROWS_BETWEEN_CLOCKS = 4096  # 10 us of TLB hits, of which a look at the clock is 0.3%; 10 ms of the slowest exits


# ---- the second stage ----------------------------------------------------------------------------------------------------

cdef void cached_gva_to_gpa(const kvm_pagewalk *w, uint64_t gpa, uint32_t access, bint set_ad, walk_result *r) noexcept nogil:
    """Walk the SPTEs, or return the mapping of an earlier walk: the processor caches guest-physical mappings until a flush."""
    cdef cached_stage *stage = <cached_stage *>w
    cdef uint64_t gfn = gpa >> PAGE_SHIFT
    cdef gpa_entry *entry = &stage.entries[(gfn ^ (gfn >> 9)) & (GPA_ENTRIES - 1)]
    if entry.gfn == gfn and entry.access == access and entry.epoch == stage.epoch:
        r.status = STATUS_OK
        r.refs = 0
        r.gpa = entry.hpa | (gpa & PAGE_OFFSET_MASK)
        return
    stage.walk(w, gpa, access, set_ad, r)
    if r.status == STATUS_OK:
        entry.gfn, entry.access, entry.epoch = gfn, access, stage.epoch
        entry.hpa = r.gpa & ~PAGE_OFFSET_MASK


# ---- the TLB -------------------------------------------------------------------------------------------------------------

cdef uint64_t spte_leaf_gpa(const kvm_mmu_page *sp, const spte_walk *walk, uint64_t hpa) noexcept nogil:
    """Return the guest-physical address of a host-physical one in the page of a shadow MMU's leaf."""
    cdef uint64_t offset = (pages_per_hpage(walk.level) << PAGE_SHIFT) - 1
    cdef uint64_t gfn = sp_get_gfn(sp, <int>(walk.sptep % SPTE_ENT_PER_PAGE))
    return (gfn << PAGE_SHIFT & ~offset) | (hpa & offset)


cdef int guest_level(kvm *k, uint32_t sp, uint64_t addr) noexcept nogil:
    """Return the level of the guest's page at addr under shadow paging: that of the last page that shadows a guest's table."""
    cdef uint64_t gfn = addr >> PAGE_SHIFT, spte
    cdef int level = 0
    while not k.pages[sp].role & <uint32_t>ROLE_DIRECT_MASK or k.pages[sp].special:
        level = sp_level(&k.pages[sp])
        spte = k.sptes[first_spte(sp) + spte_index(gfn, level)]
        if is_last_spte(spte, level):
            break
        sp = spte_to_child(k, spte)
    return level


cdef int large_page_shift(machine *m, uint64_t addr, int level) noexcept nogil:
    """Return log2 of the size of the guest's page at addr. IN level: of the processor's walk of the guest's tables."""
    if m.sw.cpu_role & ROLE_DIRECT_MASK:
        return PAGE_SHIFT
    if not m.k.tdp_enabled:
        level = guest_level(m.k, m.mmu.root.sp, addr)
    return PAGE_SHIFT + (PT32_INDEX_BITS if m.sw.cpu_role & ROLE_HAS_4_BYTE_GPTE_MASK else PT64_INDEX_BITS) * (level - 1)


cdef void fill_tlb(machine *m, uint64_t addr, uint32_t access, const walk_result *r, access_result *out) noexcept nogil:
    """Enter the translation of a walk in the TLB; its page is the smaller one of both stages. OUT out: the addresses."""
    cdef kvm *k = m.k
    cdef spte_walk walk
    cdef tlb_entry *entry
    cdef const kvm_mmu_page *sp
    cdef int level, page_shift
    cdef uint64_t offset, gpa
    cdef bint paged = not m.hw.cpu_role & ROLE_DIRECT_MASK, is_global = False, in_direct_page = False, dirty
    walk_sptes(k, m.mmu.root.sp, r.ngpa if k.tdp_enabled else addr, &walk)
    level = walk.level
    if m.mmu.page_fault == tdp_page_fault:
        gpa = r.ngpa
    else:
        sp = sp_of(k, walk.sptep)
        gpa = spte_leaf_gpa(sp, &walk, r.gpa)
        # shadow paging: pages that shadow no table map parts of a large page
        in_direct_page = not k.tdp_enabled and sp.role & <uint32_t>ROLE_DIRECT_MASK
    out.gpa, out.hpa = gpa, r.gpa
    dirty = (access & ACCESS_WRITE_MASK) != 0
    if paged:
        level = min(level, <int>r.level)
        is_global = r.pte & PT_GLOBAL_MASK and m.arch.cr4 & CR4_PGE_MASK
    if not dirty:
        dirty = (not paged or (r.pte & (m.hw.accessed_mask << 1)) != 0) and (
            not spte_ad_enabled(walk.spte) or not k.spte.dirty_mask or (walk.spte & k.spte.dirty_mask) != 0)
    offset = (<uint64_t>1 << (PAGE_SHIFT + PT64_INDEX_BITS * (level - 1))) - 1
    entry = tlb_fill(m.tlb, addr, level, is_global)
    entry.page_shift = PAGE_SHIFT
    if paged and (r.level > PG_LEVEL_4K or in_direct_page):
        page_shift = large_page_shift(m, addr, r.level)
        entry.page_shift = <uint8_t>page_shift
        if page_shift > m.tlb.arrays[level - 1].shift:
            tlb_remember_split(m.tlb, addr, page_shift)
    entry.hpa, entry.gpa, entry.as_id = r.gpa & ~offset, gpa & ~offset, m.vcpu.as_id
    entry.acc = <uint8_t>r.pte_access
    entry.nacc = <uint8_t>spte_access(&k.spte, walk.spte)
    entry.pkey = <uint8_t>((r.pte >> PT64_PKEY_SHIFT) & PT64_PKEY_MASK) if m.hw.cpu_role & ROLE_EXT_EFER_LMA_MASK else 0
    entry.dirty = dirty
    entry.allowed, entry.epoch = allowed_accesses(&m.rights, entry), m.rights.epoch


# The inputs of a hit, copied: the compiler must assume that every store into a column may change the machine.
cdef struct hit_context:
    uint64_t gva_mask
    uint64_t local_tag, global_tag
    uint64_t canonical_offset, canonical_limit      # an address is canonical if offset + address is at most limit
    uint32_t rights_epoch
    bint usable                     # no request is pending
    # of the arrays of the TLB
    int shift[TLB_LEVELS]
    const uint64_t *keys[TLB_LEVELS]
    tlb_entry *entries[TLB_LEVELS]


cdef void load_context(machine *m, hit_context *c) noexcept nogil:
    cdef int i
    c.gva_mask = m.hw.gva_mask
    c.local_tag, c.global_tag = m.tlb.local_tag, m.tlb.global_tag
    c.canonical_offset, c.canonical_limit = 0, ~<uint64_t>0
    if m.hw.canonical_shift:
        c.canonical_limit >>= m.hw.canonical_shift
        c.canonical_offset = (c.canonical_limit >> 1) + 1
    c.rights_epoch = m.rights.epoch
    c.usable = not m.vcpu.requests
    for i in range(<int>TLB_LEVELS):
        c.shift[i], c.keys[i], c.entries[i] = m.tlb.arrays[i].shift, m.tlb.arrays[i].keys, m.tlb.arrays[i].entries


cdef inline tlb_entry *quick_hit(const hit_context *c, uint32_t hint, uint64_t addr, uint32_t access) noexcept nogil:
    """Return the entry that the hint names, if it translates the address and allows the access, which is no implicit one."""
    cdef uint32_t array = hint & 3
    cdef uint64_t page = tlb_page(c.shift[array], addr), key = c.keys[array][hint >> 2]
    cdef tlb_entry *entry = &c.entries[array][hint >> 2]
    if key != (page | c.local_tag) and key != (page | c.global_tag):
        return NULL
    if addr + c.canonical_offset > c.canonical_limit or entry.epoch != c.rights_epoch:
        return NULL
    # the mask costs nothing: processors apply it to every shift
    return entry if (entry.allowed >> (access >> PERMISSIONS_INDEX_SHIFT & SHIFT_MASK)) & 1 else NULL


# ---- one access ------------------------------------------------------------------------------------------------------------

cdef int slow_access(machine *m, uint64_t addr, uint32_t access, access_result *out) noexcept nogil:
    """Do steps 1 and 3 to 6: 0, or a negative errno."""
    cdef walk_result r
    cdef int ret
    cdef bint shadowed = not m.k.tdp_enabled
    out.ret, out.exits = RET_PF_CONTINUE, 0
    m.vcpu.eflags_ac = access & <uint32_t>ACCESS_AC_MASK
    while True:
        if m.vcpu.requests or not m.mmu.root.valid:
            ret = machine_prepare_root(m)
            if ret:
                return ret
        m.hw.gva_to_gpa(&m.hw, addr, access, True, &r)                              # step 3
        if r.status == STATUS_OK:
            fill_tlb(m, addr, access, &r, out)
            out.status, out.error_code = STATUS_OK, 0
            return 0
        if r.status == STATUS_NON_CANONICAL or (r.status == STATUS_PAGE_FAULT and not shadowed):      # step 4
            tlb_invlpg(m.tlb, addr)
            set_fault(out, &r)
            return 0
        ret = handle_exit(m, addr, &r)                                              # step 5
        if out.exits < 255:
            out.exits += 1
        if ret < 0:
            return ret
        out.ret = <uint8_t>ret
        if m.vcpu.injected and take_guest_fault(m, addr, &r, out):
            m.vcpu.injected = False
            return 0
        if ret == RET_PF_EMULATE and not repeats_write(m, addr, access, addr if shadowed else r.fault_gpa):      # step 6
            machine_emulate(m, addr, access, out)
            return 0
        if out.exits >= MAX_EXITS:              # an invalidation is under way that only the caller can end
            out.gpa = out.hpa = INVALID_GPA
            out.status, out.error_code = STATUS_OK, 0
            return 0


cdef uint64_t machine_linear_address(const machine *m, uint64_t gva, uint32_t access) noexcept nogil:
    return kvmmu_untagged(&m.linear, gva, access) if m.pre_processes else gva


cdef int machine_access(machine *m, uint64_t gva, uint32_t access, access_result *out) noexcept nogil:
    cdef uint64_t addr = gva & m.hw.gva_mask, offset
    cdef tlb *t = m.tlb
    cdef tlb_entry *entry
    cdef int level = 0
    if access & ACCESS_SHADOW_STACK_MASK:
        t.misses += 1
        return slow_access(m, addr, access, out)
    if not m.vcpu.requests and kvmmu_is_canonical(addr, m.hw.canonical_shift):
        entry = tlb_lookup(t, addr, &level)
        if entry is not NULL:
            if entry.epoch != m.rights.epoch:
                entry.allowed, entry.epoch = allowed_accesses(&m.rights, entry), m.rights.epoch
            if (entry.allowed >> (access >> PERMISSIONS_INDEX_SHIFT)) & 1:              # step 2
                t.hits += 1
                offset = addr & ((<uint64_t>1 << t.arrays[level - 1].shift) - 1)
                out.gpa, out.hpa = entry.gpa | offset, entry.hpa | offset
                out.status, out.error_code = STATUS_OK, 0
                out.ret, out.exits = RET_PF_CONTINUE, 0
                return 0
            tlb_drop(t, addr)
    t.misses += 1
    return slow_access(m, addr, access, out)


cdef void machine_store(machine *m, const access_result *out) noexcept nogil:
    cdef kvm_memory_slot *slot
    if m.data is NULL or m.size == 0 or out.status != STATUS_OK or out.hpa == INVALID_GPA or out.ret == RET_PF_EMULATE:
        return
    slot = gfn_to_memslot(memslots_of(m.k, m.vcpu.as_id), out.gpa >> PAGE_SHIFT)
    if slot is not NULL:
        kvmmu_store(slot.hva + (out.gpa - (slot.base_gfn << PAGE_SHIFT)), m.data, m.size)


cdef int machine_run(machine *m, const uint64_t *gva, const uint8_t *access, size_t stride, size_t n,
                     const access_columns *out, size_t *row) noexcept nogil:
    cdef hit_context c
    cdef access_result r
    cdef tlb_entry *entry
    cdef uint32_t *hints = m.tlb.hints
    cdef uint64_t *gpa = out.gpa
    cdef uint64_t *hpa = out.hpa
    cdef uint32_t *error_code = out.error_code
    cdef uint8_t *status = out.status
    cdef uint8_t *rets = out.ret
    cdef uint8_t *exits = out.exits
    cdef uint32_t a, hint, clock
    cdef uint64_t addr, offset
    cdef size_t i, rows, others = 0
    cdef int ret
    load_context(m, &c)
    clock = m.tlb.clock
    for i in range(n):
        if i % CLEARED_ROWS == 0:                               # what a hit leaves in these columns: STATUS_OK, RET_PF_CONTINUE
            rows = min(n - i, <size_t>CLEARED_ROWS)
            memset(&status[i], 0, rows)
            memset(&rets[i], 0, rows)
            memset(&exits[i], 0, rows)
            memset(&error_code[i], 0, rows * sizeof(uint32_t))
        addr = gva[i] & c.gva_mask
        a = access[i * stride]
        hint = hints[(addr >> PAGE_SHIFT) & (TLB_HINTS - 1)]
        entry = quick_hit(&c, hint, addr, a) if c.usable else NULL
        if entry is not NULL:
            clock += 1
            entry.stamp = clock
            offset = addr & ((<uint64_t>1 << c.shift[hint & 3]) - 1)
            gpa[i], hpa[i] = entry.gpa | offset, entry.hpa | offset
            continue
        others += 1
        m.tlb.clock = clock
        ret = machine_access(m, gva[i], explicit_access(a & <uint32_t>ACCESS_PLAIN_MASK), &r)      # changed by another thread?
        clock = m.tlb.clock
        c.usable = not m.vcpu.requests
        if ret < 0:
            row[0] = i
            m.tlb.hits += i + 1 - others
            return ret
        gpa[i], hpa[i] = r.gpa, r.hpa
        status[i], error_code[i] = r.status, r.error_code
        rets[i], exits[i] = r.ret, r.exits
    m.tlb.clock = clock
    m.tlb.hits += n - others
    return 0


cdef int machine_run_each(machine *m, const uint64_t *gva, const uint8_t *access, size_t stride, size_t n,
                          const access_columns *out, size_t *row) noexcept nogil:
    cdef access_result r
    cdef uint32_t a
    cdef size_t i
    cdef int ret
    for i in range(n):
        a = access[i * stride] & <uint32_t>ACCESS_MACHINE_MASK                     # another thread may have changed it
        ret = machine_access(m, machine_linear_address(m, gva[i], a), explicit_access(a), &r)
        if ret < 0:
            row[0] = i
            return ret
        out.gpa[i], out.hpa[i] = r.gpa, r.hpa
        out.status[i], out.error_code[i] = r.status, r.error_code
        out.ret[i], out.exits[i] = r.ret, r.exits
    return 0


cdef uint64_t monotonic_nanoseconds() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <uint64_t>now.tv_sec * <uint64_t>1_000_000_000 + <uint64_t>now.tv_nsec


cdef void skip_rows(access_columns *out, size_t n) noexcept nogil:
    out.gpa, out.hpa, out.error_code = out.gpa + n, out.hpa + n, out.error_code + n
    out.status, out.ret, out.exits = out.status + n, out.ret + n, out.exits + n


cdef int machine_run_for(machine *m, const uint64_t *gva, const uint8_t *access, size_t stride, size_t n,
                         const access_columns *out, size_t *row, bint each, uint64_t nanoseconds) noexcept nogil:
    cdef access_columns rest = out[0]
    cdef uint64_t end = 0
    cdef size_t rows, failed = 0
    cdef int r = 0
    skip_rows(&rest, row[0])
    if n - row[0] > ROWS_BETWEEN_CLOCKS:
        end = monotonic_nanoseconds() + nanoseconds
    while row[0] < n:
        rows = min(n - row[0], <size_t>ROWS_BETWEEN_CLOCKS)
        if each:
            r = machine_run_each(m, gva + row[0], access + row[0] * stride, stride, rows, &rest, &failed)
        else:
            r = machine_run(m, gva + row[0], access + row[0] * stride, stride, rows, &rest, &failed)
        if r:
            row[0] += failed
            return r
        row[0] += rows
        skip_rows(&rest, rows)
        if end and monotonic_nanoseconds() >= end:
            return 0
    return 0
