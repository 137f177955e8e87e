"""Mmu, TdpMmu and ShadowMmu: the builders of a vCPU's host page tables as Python objects."""

from libc.errno cimport ENOMEM
from libc.stdint cimport int64_t, uint64_t

from kvmmu.arch._bits cimport GPA_BITS, PAGE_SHIFT, PG_LEVEL_1G, PT64_INDEX_BITS, ROLE_DIRECT_MASK, ROLE_LEVEL_MASK
from kvmmu.arch._format cimport PageFormat
from kvmmu.machine._mmus cimport Mmu, ShadowMmu, TdpMmu
from kvmmu.machine._modes cimport Modes
from kvmmu.machine._roots cimport machine_prepare_root
from kvmmu.machine._state cimport use_arena
from kvmmu.memory._maker cimport maker
from kvmmu.mmu.core._kvm cimport PREV_ROOTS, kvm_mmu, sp_hpa
from kvmmu.mmu.kvm._entry cimport kvm_mmu_page_fault
from kvmmu.mmu.tdp._tdp cimport tdp_page_fault
from kvmmu.walk._arguments cimport check_scalar_word
from kvmmu.walk._vcpu_arch cimport rflags_ac

from kvmmu.arch._bits import RetPf
from kvmmu.arch._roles import CpuRole


cdef int raise_errno(int errno, what) except -1:
    if errno == -ENOMEM:
        raise MemoryError
    if errno < 0:
        raise RuntimeError(f"{what} failed in the host with errno {-errno}")
    return 0


cdef class Mmu:
    """A builder of a vCPU's host page tables.

    Attributes
    ----------
    fmt : PageFormat
        The format of its SPTEs.
    w : PageWalk or None
        The walk whose tables it shadows.
    """

    def __cinit__(self, mark=None, *args):
        if mark is not maker():
            raise TypeError(f"{type(self).__name__} is made by a Vcpu: see Vcpu.tdp_mmu and Vcpu.shadow_mmu")

    def __reduce__(self):
        raise TypeError(f"a {type(self).__name__} cannot be copied or pickled: it is a part of its Vcpu")

    @property
    def root_role(self):
        """The word of the root's role (`CpuRole` has the names of its bits)."""
        return int(self.mmu.root_role)

    @property
    def root_hpa(self):
        """Host-physical address of the root (bytes); None before the first access, and after an invalidation."""
        with self.modes.kvm.lock:
            if not self.mmu.root.valid:
                return None
            return int(sp_hpa(self.modes.kvm.k, self.mmu.root.sp))

    @property
    def prev_roots(self):
        """The roots before the present one that are kept: list of (pgd, host-physical address), the last used first."""
        with self.modes.kvm.lock:
            return [(int(self.mmu.prev_roots[i].pgd), int(sp_hpa(self.modes.kvm.k, self.mmu.prev_roots[i].sp)))
                    for i in range(PREV_ROOTS) if self.mmu.prev_roots[i].valid]

    def page_fault(self, addr, error_code):
        """Handle one fault, as an exit would bring it.

        Parameters
        ----------
        addr : int
            Bytes: guest-physical under two-dimensional paging, L2's guest-physical under L1's, else linear.
        error_code : int
            As of a #PF or #NPF, or as KVM decodes an EPT violation.

        Returns
        -------
        RetPf
            RETRY also for a fault that is the guest's own: an access there would raise it.

        Raises
        ------
        ValueError
            The MMU is not the active one, or the address is wider than its tables translate, or not canonical.
        """
        cdef Modes modes = self.modes
        cdef uint64_t gpa = check_scalar_word("addr", addr), code = check_scalar_word("error_code", error_code)
        cdef int ret = 0
        with modes.kvm.lock:
            modes.update()
            if self.mmu != modes.m.mmu:
                raise ValueError(f"{type(self).__name__} is not in use: the active one is `mmu`")
            check_width(self.mmu, gpa)
            modes.enter()
            if machine_prepare_root(&modes.m):
                raise MemoryError
            modes.m.vcpu.eflags_ac = rflags_ac(&modes.arch.arch)
            ret = kvm_mmu_page_fault(modes.m.vcpu, gpa, code)
            modes.m.vcpu.injected = False
            use_arena(&modes.m)
        raise_errno(ret, f"the fault at {gpa:#x}")
        return RetPf(ret)

    def __repr__(self):
        return f"<{type(self).__name__} root_role {CpuRole(self.root_role)!r}>"


cdef int mmu_width(const kvm_mmu *mmu) noexcept:
    """Return how many bits of an address the MMU's tables translate: linear under shadow paging, else guest-physical."""
    if mmu.page_fault == tdp_page_fault:
        return min(PAGE_SHIFT + PT64_INDEX_BITS * <int>(mmu.root_role & ROLE_LEVEL_MASK), <int>GPA_BITS)
    if mmu.root_role & ROLE_DIRECT_MASK or mmu.w.level <= PG_LEVEL_1G:
        return 32
    if mmu.w.is_nested:
        return min(PAGE_SHIFT + PT64_INDEX_BITS * mmu.w.level, <int>GPA_BITS)
    return PAGE_SHIFT + PT64_INDEX_BITS * mmu.w.level


cdef int check_width(const kvm_mmu *mmu, uint64_t addr) except -1:
    """ValueError for an address that the MMU's tables cannot translate: its low bits would be mapped in its place."""
    cdef int width = mmu_width(mmu), rest = 64 - width
    if not mmu.root_role & ROLE_DIRECT_MASK and not mmu.w.is_nested and mmu.w.level > PG_LEVEL_1G:
        if <uint64_t>(<int64_t>(addr << rest) >> rest) != addr:
            raise ValueError(f"addr: {addr:#x} is not canonical for the {width} bits that this MMU's tables translate")
    elif addr >> width:
        raise ValueError(f"addr: this MMU's tables translate {width} bits, got {addr:#x}")
    return 0


cdef class TdpMmu(Mmu):
    """The builder of a vCPU's host page tables under two-dimensional paging, but for guests under L1's nested paging.

    Its `w` is None: a fault of these tables needs no walk of the guest's.
    """


cdef class ShadowMmu(Mmu):
    """The builder of tables that shadow tables of the guest's: those of CR3 without two-dimensional paging, else L1's EPT or NPT.

    Its `w` is `gva_walk` without two-dimensional paging, else `ngpa_walk`.
    """


cdef int adopt(Mmu mmu, Modes modes, kvm_mmu *state, PageFormat fmt, w) except -1:
    mmu.modes, mmu.mmu, mmu.fmt, mmu.w = modes, state, fmt, w
    return 0


cdef TdpMmu new_tdp_mmu(Modes modes):
    cdef TdpMmu mmu = TdpMmu.__new__(TdpMmu, maker())
    adopt(mmu, modes, &modes.m.vcpu.root_mmu, modes.tdp_fmt, None)
    return mmu


cdef ShadowMmu new_shadow_mmu(Modes modes, w):
    cdef ShadowMmu mmu = ShadowMmu.__new__(ShadowMmu, maker())
    adopt(mmu, modes, &modes.m.vcpu.guest_mmu if modes.kvm.k.tdp_enabled else &modes.m.vcpu.root_mmu, modes.shadow_fmt, w)
    return mmu
