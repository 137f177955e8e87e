"""PageFormat: permission bitmasks, protection-key mask and reserved bits, built from roles in plain code.

Sources: SDM vol. 3, "Access Rights", "Protection Keys", "Hierarchical Paging Structures: an Overview" and "EPT
Misconfigurations"; APM vol. 2, "Page-Protection Checks" and "Nested Paging".
"""

import numpy as np

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset

from kvmmu.arch._bits cimport (
    ACC_ALL, ACC_EXEC_MASK, ACC_READ_MASK, ACC_SHADOW_STACK_MASK, ACC_USER_EXEC_MASK, ACC_USER_MASK, ACC_WRITE_MASK,
    ACCESS_AC_MASK, ACCESS_FETCH_MASK, ACCESS_PFEC_MASK, ACCESS_PLAIN_MASK, ACCESS_PROBE_MASK, ACCESS_SHADOW_STACK_MASK,
    ACCESS_USER_MASK, ACCESS_VALID_MASK, ACCESS_WRITE_MASK, EPT_1G_RSVD_MASK, EPT_2M_RSVD_MASK, EPT_EXECUTABLE_MASK,
    EPT_MT_SHIFT, EPT_READABLE_MASK, EPT_TABLE_RSVD_MASK, EPT_WRITABLE_MASK, GPA_BITS, KVMMU_BITS, MAXPHYADDR_MAX,
    MAXPHYADDR_MIN, PAE_PDPTE_RSVD_MASK, PAE_RSVD_LIMIT_SHIFT, PERMISSIONS_COUNT, PERMISSIONS_INDEX_SHIFT, PFERR_RSVD_MASK,
    PG_LEVEL_1G, PG_LEVEL_2M, PG_LEVEL_4K, PKRU_AD_MASK, PKRU_KEYS, PKRU_WD_MASK, PT32_4M_RSVD_LAST_SHIFT, PT32_PSE36_SHIFT,
    PT64_1G_RSVD_MASK, PT64_2M_RSVD_MASK, PT64_NX_MASK, PT64_PKEY_MASK, PT_AMD_MBZ_MASK, PT_MAX_LEVELS, PT_PAGE_SIZE_MASK,
)
from kvmmu.arch._format cimport (
    KVMMU_ACCESS_BYTES, KVMMU_ACCESS_INFO_SHIFT, KVMMU_ACCESS_KEYS_SHIFT, KVMMU_ACCESS_KEYS_USER_SHIFT, explicit_access,
    key_registers, kvm_page_format, kvmmu_bad_mt_xwr, kvmmu_rsvd_bits, permission_params, resolved_access, rsvd_params,
)
from kvmmu.arch._format cimport permission_fault as c_permission_fault

from kvmmu.arch.arguments import check_bool, check_bools, check_int, check_integers, check_word


# ---- permissions ------------------------------------------------------------------------------------------------------

cdef bint is_denied(const permission_params *p, uint64_t acc, uint64_t access) noexcept nogil:
    """True if rights acc (ACC_*) deny the access: one rule after the other, as the manuals tell them."""
    cdef bint write = (access & ACCESS_WRITE_MASK) != 0
    cdef bint user = (access & ACCESS_USER_MASK) != 0
    cdef bint fetch = (access & ACCESS_FETCH_MASK) != 0
    cdef bint acc_user = (acc & ACC_USER_MASK) != 0
    cdef bint acc_exec = (acc & ACC_EXEC_MASK) != 0

    if access & ACCESS_PROBE_MASK:
        return False
    if access & ACCESS_SHADOW_STACK_MASK and p.shadow_stacks and not (p.ept and user):
        return not acc & ACC_SHADOW_STACK_MASK or not acc & ACC_READ_MASK or (user != acc_user and not p.ept)
    if not write and not fetch and not acc & ACC_READ_MASK:
        return True
    if p.ept:
        if write and not acc & ACC_WRITE_MASK:
            return True
        if fetch and p.smep and user:                               # MBEC: user-mode addresses have their own right
            return not acc & ACC_USER_EXEC_MASK
        return fetch and not acc_exec
    if write and not acc & ACC_WRITE_MASK and (p.wp or user):
        return True
    if user and not acc_user and not (p.tdp and p.smep):            # GMET: U/S only restricts supervisor fetches
        return True
    if fetch and p.nx and not acc_exec:
        return True
    if fetch and p.smep and not user and acc_user:
        return True
    return p.smap and acc_user and not user and not fetch and not access & ACCESS_AC_MASK


