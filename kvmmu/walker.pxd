"""Translations from Cython and C: cimport this module from an extension of your own.

    from kvmmu.walker cimport STATUS_OK, Walker, translate, translation, walk_handle

    def touch(Walker walker, uint64_t gva):
        cdef walk_handle handle = walker.handle
        cdef translation t
        with nogil:
            t = translate(handle, gva, ACCESS_WRITE_MASK | ACCESS_USER_MASK, True)
            if t.status == STATUS_OK:
                ...                                         # t.gpa, t.level

`translate_fully()` makes the same walk with everything that is known of it: the entry that failed, the fault of the second
stage. It costs several times as much.

Compile with `kvmmu.get_include()` among the include directories, and again for every release of kvmmu: the functions below
are inlined into the extension, and the layout of the structures may change between releases.

A handle is what translations need of one walk, copied at one moment: registers, role, format, second stage, memory slots.
What changes afterwards (`Vcpu.set_regs()`, `GuestMemory.add_slot()`, nested entries and exits ...) counts from the next
`Walker.refresh()` on. The bytes of guest memory are no copy: entries are read where the walk finds them, each time.

Lifetime: a handle is valid as long as its Walker, which keeps the buffers of the memory slots (also of a slot that was removed
since) and the second stage alive. `refresh()` needs the GIL and leaves the handle where it is. The handle of a Walker whose
`__init__()` did not run walks an empty memory: every address faults.

Threads: any number may translate through one handle at a time, with or without the GIL; accessed and dirty bits are set by
compare-and-set. None may while `refresh()` runs.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kvmmu._walk cimport kvm_pagewalk, vcpu_arch, walk_result
from kvmmu.arch._bits cimport (
    ACC_EXEC_MASK, ACC_USER_MASK, ACC_WRITE_MASK, ACCESS_AC_MASK, ACCESS_FETCH_MASK, ACCESS_IMPLICIT_MASK, ACCESS_PROBE_MASK,
    ACCESS_SHADOW_STACK_MASK, ACCESS_USER_MASK, ACCESS_VALID_MASK, ACCESS_WRITE_MASK, INVALID_GPA, STATUS_EPT_MISCONFIG,
    STATUS_EPT_VIOLATION, STATUS_LASS_VIOLATION, STATUS_NESTED_PAGE_FAULT, STATUS_NON_CANONICAL, STATUS_OK, STATUS_PAGE_FAULT,
    STATUS_PML_FULL, STATUS_SPP_EVENT, STATUS_VIRT_EXCEPTION,
)
from kvmmu.arch._format cimport resolved_access
from kvmmu.memory._memory cimport SlotTable
from kvmmu.walk._arguments cimport is_plain_access
from kvmmu.walk._register_sets cimport WalkCopy
from kvmmu.walk._fast cimport kvmmu_translation, fast_walk, translate_fast
from kvmmu.walk.pagewalk cimport PageWalk

cdef struct walk_state:
    kvm_pagewalk w
    fast_walk fast

ctypedef const walk_state *walk_handle


# gpa: INVALID_GPA on a fault. error_code: of a #PF, else 0. status: STATUS_*. level: of the leaf, or of the entry that failed;
# 0 without one
ctypedef kvmmu_translation translation

# Where the short cut does not succeed.
cdef translation translate_slowly(walk_handle handle, uint64_t gva, uint32_t access, bint set_ad) noexcept nogil


cdef inline translation translate(walk_handle handle, uint64_t gva, uint32_t access, bint set_ad) noexcept nogil:
    """Translate one address.

    IN access: ACCESS_* bits; others are ignored. The vCPU's EFLAGS.AC is not added, as in arrays.
    IN set_ad: False suppresses the stores of accessed and dirty bits, and nothing else.
    """
    cdef translation t
    access &= <uint32_t>ACCESS_VALID_MASK
    if is_plain_access(access):
        t = translate_fast(&handle.fast, handle.w.vcpu, gva, access)
        if t.gpa != INVALID_GPA:
            return t
    return translate_slowly(handle, gva, access, set_ad)


cdef inline uint8_t translate_fully(walk_handle handle, uint64_t gva, uint32_t access, bint set_ad,
                                    walk_result *r) noexcept nogil:
    """Translate one address with every column of an array; returns STATUS_*. OUT r: every field, also on a fault."""
    handle.w.gva_to_gpa(&handle.w, gva, resolved_access(access & <uint32_t>ACCESS_VALID_MASK), set_ad, r)
    return r.status


cdef class Walker:
    cdef readonly PageWalk walk
    cdef walk_handle handle
    cdef walk_state state
    cdef vcpu_arch arch                         # of a handle that was never refreshed
    cdef WalkCopy copy                          # these own what the pointers in state lead to
    cdef SlotTable table
    cpdef refresh(self)
