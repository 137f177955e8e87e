# SPDX-License-Identifier: Apache-2.0
"""What a replay reports of accesses, counted from their scalar walks."""

from kvmmu import Status
from kvmmu.traces import Op

NAMES = ("paging off", "4K", "2M", "1G")            # of page sizes, by the level of the leaf


def op_of(access):
    """Return the op of a row with an access byte."""
    return Op.STORE if access & 2 else Op.FETCH if access & 16 else Op.LOAD


def count_walk(walk, sizes, faults):
    """Count the walk of one row, a Translation, in the page sizes of a report or in its faults."""
    if walk.status[0] == Status.OK:
        sizes[NAMES[walk.level[0]]] += 1
    elif walk.status[0] == Status.PAGE_FAULT:
        faults[hex(walk.error_code[0])] += 1
    else:
        faults[Status(walk.status[0]).name] += 1
