"""SPTEs: the making of entries and formats, and the array forms. The layout is described in `_spte.pxd`."""

import numpy as np

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memset

from kvmmu.arch._bits cimport (
    ACC_ALL, ACC_EXEC_MASK, ACC_READ_MASK, ACC_USER_EXEC_MASK, ACC_USER_MASK, ACC_WRITE_MASK, EPT_ACCESSED_MASK, EPT_DIRTY_MASK,
    EPT_EXECUTABLE_MASK, EPT_IPAT_MASK, EPT_MMIO_VALUE, EPT_MT_WB_MASK, EPT_RWX_MASK, EPT_SPTE_HOST_WRITABLE,
    EPT_SPTE_MMU_WRITABLE, EPT_SUPPRESS_VE_MASK, EPT_USER_EXECUTABLE_MASK, GPA_BITS, GPA_LIMIT, KVMMU_BITS, L1TF_BITS,
    LEGACY_MMIO_VALUE, LEGACY_SPTE_HOST_WRITABLE, LEGACY_SPTE_MMU_WRITABLE, MMIO_SPTE_GEN_MASK, PAGE_SHIFT, PAGE_SIZE,
    PG_LEVEL_1G, PG_LEVEL_4K, PT64_INDEX_BITS, PT64_NX_MASK, PT_ACCESSED_MASK, PT_DIRTY_MASK, PT_MAX_LEVELS,
    PT_PAGE_SIZE_MASK, PT_PRESENT_MASK, PT_USER_MASK, PT_WRITABLE_MASK, ROLE_ACCESS_MASK, ROLE_ACCESS_SHIFT,
    ROLE_AD_DISABLED_MASK, ROLE_GUEST_MODE_MASK, ROLE_LEVEL_MASK, SPTE_ACC_TRACK_BITS_MASK, SPTE_ACC_TRACK_SAVED_SHIFT,
    SPTE_BASE_ADDR_MASK, SPTE_ENT_PER_PAGE, SPTE_MMU_PRESENT_MASK, SPTE_TDP_AD_DISABLED, SPTE_TDP_AD_WRPROT_ONLY,
)
from kvmmu.arch._format cimport (
    PageFormat, permission_params, reset_ept_rsvds_bits_mask, reset_guest_rsvds_bits_mask, rsvd_params,
    update_ept_permissions, update_permission_bitmask,
)
from kvmmu.mmu.core._spte cimport (
    check_writable, generation_mmio_spte_mask, get_mmio_spte_generation, is_access_track_spte, is_last_spte, is_mmio_spte,
    is_rsvd_spte, is_shadow_present_pte, spte_access, spte_ad_enabled, spte_format, spte_permission_fault, spte_request,
)
from kvmmu.mmu.core._spte cimport make_huge_spte as c_make_huge_spte
from kvmmu.mmu.core._spte cimport make_small_spte as c_make_small_spte
from kvmmu.mmu.core._spte cimport make_spte as c_make_spte
from kvmmu.walk._arguments cimport check_scalar_word

from kvmmu.arch.arguments import check_bool, check_int, check_pages, check_word, refuse_masked
from kvmmu.mmu.host import Host

# The faults of an entry that `SpteFormat.audit_page()` reports.
cdef enum:
    BAD_WRITABLE = 1
    BAD_RSVD = 2
    BAD_AD_TYPE = 4
    BAD_TRACKED = 8
    BAD_NX_HUGE = 16


# ---- MMIO entries ------------------------------------------------------------------------------------------------------

cdef uint64_t make_mmio_spte(const spte_format *f, uint64_t gfn, uint32_t access, uint64_t gen) noexcept nogil:
    cdef uint64_t gpa = gfn << PAGE_SHIFT
    cdef uint64_t spte = generation_mmio_spte_mask(gen & MMIO_SPTE_GEN_MASK)
    return spte | f.mmio_value | (access & f.mmio_access_mask) | gpa | f.l1tf_mask | ((gpa & f.l1tf_mask) << L1TF_BITS)


cdef uint64_t get_mmio_spte_gfn(const spte_format *f, uint64_t spte) noexcept nogil:
    cdef uint64_t gpa = spte & SPTE_BASE_ADDR_MASK & ~f.mmio_value
    if f.l1tf_mask:
        gpa = (gpa & ~f.l1tf_mask & ~(f.l1tf_mask << L1TF_BITS)) | ((spte >> L1TF_BITS) & f.l1tf_mask)
    return gpa >> PAGE_SHIFT