cdef uint64_t access_info(const kvm_page_format *fmt, const permission_params *p, uint32_t access) noexcept nogil:
    """Return all that a format says of one access: see `_format.h`."""
    cdef uint64_t acc, info = <uint64_t>access << KVMMU_ACCESS_INFO_SHIFT
    cdef uint64_t pfec = access & ACCESS_PFEC_MASK, keys = 0
    for acc in range((ACC_ALL | ACC_SHADOW_STACK_MASK) + 1):
        if is_denied(p, acc, access):
            info |= <uint64_t>1 << acc
    if not access & ACCESS_PROBE_MASK:
        keys = (fmt.pkru_mask >> pfec) & 3
        keys |= <uint64_t>((fmt.pkru_mask >> (pfec | PFERR_RSVD_MASK)) & 3) << KVMMU_ACCESS_KEYS_USER_SHIFT
    return info | keys << KVMMU_ACCESS_KEYS_SHIFT


cdef void update_permission_bitmask(kvm_page_format *fmt, const permission_params *p) noexcept nogil:
    cdef uint32_t access
    for access in range(KVMMU_ACCESS_BYTES):
        if access == resolved_access(access):
            fmt.access_info[access] = access_info(fmt, p, access)
    for access in range(KVMMU_ACCESS_BYTES):
        fmt.access_info[access] = fmt.access_info[resolved_access(access)]
    for access in range(PERMISSIONS_COUNT):
        fmt.permissions[access] = <uint16_t>fmt.access_info[access << PERMISSIONS_INDEX_SHIFT]


cdef void update_ept_permissions(PageFormat fmt, bint mbec, bint supervisor_shadow_stack) noexcept:
    cdef permission_params p
    p.tdp = p.ept = p.wp = p.nx = True
    p.smep, p.smap, p.shadow_stacks = mbec, False, supervisor_shadow_stack
    fmt.params = p
    fmt.fmt.pkru_mask = 0
    update_permission_bitmask(&fmt.fmt, &p)


cdef void update_pkru_bitmask(kvm_page_format *fmt, bint pke, bint pks, bint wp) noexcept nogil:
    """Protection keys guard data accesses: PKRU to user pages, PKRS to supervisor pages. Write-disable binds a supervisor only
    under CR0.WP, and PKRS everybody only under it."""
    cdef uint64_t pfec, denied
    cdef bint user_page
    fmt.pkru_mask = 0
    for pfec in range(0, 32, 2):
        user_page = (pfec & PFERR_RSVD_MASK) != 0       # RSVD stands for "the page is a user page"
        if pfec & ACCESS_FETCH_MASK or not (pke if user_page else pks):
            continue
        denied = PKRU_AD_MASK
        if pfec & ACCESS_WRITE_MASK and (wp or (user_page and pfec & ACCESS_USER_MASK)):
            denied |= PKRU_WD_MASK
        fmt.pkru_mask |= <uint32_t>(denied << pfec)


# ---- reserved bits ----------------------------------------------------------------------------------------------------

cdef uint64_t bits_from(int first, int last) noexcept nogil:
    """Bits first through last, none if first > last."""
    return KVMMU_BITS(first, last) if first <= last else 0


cdef void set_rsvd(kvm_page_format *fmt, int level, uint64_t table, uint64_t large) noexcept nogil:
    """IN table, large: reserved bits of an entry of this level whose bit 7 is 0, 1."""
    fmt.rsvd_bits_mask[0][level - 1] = table
    fmt.rsvd_bits_mask[1][level - 1] = large


