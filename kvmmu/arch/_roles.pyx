"""Roles as Python sees them: `CpuRole` names the bits of a role word; `calc_cpu_roles()` makes words from registers."""

import numpy as np

from libc.stdint cimport uint64_t

from kvmmu.arch._bits cimport (
    ROLE_ACCESS_MASK, ROLE_ACCESS_SHIFT, ROLE_AD_DISABLED_MASK, ROLE_CR0_WP_MASK, ROLE_CR4_SMEP_MASK,
    ROLE_DIRECT_MASK, ROLE_EFER_NX_MASK, ROLE_EXT_CR4_LA57_MASK, ROLE_EXT_CR4_LAM_SUP_MASK, ROLE_EXT_CR4_LASS_MASK,
    ROLE_EXT_CR4_PKE_MASK, ROLE_EXT_CR4_PKS_MASK, ROLE_EXT_CR4_PSE_MASK, ROLE_EXT_CR4_SMAP_MASK, ROLE_EXT_EFER_LMA_MASK,
    ROLE_EXT_EFER_UAIE_MASK, ROLE_EXT_EXECONLY_MASK, ROLE_EXT_HAS_PFERR_FETCH_MASK, ROLE_EXT_SHADOW_STACK_MASK,
    ROLE_EXT_VALID_MASK, ROLE_GUEST_MODE_MASK, ROLE_HAS_4_BYTE_GPTE_MASK, ROLE_INVALID_MASK, ROLE_IS_MIRROR_MASK,
    ROLE_LEVEL_MASK, ROLE_LEVEL_SHIFT, ROLE_PASSTHROUGH_MASK, ROLE_QUADRANT_MASK, ROLE_QUADRANT_SHIFT,
    ROLE_SMAP_ANDNOT_WP_MASK, ROLE_SMM_MASK, ROLE_SMM_SHIFT,
)
from kvmmu.arch._roles cimport calc_cpu_role, kvm_mmu_role_regs

from kvmmu.arch.arguments import check_bool, check_integers, check_word

_ALL_ONES = (1 << 64) - 1
_FLAGS = {
    "has_4_byte_gpte": int(ROLE_HAS_4_BYTE_GPTE_MASK),
    "direct": int(ROLE_DIRECT_MASK),
    "invalid": int(ROLE_INVALID_MASK),
    "efer_nx": int(ROLE_EFER_NX_MASK),
    "cr0_wp": int(ROLE_CR0_WP_MASK),
    "smap_andnot_wp": int(ROLE_SMAP_ANDNOT_WP_MASK),
    "ad_disabled": int(ROLE_AD_DISABLED_MASK),
    "guest_mode": int(ROLE_GUEST_MODE_MASK),
    "passthrough": int(ROLE_PASSTHROUGH_MASK),
    "is_mirror": int(ROLE_IS_MIRROR_MASK),
    "cr4_smep": int(ROLE_CR4_SMEP_MASK),
    "valid": int(ROLE_EXT_VALID_MASK),
    "execonly": int(ROLE_EXT_EXECONLY_MASK),
    "cr4_pse": int(ROLE_EXT_CR4_PSE_MASK),
    "cr4_pke": int(ROLE_EXT_CR4_PKE_MASK),
    "cr4_smap": int(ROLE_EXT_CR4_SMAP_MASK),
    "cr4_la57": int(ROLE_EXT_CR4_LA57_MASK),
    "efer_lma": int(ROLE_EXT_EFER_LMA_MASK),
    "has_pferr_fetch": int(ROLE_EXT_HAS_PFERR_FETCH_MASK),
    "cr4_pks": int(ROLE_EXT_CR4_PKS_MASK),
    "cr4_lass": int(ROLE_EXT_CR4_LASS_MASK),
    "cr4_lam_sup": int(ROLE_EXT_CR4_LAM_SUP_MASK),
    "efer_uaie": int(ROLE_EXT_EFER_UAIE_MASK),
    "shadow_stack": int(ROLE_EXT_SHADOW_STACK_MASK),
}
_NUMBERS = {
    "level": (int(ROLE_LEVEL_MASK), ROLE_LEVEL_SHIFT),
    "quadrant": (int(ROLE_QUADRANT_MASK), ROLE_QUADRANT_SHIFT),
    "access": (int(ROLE_ACCESS_MASK), ROLE_ACCESS_SHIFT),
    "smm": (int(ROLE_SMM_MASK), ROLE_SMM_SHIFT),
}