cdef uint32_t get_mmio_spte_access(const spte_format *f, uint64_t spte) noexcept nogil:
    return <uint32_t>(ACC_READ_MASK | (spte & f.mmio_access_mask))


# ---- making and changing entries ---------------------------------------------------------------------------------------

cdef uint64_t make_spte(const spte_format *f, const spte_request *q) noexcept nogil:
    cdef uint64_t spte = SPTE_MMU_PRESENT_MASK | f.present_mask | f.me_value | (q.pfn << PAGE_SHIFT)
    cdef uint32_t access = q.access
    if q.role & ROLE_AD_DISABLED_MASK:
        spte |= SPTE_TDP_AD_DISABLED
    elif f.pml and q.role & ROLE_GUEST_MODE_MASK:       # the log would hold L2's addresses
        spte |= SPTE_TDP_AD_WRPROT_ONLY
    if not q.prefetch or q.synchronizing:               # an entry that was only prefetched must look old
        spte |= f.accessed_mask
    if q.role & ROLE_LEVEL_MASK > PG_LEVEL_4K:
        spte |= PT_PAGE_SIZE_MASK
        if f.nx_huge_pages and access & ACC_EXEC_MASK:
            access &= ~<uint32_t>ACC_EXEC_MASK
            if f.ept:
                access &= ~<uint32_t>ACC_USER_EXEC_MASK
    if access & ACC_READ_MASK:
        spte |= PT_PRESENT_MASK                         # R of EPT is the same bit
    if f.ept:
        if access & ACC_EXEC_MASK:
            spte |= f.xs_mask
        if access & ACC_USER_EXEC_MASK:
            spte |= f.xu_mask
    else:
        if not access & ACC_EXEC_MASK:
            spte |= f.nx_mask
        if access & ACC_USER_MASK:
            spte |= f.user_mask
    spte |= f.memtype_mask
    if q.host_writable:
        spte |= f.host_writable_mask
        if access & ACC_WRITE_MASK and q.may_write:
            spte |= PT_WRITABLE_MASK | f.mmu_writable_mask | f.dirty_mask
    if q.prefetch and not q.synchronizing:
        spte = mark_spte_for_access_track(f, spte)
    return spte


cdef uint64_t make_nonleaf_spte(const spte_format *f, uint64_t hpa, bint ad_disabled) noexcept nogil:
    cdef uint64_t spte = SPTE_MMU_PRESENT_MASK | f.present_mask | f.me_value | hpa
    spte |= PT_PRESENT_MASK | PT_WRITABLE_MASK | f.user_mask | f.xs_mask | f.xu_mask
    return spte | (SPTE_TDP_AD_DISABLED if ad_disabled else f.accessed_mask)


cdef uint64_t make_executable(const spte_format *f, uint64_t spte, uint32_t access) noexcept nogil:
    if not f.ept:
        return spte & ~f.nx_mask
    if access & ACC_EXEC_MASK:
        spte |= f.xs_mask
    if access & ACC_USER_EXEC_MASK:
        spte |= f.xu_mask
    return spte


cdef uint64_t make_small_spte(const spte_format *f, uint64_t huge, uint32_t role, int index) noexcept nogil:
    cdef int level = <int>(role & ROLE_LEVEL_MASK)
    cdef uint32_t access = <uint32_t>((role & ROLE_ACCESS_MASK) >> ROLE_ACCESS_SHIFT)
    cdef uint64_t spte = huge + (<uint64_t>index << (PAGE_SHIFT + PT64_INDEX_BITS * (level - 1)))
    if level == PG_LEVEL_4K:
        spte &= ~PT_PAGE_SIZE_MASK
        if f.nx_huge_pages and access & ACC_EXEC_MASK:
            spte = make_executable(f, spte, access)
    return spte


cdef uint64_t make_huge_spte(const spte_format *f, uint64_t small, int level) noexcept nogil:
    cdef uint64_t low = (<uint64_t>1 << (PAGE_SHIFT + PT64_INDEX_BITS * (level - 1))) - (<uint64_t>1 << PAGE_SHIFT)
    cdef uint64_t spte = (small & ~low) | PT_PAGE_SIZE_MASK
    if f.nx_huge_pages:
        spte = (spte & ~(f.xs_mask | f.xu_mask)) | f.nx_mask
    return spte


