"""Faults of the guest as exceptions, as `_explain.pxd` describes them."""

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset

from kvmmu._walk cimport cpu_caps, kvm_pagewalk, walk_result, walk_step
from kvmmu.arch._bits cimport (
    INVALID_GPA, PT_MAX_LEVELS, ROLE_DIRECT_MASK, STATUS_LASS_VIOLATION, STATUS_NON_CANONICAL, STATUS_OK, STATUS_PAGE_FAULT,
)
from kvmmu.arch._format cimport PageFormat, explicit_access
from kvmmu.machine._state cimport access_result
from kvmmu.memory._memory cimport SlotTable
from kvmmu.walk._explain cimport rule_of
from kvmmu.walk._register_sets cimport WalkCopy, copy_walk
from kvmmu.walk._second_stage cimport SecondStage, is_npt, second_stage
from kvmmu.walk._setup cimport fill_format, init_pagewalk, use_second_stage
from kvmmu.walk.pagewalk cimport PageWalk

from kvmmu.arch._bits import Access
from kvmmu.arch.faults import fault_of, nested_fault_of


cdef WalkCopy walk_by_other_rules(PageWalk walk, SlotTable table):
    """Return the walk as a processor model of the other conformance makes it."""
    cdef kvm_pagewalk w
    cdef cpu_caps caps = walk.caps, second_caps
    cdef PageFormat fmt = PageFormat()
    cdef SecondStage second = None
    cdef uint64_t role = walk.w.cpu_role
    memset(&w, 0, sizeof(w))
    caps.kvm = not caps.kvm
    if not role & ROLE_DIRECT_MASK:
        fill_format(fmt, role, &caps, False)
    w.fmt = &fmt.fmt
    init_pagewalk(&w, role, walk.w.lam, &caps)
    if walk.second is not None:
        second_caps = caps
        second_caps.npt_host = False
        second = second_stage(walk.second.stage, &second_caps)
        use_second_stage(&w, &second.n, is_npt(second))
    else:
        use_second_stage(&w, NULL, caps.npt_host)
    return copy_walk(&w, walk.vcpu, fmt, second, table)


cdef object fault_of_access(PageWalk gva_walk, uint64_t gva, uint32_t access, const access_result *out):
    cdef SlotTable table = gva_walk.mem.current()
    cdef WalkCopy walk = gva_walk.now(table)
    cdef uint32_t explicit = explicit_access(access)
    cdef walk_step steps[PT_MAX_LEVELS]
    cdef walk_result r
    cdef int n
    walk.w.gva_to_gpa(&walk.w, gva, explicit, False, &r)
    if r.status != out.status:
        walk = walk_by_other_rules(gva_walk, table)
        walk.w.gva_to_gpa(&walk.w, gva, explicit, False, &r)
    n = walk.w.walk_steps(&walk.w, gva & walk.w.gva_mask, explicit, steps)
    rule = "" if r.status == STATUS_OK else rule_of(walk, &r, access)
    entry, entry_gpa = 0, None
    if n:
        entry = int(steps[n - 1].pte)
        entry_gpa = int(steps[n - 1].pte_gpa) if steps[n - 1].pte_gpa != INVALID_GPA else None
    status, address, tried, error_code, level = int(out.status), int(gva), Access(access), int(out.error_code), int(r.level)
    if out.status in (STATUS_PAGE_FAULT, STATUS_NON_CANONICAL, STATUS_LASS_VIOLATION):
        return fault_of(status, address=address, access=tried, error_code=error_code, level=level, entry=entry,
                        entry_gpa=entry_gpa, rule=rule)
    return nested_fault_of(status, address=address, access=tried, error_code=error_code, level=level, entry=entry,
                           entry_gpa=entry_gpa, rule=rule, fault_gpa=int(out.fault_gpa),
                           exit_qualification=int(out.exit_qualification))