cdef void reset_guest_rsvds_bits_mask(kvm_page_format *fmt, const rsvd_params *p) noexcept nogil:
    cdef uint64_t high, upper, gb7 = 0 if p.gbpages else PT_PAGE_SIZE_MASK
    memset(fmt.rsvd_bits_mask, 0, sizeof(fmt.rsvd_bits_mask))
    fmt.bad_mt_xwr = 0
    if p.level == 2:
        if p.pse:
            fmt.rsvd_bits_mask[1][1] = bits_from(PT32_PSE36_SHIFT + p.pse36_bits, PT32_4M_RSVD_LAST_SHIFT)
        return

    high = bits_from(p.maxphyaddr, PAE_RSVD_LIMIT_SHIFT if p.level == 3 else GPA_BITS - 1) & ~p.encryption_mask
    if not p.nx:
        high |= PT64_NX_MASK
    set_rsvd(fmt, 1, high, high)
    set_rsvd(fmt, 2, high, high | PT64_2M_RSVD_MASK)
    if p.level == 3:
        set_rsvd(fmt, 3, high | PT64_NX_MASK | PAE_PDPTE_RSVD_MASK, 0)
        return
    set_rsvd(fmt, 3, high | gb7, high | gb7 | PT64_1G_RSVD_MASK)
    upper = high | PT_PAGE_SIZE_MASK
    if p.amd:
        upper |= PT_AMD_MBZ_MASK
    set_rsvd(fmt, 4, upper, upper)
    if p.level == 5:
        set_rsvd(fmt, 5, upper, upper)


cdef bint is_bad_mt_xwr(uint64_t low_bits, bint execonly) noexcept nogil:
    """True if memory type and rights (entry bits 5:0) are an EPT misconfiguration."""
    cdef uint64_t mt = low_bits >> EPT_MT_SHIFT
    cdef uint64_t xwr = low_bits & (EPT_READABLE_MASK | EPT_WRITABLE_MASK | EPT_EXECUTABLE_MASK)
    if mt == 2 or mt == 3 or mt == 7:
        return True
    if xwr & EPT_WRITABLE_MASK and not xwr & EPT_READABLE_MASK:
        return True
    return xwr == EPT_EXECUTABLE_MASK and not execonly


cdef void reset_ept_rsvds_bits_mask(kvm_page_format *fmt, int maxphyaddr, bint execonly, int huge_page_level) noexcept nogil:
    cdef uint64_t high = bits_from(maxphyaddr, GPA_BITS - 1), low_bits
    cdef uint64_t g7 = PT_PAGE_SIZE_MASK if huge_page_level < PG_LEVEL_1G else 0
    cdef uint64_t m7 = PT_PAGE_SIZE_MASK if huge_page_level < PG_LEVEL_2M else 0
    cdef uint64_t upper = high | EPT_TABLE_RSVD_MASK | PT_PAGE_SIZE_MASK
    set_rsvd(fmt, 5, upper, upper)
    set_rsvd(fmt, 4, upper, upper)
    set_rsvd(fmt, 3, high | EPT_TABLE_RSVD_MASK | g7, high | EPT_1G_RSVD_MASK | g7)
    set_rsvd(fmt, 2, high | EPT_TABLE_RSVD_MASK | m7, high | EPT_2M_RSVD_MASK | m7)
    set_rsvd(fmt, 1, high, high)
    fmt.bad_mt_xwr = 0
    for low_bits in range(64):
        if is_bad_mt_xwr(low_bits, execonly):
            fmt.bad_mt_xwr |= <uint64_t>1 << low_bits


# ---- arrays -----------------------------------------------------------------------------------------------------------

# steps: for each array 1, or 0 where its one element stands for all. What indexes a table is masked, although the arrays were
# checked: another thread may write to them.

cdef void find_faults(const kvm_page_format *fmt, const uint8_t *acc, const uint8_t *access, const Py_ssize_t *steps,
                      uint8_t *out, Py_ssize_t n) noexcept nogil:
    """Set out[i] to 1 where rights deny an access, else to 0."""
    cdef Py_ssize_t i
    for i in range(n):
        out[i] = fmt.access_info[access[i * steps[1]]] >> (acc[i * steps[0]] & ACC_ALL) & 1


cdef void find_permission_faults(const kvm_page_format *fmt, uint64_t keys, const uint8_t *acc, const uint8_t *key,
                                 const uint8_t *access, const Py_ssize_t *steps, uint32_t *out, Py_ssize_t n) noexcept nogil:
    """Set out[i] to what permission_fault() returns."""
    cdef uint32_t rights, pkey
    cdef Py_ssize_t i
    for i in range(n):
        rights, pkey = acc[i * steps[0]] & <uint32_t>ACC_ALL, key[i * steps[1]] & <uint32_t>PT64_PKEY_MASK
        out[i] = c_permission_fault(fmt, keys, rights, pkey, access[i * steps[2]])