cdef uint64_t mark_spte_for_access_track(const spte_format *f, uint64_t spte) noexcept nogil:
    if spte_ad_enabled(spte) or is_access_track_spte(f, spte):
        return spte & ~f.accessed_mask
    spte |= (spte & SPTE_ACC_TRACK_BITS_MASK) << SPTE_ACC_TRACK_SAVED_SHIFT
    return spte & ~(f.acc_track_mask | f.accessed_mask)


cdef uint64_t restore_acc_track_spte(const spte_format *f, uint64_t spte) noexcept nogil:
    cdef uint64_t saved = (spte >> SPTE_ACC_TRACK_SAVED_SHIFT) & SPTE_ACC_TRACK_BITS_MASK
    spte &= ~(f.acc_track_mask | (SPTE_ACC_TRACK_BITS_MASK << SPTE_ACC_TRACK_SAVED_SHIFT))
    return spte | saved


# ---- formats -----------------------------------------------------------------------------------------------------------

cdef void init_spte_format(spte_format *f, host) except *:
    """The layout for a `Host`."""
    memset(f, 0, sizeof(spte_format))
    f.ept = host.tdp == "ept"
    f.maxphyaddr = host.maxphyaddr
    f.max_huge_page_level = host.max_huge_page_level
    f.nx_huge_pages = host.nx_huge_pages
    f.ad = host.ad or not f.ept
    if f.ept:
        f.pml = host.pml
        f.present_mask = EPT_SUPPRESS_VE_MASK
        f.xs_mask = EPT_EXECUTABLE_MASK
        f.xu_mask = EPT_USER_EXECUTABLE_MASK if host.mbec else 0
        f.accessed_mask = EPT_ACCESSED_MASK         # without hardware A/D bits a software bit
        f.dirty_mask = EPT_DIRTY_MASK if f.ad else 0
        f.acc_track_mask = EPT_RWX_MASK | f.xu_mask
        f.host_writable_mask = EPT_SPTE_HOST_WRITABLE
        f.mmu_writable_mask = EPT_SPTE_MMU_WRITABLE
        f.memtype_mask = EPT_MT_WB_MASK | EPT_IPAT_MASK
        f.mmio_caching = True
        f.mmio_value = EPT_MMIO_VALUE
        f.mmio_mask = EPT_RWX_MASK | EPT_SUPPRESS_VE_MASK
    else:
        f.present_mask = PT_PRESENT_MASK
        f.user_mask = PT_USER_MASK
        f.nx_mask = PT64_NX_MASK
        f.accessed_mask = PT_ACCESSED_MASK
        f.dirty_mask = PT_DIRTY_MASK
        f.host_writable_mask = LEGACY_SPTE_HOST_WRITABLE
        f.mmu_writable_mask = LEGACY_SPTE_MMU_WRITABLE
        f.mmio_caching = f.maxphyaddr < GPA_BITS    # a reserved bit is needed
        f.mmio_value = f.mmio_mask = LEGACY_MMIO_VALUE
        f.mmio_access_mask = PT_WRITABLE_MASK | PT_USER_MASK
    if host.l1tf and f.maxphyaddr < GPA_BITS - L1TF_BITS:
        f.l1tf_mask = KVMMU_BITS(f.maxphyaddr - L1TF_BITS, f.maxphyaddr - 1)


cdef void init_permissions(PageFormat fmt, bint tdp, bint ept, bint smep) noexcept:
    cdef permission_params p
    if ept:
        update_ept_permissions(fmt, smep, False)
        return
    p.tdp, p.ept, p.smep = tdp, False, smep
    p.smap = p.shadow_stacks = False
    p.wp = p.nx = True
    fmt.params = p
    fmt.fmt.pkru_mask = 0
    update_permission_bitmask(&fmt.fmt, &p)


