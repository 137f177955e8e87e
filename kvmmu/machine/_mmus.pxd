"""Mmu, TdpMmu and ShadowMmu: the builders of a vCPU's host page tables as Python objects."""

from kvmmu.arch._format cimport PageFormat
from kvmmu.machine._modes cimport Modes
from kvmmu.mmu.core._kvm cimport kvm_mmu


cdef class Mmu:
    """A builder of a vCPU's host page tables. Made by a Machine."""
    cdef Modes modes
    cdef kvm_mmu *mmu
    cdef readonly PageFormat fmt
    cdef readonly object w


cdef class TdpMmu(Mmu):
    """Two-dimensional paging, outside of L1's nested paging."""


cdef class ShadowMmu(Mmu):
    """Tables that shadow tables of the guest's."""

cdef TdpMmu new_tdp_mmu(Modes modes)
# IN w: the walk that it shadows
cdef ShadowMmu new_shadow_mmu(Modes modes, w)
# Return how many bits of an address the MMU's tables translate: linear under shadow paging, else guest-physical
cdef int mmu_width(const kvm_mmu *mmu) noexcept
# Raise MemoryError or RuntimeError for a negative errno of the host. IN what: the operation that failed
cdef int raise_errno(int errno, what) except -1