cdef void find_malformed(const kvm_page_format *fmt, const uint64_t *pte, const uint8_t *level, const Py_ssize_t *steps,
                         uint8_t *out, Py_ssize_t n) noexcept nogil:
    """Set out[i] to 1 where an entry, taken as present, is malformed, else to 0."""
    cdef uint64_t masks[2][8]
    cdef uint64_t entry
    cdef unsigned int index
    cdef Py_ssize_t i
    for index in range(8):
        masks[0][index] = fmt.rsvd_bits_mask[0][index] if index < PT_MAX_LEVELS else 0
        masks[1][index] = fmt.rsvd_bits_mask[1][index] if index < PT_MAX_LEVELS else 0
    for i in range(n):
        entry, index = pte[i * steps[0]], (level[i * steps[1]] - 1) & 7
        out[i] = (kvmmu_rsvd_bits(masks[0][index], masks[1][index], entry) | kvmmu_bad_mt_xwr(fmt.bad_mt_xwr, entry)) != 0


# ---- for Python -------------------------------------------------------------------------------------------------------

def _check_access(access):
    """access as an array of uint8."""
    access = check_integers("access", access, 0, 0xFF, np.uint8, copy=False)
    allowed = int(ACCESS_PLAIN_MASK)
    if access.size and int(np.bitwise_or.reduce(access, axis=None)) & ~allowed:
        bad = access[(access & np.uint8(~allowed & 0xFF)) != 0]
        raise ValueError(f"access: {int(bad.flat[0]):#x} has a bit that is none of WRITE USER AC FETCH IMPLICIT ({allowed:#x})")
    return access


def _check_rights(pte_access):
    return check_integers("pte_access", pte_access, 0, ACC_ALL, np.uint8, copy=False)


cdef list flat_columns(list arrays, tuple shape, Py_ssize_t *steps):
    """Return arrays that broadcast to shape as contiguous ones of one dimension, which have all elements or one. OUT steps."""
    cdef list flat = []
    cdef Py_ssize_t i
    for i, array in enumerate(arrays):
        steps[i] = array.size != 1
        flat.append((array if array.shape == shape or not steps[i] else np.broadcast_to(array, shape)).ravel())
    return flat