cdef void init_legacy_zero_bits(PageFormat fmt, const spte_format *f, int level, bint gbpages) noexcept:
    cdef rsvd_params rsvd
    cdef int bit7, i
    rsvd.level, rsvd.maxphyaddr = level, f.maxphyaddr
    rsvd.nx = rsvd.amd = True
    rsvd.encryption_mask = 0
    rsvd.gbpages = gbpages
    rsvd.pse = False
    rsvd.pse36_bits = 0
    reset_guest_rsvds_bits_mask(&fmt.fmt, &rsvd)
    for bit7 in range(2):
        for i in range(PT_MAX_LEVELS):
            fmt.fmt.rsvd_bits_mask[bit7][i] = (fmt.fmt.rsvd_bits_mask[bit7][i] | f.me_mask) & ~f.me_value


cdef void init_tdp_format(PageFormat fmt, const spte_format *f, int level, bint smep) noexcept:
    init_permissions(fmt, True, f.ept, smep)
    if f.ept:
        reset_ept_rsvds_bits_mask(&fmt.fmt, f.maxphyaddr, False, f.max_huge_page_level)
    else:
        init_legacy_zero_bits(fmt, f, level, f.max_huge_page_level >= PG_LEVEL_1G)


cdef void init_shadow_format(PageFormat fmt, const spte_format *f, int level, bint smep, bint nested, bint execonly,
                             bint gbpages) noexcept:
    init_permissions(fmt, nested, nested and f.ept, smep)
    if nested and f.ept:
        reset_ept_rsvds_bits_mask(&fmt.fmt, f.maxphyaddr, execonly, f.max_huge_page_level)
    else:
        init_legacy_zero_bits(fmt, f, level, gbpages)


# ---- SpteFormat --------------------------------------------------------------------------------------------------------

def _as_u64(name, values):
    """values as a C-contiguous uint64 array of one dimension."""
    refuse_masked(name, values)
    array = np.asarray(values)
    if array.dtype != np.uint64 or array.ndim != 1:
        raise ValueError(f"{name}: want a uint64 array of one dimension, got {array.dtype} of shape {array.shape}")
    return np.ascontiguousarray(array)


def _check_rights(access):
    return check_int("access", access, 0, ACC_ALL)


def _check_level(level):
    return check_int("level", level, 1, PT_MAX_LEVELS)


