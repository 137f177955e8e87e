"""The columns of batch translations; see `_columns.pxd`."""

import numpy as np

from kvmmu._walk cimport walk_result


cdef dict fields():
    cdef walk_result r
    cdef char *start = <char *>&r
    return {
        "gpa": (<char *>&r.gpa - start, sizeof(r.gpa), True),
        "status": (<char *>&r.status - start, sizeof(r.status), True),
        "error_code": (<char *>&r.error_code - start, sizeof(r.error_code), True),
        "level": (<char *>&r.level - start, sizeof(r.level), True),
        "pte": (<char *>&r.pte - start, sizeof(r.pte), True),
        "pte_gpa": (<char *>&r.pte_gpa - start, sizeof(r.pte_gpa), False),
        "pte_access": (<char *>&r.pte_access - start, sizeof(r.pte_access), True),
        "refs": (<char *>&r.refs - start, sizeof(r.refs), True),
        "ngpa": (<char *>&r.ngpa - start, sizeof(r.ngpa), True),
        "fault_gpa": (<char *>&r.fault_gpa - start, sizeof(r.fault_gpa), True),
        "exit_qualification": (<char *>&r.exit_qualification - start, sizeof(r.exit_qualification), True),
    }


FIELDS = fields()
COLUMNS = {name: np.dtype(f"u{size}") for name, (_, size, _) in FIELDS.items()}