cdef class PageFormat:
    """The meaning of the entries of one set of page tables (kvm_page_format).

    A walk owns one for the guest's tables; `PageFormat()` is empty, the class methods build the tables alone.

    Attributes
    ----------
    permissions : ndarray of uint16, shape (16,)
        Index: an access shifted right by one. Bit n set: rights n (`Acc`) do not allow it.
    pkru_mask : int
        AD and WD that matter, two bits per error code (with U of the translation as bit 3): of PKRU for user pages, of PKRS for
        the others.
    rsvd_bits_mask : ndarray of uint64, shape (2, 5)
        Index: bit 7 of the entry, level - 1. Bits that must be zero.
    bad_mt_xwr : int
        EPT only: bit n set: entries whose low six bits are n are malformed.
    """

    def __repr__(self):
        rows = self.rsvd_bits_mask.tolist()
        reserved = ", ".join(f"{size} {rows[bit7][level - 1]:#x}" for size, bit7, level in
                             (("4K", 0, PG_LEVEL_4K), ("2M", 1, PG_LEVEL_2M), ("1G", 1, PG_LEVEL_1G)))
        return f"<PageFormat: reserved bits of a {reserved} page>"

    @property
    def permissions(self):
        return np.array([self.fmt.permissions[i] for i in range(PERMISSIONS_COUNT)], np.uint16)

    @property
    def pkru_mask(self):
        return int(self.fmt.pkru_mask)

    @property
    def rsvd_bits_mask(self):
        return np.array([[self.fmt.rsvd_bits_mask[bit7][i] for i in range(PT_MAX_LEVELS)] for bit7 in range(2)], np.uint64)

    @property
    def bad_mt_xwr(self):
        return int(self.fmt.bad_mt_xwr)

    @staticmethod
    def permission_bitmask(*, tdp=False, ept=False, smep=False, smap=False, wp=True, nx=True):
        """Return the tables that update_permission_bitmask() makes of these parameters.

        Parameters
        ----------
        tdp, ept, smep, smap, wp, nx : bool or array_like of bool
            The form (ept: EPT entries; tdp without ept: NPT) and the controls; arrays broadcast. `smep` is MBEC in the ept
            form and GMET in the tdp form.

        Returns
        -------
        ndarray of uint16, shape (..., 16)
            `permissions` for each combination.
        """
        flags = {"tdp": tdp, "ept": ept, "smep": smep, "smap": smap, "wp": wp, "nx": nx}
        columns = np.broadcast_arrays(*(check_bools(name, values) for name, values in flags.items()))
        rows = np.stack([column.ravel() for column in columns], axis=1)
        out = np.empty((rows.shape[0], PERMISSIONS_COUNT), np.uint16)
        cdef kvm_page_format fmt
        cdef permission_params p
        for i, row in enumerate(rows.tolist()):
            p.tdp, p.ept, p.smep, p.smap, p.wp, p.nx = row
            p.shadow_stacks, fmt.pkru_mask = False, 0
            update_permission_bitmask(&fmt, &p)
            out[i] = [fmt.permissions[index] for index in range(PERMISSIONS_COUNT)]
        return out.reshape(columns[0].shape + (PERMISSIONS_COUNT,))

    @staticmethod
    def pkru_bitmask(*, pke=True, wp=True, pks=False):
        """`pkru_mask` for CR4.PKE, CR4.PKS (both in long mode) and CR0.WP."""
        cdef kvm_page_format fmt
        update_pkru_bitmask(&fmt, check_bool("pke", pke), check_bool("pks", pks), check_bool("wp", wp))
        return int(fmt.pkru_mask)

    @staticmethod
    def guest_rsvd_bits(level, *, maxphyaddr, nx=True, gbpages=True, pse=True, pse36_bits=0, amd=False):
        """`rsvd_bits_mask` of guest tables.

        Parameters
        ----------
        level : int
            Of the root: 2 (32-bit), 3 (PAE), 4 or 5.
        maxphyaddr : int
            32 to 52.
        nx, gbpages, pse, amd : bool
            EFER.NXE; 1G pages by CPUID; CR4.PSE; an AMD processor (bit 8 of PML4E and PML5E must be zero).
        pse36_bits : int
            Physical-address bits above 31 that a 4M PDE holds, 0 to 8.

        Returns
        -------
        ndarray of uint64, shape (2, 5)
        """
        cdef rsvd_params p
        p.level = check_int("level", level, 2, 5)
        p.maxphyaddr = check_int("maxphyaddr", maxphyaddr, MAXPHYADDR_MIN, MAXPHYADDR_MAX)
        p.nx, p.gbpages, p.pse = check_bool("nx", nx), check_bool("gbpages", gbpages), check_bool("pse", pse)
        p.pse36_bits, p.amd = check_int("pse36_bits", pse36_bits, 0, 8), check_bool("amd", amd)
        p.encryption_mask = 0
        cdef PageFormat self = PageFormat()
        reset_guest_rsvds_bits_mask(&self.fmt, &p)
        return self.rsvd_bits_mask

    @staticmethod
    def ept_rsvd_bits(*, maxphyaddr, execonly=True, huge_page_level=3):
        """(`rsvd_bits_mask`, `bad_mt_xwr`) of EPT tables; huge_page_level: 1 4K only, 2 up to 2M, 3 up to 1G."""
        cdef PageFormat self = PageFormat()
        reset_ept_rsvds_bits_mask(&self.fmt, check_int("maxphyaddr", maxphyaddr, MAXPHYADDR_MIN, MAXPHYADDR_MAX),
                                  check_bool("execonly", execonly), check_int("huge_page_level", huge_page_level, 1, 3))
        return self.rsvd_bits_mask, self.bad_mt_xwr

    def is_fault(self, pte_access, access):
        """True if rights deny an access, protection keys aside.

        Parameters
        ----------
        pte_access : int or array_like
            Rights (`Acc`), 0 to 15.
        access : Access or array_like
            Broadcasts against `pte_access`.

        Returns
        -------
        bool or ndarray of bool
        """
        arrays = [_check_rights(pte_access), _check_access(access)]
        cdef Py_ssize_t steps[2]
        shape = np.broadcast(*arrays).shape
        cdef const uint8_t[::1] acc, asked
        acc, asked = flat_columns(arrays, shape, steps)
        fault = np.empty(shape, bool)
        cdef uint8_t[::1] out = fault.reshape(-1).view(np.uint8)
        if fault.size:
            find_faults(&self.fmt, &acc[0], &asked[0], steps, &out[0], out.shape[0])
        return fault if shape else bool(fault)

    def is_rsvd_bits_set(self, pte, level):
        """True if an entry, taken as present, is malformed: a reserved bit, or in EPT a bad memory type or XWR.

        Parameters
        ----------
        pte : int or array_like of uint64
            Entries.
        level : int or array_like
            Their levels, 1 to 5.

        Returns
        -------
        bool or ndarray of bool
        """
        arrays = [check_integers("pte", pte, 0, (1 << 64) - 1, copy=False),
                  check_integers("level", level, 1, PT_MAX_LEVELS, np.uint8, copy=False)]
        cdef Py_ssize_t steps[2]
        shape = np.broadcast(*arrays).shape
        cdef const uint64_t[::1] entries
        cdef const uint8_t[::1] levels
        entries, levels = flat_columns(arrays, shape, steps)
        bad = np.empty(shape, bool)
        cdef uint8_t[::1] out = bad.reshape(-1).view(np.uint8)
        if bad.size:
            find_malformed(&self.fmt, &entries[0], &levels[0], steps, &out[0], out.shape[0])
        return bad if shape else bool(bad)

    def permission_fault(self, pte_access, pkey, access, pkru, pkrs=0):
        """P or P|PK where rights, or the key register of the page, deny an access; 0 where they allow it (uint32, broadcast)."""
        arrays = [_check_rights(pte_access), check_integers("pkey", pkey, 0, PKRU_KEYS - 1, np.uint8, copy=False)]
        cdef uint64_t registers = key_registers(check_word("pkru", pkru, 32), check_word("pkrs", pkrs, 32))
        arrays.append(_check_access(access))
        cdef Py_ssize_t steps[3]
        shape = np.broadcast(*arrays).shape
        cdef const uint8_t[::1] acc, keys, asked
        acc, keys, asked = flat_columns(arrays, shape, steps)
        fault = np.empty(shape, np.uint32)
        cdef uint32_t[::1] out = fault.reshape(-1)
        if fault.size:
            find_permission_faults(&self.fmt, registers, &acc[0], &keys[0], &asked[0], steps, &out[0], out.shape[0])
        return fault[()]

    def rule(self, pte_access, access, pkey_denied=False, shadow_stack=False):
        """Return the first rule by which rights deny an access: read, write, user, nx, smep, smap, shadow-stack or pkey; None if
        none does.

        shadow_stack: the entries make a shadow-stack address; it counts for accesses to shadow stacks alone.
        """
        cdef uint64_t acc = check_int("pte_access", pte_access, 0, ACC_ALL)
        cdef uint32_t a = check_int("access", access, 0, 0xFF)
        if a & ~ACCESS_VALID_MASK:
            raise ValueError(f"access: {a:#x} has a bit that is no Access bit")
        a = explicit_access(a)
        acc |= ACC_SHADOW_STACK_MASK if check_bool("shadow_stack", shadow_stack) else 0
        cdef bint denied_by_key = check_bool("pkey_denied", pkey_denied)
        cdef bint user = (a & ACCESS_USER_MASK) != 0
        if is_denied(&self.params, acc, a):
            if a & ACCESS_SHADOW_STACK_MASK and self.params.shadow_stacks and not (self.params.ept and user):
                return "user" if user and acc & ACC_SHADOW_STACK_MASK else "shadow-stack"
            if not a & (ACCESS_WRITE_MASK | ACCESS_FETCH_MASK) and not acc & ACC_READ_MASK:
                return "read"
            if a & ACCESS_WRITE_MASK and not acc & ACC_WRITE_MASK and (self.params.ept or self.params.wp or user):
                return "write"
            if user and not acc & ACC_USER_MASK and not self.params.ept and not (self.params.tdp and self.params.smep):
                return "user"
            if a & ACCESS_FETCH_MASK:
                if self.params.ept or self.params.nx and not acc & ACC_EXEC_MASK:
                    return "nx"
                return "smep"
            return "smap"
        return "pkey" if denied_by_key else None