cdef class SpteFormat:
    """The layout of SPTEs on one host, and what can be asked of entries, one or many.

    Parameters
    ----------
    host : Host

    Notes
    -----
    Arrays are uint64 of shape (n,); the results have one row each. No array is changed.
    """

    def __cinit__(self, host):
        if not isinstance(host, Host):
            raise TypeError(f"host: want a Host, got {type(host).__name__}")
        init_spte_format(&self.f, host)

    def __reduce__(self):
        raise TypeError("a SpteFormat cannot be copied or pickled; make another of the same Host")

    @property
    def masks(self):
        """dict of str to int: every mask of the layout by its name."""
        return {"present": int(self.f.present_mask), "user": int(self.f.user_mask), "nx": int(self.f.nx_mask),
                "xs": int(self.f.xs_mask), "xu": int(self.f.xu_mask), "accessed": int(self.f.accessed_mask),
                "dirty": int(self.f.dirty_mask), "acc_track": int(self.f.acc_track_mask),
                "host_writable": int(self.f.host_writable_mask), "mmu_writable": int(self.f.mmu_writable_mask),
                "memtype": int(self.f.memtype_mask), "mmio_value": int(self.f.mmio_value),
                "mmio": int(self.f.mmio_mask), "mmio_access": int(self.f.mmio_access_mask), "l1tf": int(self.f.l1tf_mask)}

    @property
    def mmio_caching(self):
        """True if an SPTE can mark MMIO."""
        return bool(self.f.mmio_caching)

    def tdp_format(self, level=4, smep=False):
        """The PageFormat of a TdpMmu: permissions and shadow-zero bits. smep: MBEC or GMET is in force."""
        cdef PageFormat fmt = PageFormat()
        init_tdp_format(fmt, &self.f, _check_level(level), check_bool("smep", smep))
        return fmt

    def shadow_format(self, level=4, smep=False, nested=False, execonly=True, gbpages=True):
        """The PageFormat of a shadow MMU; nested: of an EPT12 or NPT12, else of CR3 tables."""
        cdef PageFormat fmt = PageFormat()
        init_shadow_format(fmt, &self.f, _check_level(level), check_bool("smep", smep), check_bool("nested", nested),
                           check_bool("execonly", execonly), check_bool("gbpages", gbpages))
        return fmt

    def make_spte(self, pfn, access, *, role, host_writable=True, may_write=True, prefetch=False, synchronizing=False):
        """One leaf SPTE.

        Parameters
        ----------
        pfn : int
            Host frame.
        access : Acc
        role : int
            Word of the role of the shadow page that it goes into; its level says how large the page is.
        host_writable, may_write, prefetch, synchronizing : bool

        Returns
        -------
        int
        """
        cdef spte_request q
        q.role, q.access = check_word("role", role, 32), _check_rights(access)
        _check_level(q.role & ROLE_LEVEL_MASK)
        q.pfn = check_int("pfn", pfn, 0, (GPA_LIMIT >> PAGE_SHIFT) - 1)
        q.host_writable, q.may_write = check_bool("host_writable", host_writable), check_bool("may_write", may_write)
        q.prefetch, q.synchronizing = check_bool("prefetch", prefetch), check_bool("synchronizing", synchronizing)
        return int(c_make_spte(&self.f, &q))

    def make_nonleaf_spte(self, hpa, ad_disabled=False):
        """The SPTE that points to a page of SPTEs."""
        return int(make_nonleaf_spte(&self.f, check_pages("hpa", hpa, 0, GPA_LIMIT - PAGE_SIZE),
                                     check_bool("ad_disabled", ad_disabled)))

    def make_mmio_sptes(self, gfn, access, gen):
        """MMIO SPTEs (uint64) of frames; access and gen are integers for all of them."""
        gfn = _as_u64("gfn", gfn)
        cdef const uint64_t[::1] frames = gfn
        out = np.empty(gfn.size, np.uint64)
        cdef uint64_t[::1] sptes = out
        cdef Py_ssize_t i
        cdef uint32_t acc = _check_rights(access)
        cdef uint64_t generation = check_scalar_word("gen", gen)
        for i in range(frames.shape[0]):
            sptes[i] = make_mmio_spte(&self.f, frames[i], acc, generation)
        return out

    def mmio(self, spte):
        """Decode MMIO SPTEs: dict of is_mmio (bool), gfn, gen (uint64), access (uint8); zero where an entry is not one."""
        spte = _as_u64("spte", spte)
        cdef const uint64_t[::1] sptes = spte
        columns = {"is_mmio": np.zeros(spte.size, bool), "gfn": np.zeros(spte.size, np.uint64),
                   "gen": np.zeros(spte.size, np.uint64), "access": np.zeros(spte.size, np.uint8)}
        cdef uint8_t[::1] is_mmio = columns["is_mmio"].view(np.uint8)
        cdef uint64_t[::1] gfn = columns["gfn"], gen = columns["gen"]
        cdef uint8_t[::1] access = columns["access"]
        cdef Py_ssize_t i
        for i in range(sptes.shape[0]):
            if is_mmio_spte(&self.f, sptes[i]):
                is_mmio[i] = True
                gfn[i] = get_mmio_spte_gfn(&self.f, sptes[i])
                gen[i] = get_mmio_spte_generation(sptes[i])
                access[i] = <uint8_t>get_mmio_spte_access(&self.f, sptes[i])
        return columns

    def access(self, spte):
        """Rights (`Acc`, uint8) that entries grant."""
        cdef const uint64_t[::1] sptes = _as_u64("spte", spte)
        out = np.empty(sptes.shape[0], np.uint8)
        cdef uint8_t[::1] acc = out
        cdef Py_ssize_t i
        for i in range(sptes.shape[0]):
            acc[i] = <uint8_t>spte_access(&self.f, sptes[i])
        return out

    def permission_fault(self, PageFormat fmt not None, spte, error_code):
        """Return True for each entry that denies the access of a page-fault error code, by the MMU's own format."""
        cdef const uint64_t[::1] sptes = _as_u64("spte", spte)
        out = np.empty(sptes.shape[0], bool)
        cdef uint8_t[::1] fault = out.view(np.uint8)
        cdef uint64_t pfec = check_scalar_word("error_code", error_code)
        cdef Py_ssize_t i
        for i in range(sptes.shape[0]):
            fault[i] = spte_permission_fault(&self.f, &fmt.fmt, sptes[i], pfec)
        return out

    def is_access_tracked(self, spte):
        """Return True for each entry whose rights access tracking has taken away."""
        cdef const uint64_t[::1] sptes = _as_u64("spte", spte)
        out = np.empty(sptes.shape[0], bool)
        cdef uint8_t[::1] tracked = out.view(np.uint8)
        cdef Py_ssize_t i
        for i in range(sptes.shape[0]):
            tracked[i] = is_access_track_spte(&self.f, sptes[i])
        return out

    def mark_for_access_track(self, spte):
        """Entries made old: A cleared, or the rights saved and taken away where A/D bits are off (uint64)."""
        cdef const uint64_t[::1] sptes = _as_u64("spte", spte)
        out = np.empty(sptes.shape[0], np.uint64)
        cdef uint64_t[::1] marked = out
        cdef Py_ssize_t i
        for i in range(sptes.shape[0]):
            marked[i] = mark_spte_for_access_track(&self.f, sptes[i])
        return out

    def restore_access_track(self, spte):
        """Entries with saved rights back in place (uint64); W comes back only by a fast page fault."""
        cdef const uint64_t[::1] sptes = _as_u64("spte", spte)
        out = np.empty(sptes.shape[0], np.uint64)
        cdef uint64_t[::1] restored = out
        cdef Py_ssize_t i
        for i in range(sptes.shape[0]):
            restored[i] = restore_acc_track_spte(&self.f, sptes[i])
        return out

    def split(self, huge, role):
        """The 512 SPTEs that a huge SPTE splits into (uint64), in a page of that role, one level down."""
        out = np.empty(int(SPTE_ENT_PER_PAGE), np.uint64)
        cdef uint64_t[::1] sptes = out
        cdef uint64_t spte = check_scalar_word("huge", huge)
        cdef uint32_t word = check_word("role", role, 32)
        cdef int i
        _check_level(word & ROLE_LEVEL_MASK)
        for i in range(SPTE_ENT_PER_PAGE):
            sptes[i] = c_make_small_spte(&self.f, spte, word, i)
        return out

    def make_huge_spte(self, small, level):
        """The huge SPTE of `level` (2 or 3) around a small one."""
        return int(c_make_huge_spte(&self.f, check_scalar_word("small", small), check_int("level", level, 2, 3)))

    def audit_page(self, PageFormat fmt not None, spte, level, role=0):
        """Return the faults of the entries of a page.

        Parameters
        ----------
        fmt : PageFormat
            The MMU's own.
        spte : ndarray of uint64, shape (n,)
        level : int
        role : int
            Word of the page's role; AD_DISABLED of it is compared with the entries.

        Returns
        -------
        ndarray of uint8, shape (n,)
            0, or a sum of 1 (W, MMU-writable and host-writable contradict each other), 2 (reserved bits), 4 (A/D type is not
            that of the role), 8 (rights saved, yet not taken away), 16 (an executable huge page under the NX mitigation).
            Entries that are not present are right.
        """
        cdef int at = _check_level(level)
        cdef const uint64_t[::1] sptes = _as_u64("spte", spte)
        out = np.zeros(sptes.shape[0], np.uint8)
        cdef uint8_t[::1] bad = out
        cdef uint32_t word = check_word("role", role, 32)
        cdef Py_ssize_t i
        for i in range(sptes.shape[0]):
            bad[i] = audit_spte(&self.f, fmt, sptes[i], at, word)
        return out


cdef uint8_t audit_spte(const spte_format *f, PageFormat fmt, uint64_t spte, int level, uint32_t role) noexcept:
    cdef uint8_t bad = 0
    cdef bint leaf = is_last_spte(spte, level)
    if not is_shadow_present_pte(spte):
        return 0
    if leaf and not check_writable(f, spte):
        bad |= BAD_WRITABLE
    if not is_access_track_spte(f, spte) and is_rsvd_spte(&fmt.fmt, spte, level):
        bad |= BAD_RSVD
    if spte_ad_enabled(spte) == ((role & ROLE_AD_DISABLED_MASK) != 0):
        bad |= BAD_AD_TYPE
    if leaf and f.acc_track_mask and not spte_ad_enabled(spte) and not is_access_track_spte(f, spte) and (
            spte & (SPTE_ACC_TRACK_BITS_MASK << SPTE_ACC_TRACK_SAVED_SHIFT)):
        bad |= BAD_TRACKED
    if leaf and level > PG_LEVEL_4K and f.nx_huge_pages and spte_access(f, spte) & ACC_EXEC_MASK:
        bad |= BAD_NX_HUGE
    return bad