class CpuRole:
    """The role of a set of guest tables: a packed 64-bit word with named bits. Frozen and hashable.

    Parameters
    ----------
    word : int
        Page role in the low half, extended role in the high half.

    Attributes
    ----------
    word, base, ext : int
        The whole word, its low and its high half.
    level, quadrant, access, smm : int
        Numbers of the page role; `level` is 0 with paging off.
    has_4_byte_gpte, direct, invalid, efer_nx, cr0_wp, smap_andnot_wp, ad_disabled, guest_mode : bool
    passthrough, is_mirror, cr4_smep : bool
        Flags of the page role.
    valid, execonly, cr4_pse, cr4_pke, cr4_smap, cr4_la57, efer_lma, has_pferr_fetch : bool
    cr4_pks, cr4_lass, cr4_lam_sup, efer_uaie, shadow_stack : bool
        Flags of the extended role; `shadow_stack` is the supervisor shadow-stack control of an EPT.
    """

    __slots__ = ("word",)

    def __init__(self, word):
        object.__setattr__(self, "word", check_word("word", word))

    def __setattr__(self, name, value):
        raise AttributeError(f"CpuRole is frozen: cannot set {name}")

    def __delattr__(self, name):
        raise AttributeError(f"CpuRole is frozen: cannot delete {name}")

    @property
    def base(self):
        return self.word & 0xFFFFFFFF

    @property
    def ext(self):
        return self.word >> 32

    def __getattr__(self, name):
        flag = _FLAGS.get(name)
        if flag is not None:
            return bool(self.word & flag)
        if name in _NUMBERS:
            mask, shift = _NUMBERS[name]
            return (self.word & mask) >> shift
        raise AttributeError(f"CpuRole has no {name!r}")

    def __dir__(self):
        return [*object.__dir__(self), *_NUMBERS, *_FLAGS]

    def __eq__(self, other):
        """Equal words of valid roles; a role whose `valid` is clear equals nothing."""
        if not isinstance(other, CpuRole):
            return NotImplemented
        return self.word == other.word and self.valid

    def __hash__(self):
        return hash(self.word)

    def __reduce__(self):
        return CpuRole, (self.word,)

    def __repr__(self):
        flags = " ".join(name for name in _FLAGS if getattr(self, name))
        return f"CpuRole({self.word:#018x}: level {self.level}, {flags})"

    @classmethod
    def from_regs(cls, cr0, cr4, efer, *, smm=False, guest_mode=False):
        """Return the role that CR0, CR4 and EFER make."""
        registers = {"cr0": cr0, "cr4": cr4, "efer": efer}
        return cls(int(calc_cpu_roles(*(check_word(name, value) for name, value in registers.items()), smm=smm,
                                      guest_mode=guest_mode)))


def calc_cpu_roles(cr0, cr4, efer, *, smm=False, guest_mode=False):
    """Role words of one or many register sets.

    Parameters
    ----------
    cr0, cr4, efer : int or array_like of uint64
        Registers; arrays broadcast against each other.
    smm, guest_mode : bool
        Whether the vCPU is in system-management mode, and runs L2.

    Returns
    -------
    numpy.uint64 or ndarray of uint64
        Role words, for `CpuRole`.
    """
    registers = {"cr0": cr0, "cr4": cr4, "efer": efer}
    cr0, cr4, efer = np.broadcast_arrays(*(check_integers(name, values, 0, _ALL_ONES) for name, values in registers.items()))
    cdef bint in_smm = check_bool("smm", smm), in_l2 = check_bool("guest_mode", guest_mode)
    out = np.empty(cr0.shape, np.uint64)
    cdef const uint64_t[::1] cr0s = np.ascontiguousarray(cr0).ravel()
    cdef const uint64_t[::1] cr4s = np.ascontiguousarray(cr4).ravel()
    cdef const uint64_t[::1] efers = np.ascontiguousarray(efer).ravel()
    cdef uint64_t[::1] words = out.reshape(-1)
    cdef Py_ssize_t i
    cdef kvm_mmu_role_regs regs
    for i in range(words.shape[0]):
        regs.cr0 = cr0s[i]
        regs.cr4 = cr4s[i]
        regs.efer = efers[i]
        words[i] = calc_cpu_role(&regs, in_smm, in_l2)
    return out[()]
