"""Compare the records of two machines that ran one scenario."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

__all__ = ["SEEN_BY_THE_GUEST", "TRUSTED", "differences"]

# Counters that a host does not disturb.
TRUSTED = (
    "mmu_cache_miss", "mmu_shadow_zapped", "mmu_recycled", "mmu_flooded", "mmu_pde_zapped", "mmu_unsync", "mmu_pte_write",
    "pages_4k", "pages_2m", "pages_1g", "pf_taken", "pf_fixed", "pf_spurious", "pf_emulate", "pf_guest", "invlpg",
    "remote_tlb_flush_requests", "max_mmu_rmap_size", "mmio_exits")
SEEN_BY_THE_GUEST = ("result", "val", "ptes", "dirty_gfns")
# The work of these is done at the next entry of the guest; an interrupt of the host can bring that entry forward.
_DEFERRING = ("cr3", "cr0", "cr4", "efer")

Records = Sequence[dict[str, Any]]


def differences(ops: Records, expected: Records, actual: Records,
                counters: Sequence[str] = TRUSTED) -> list[tuple[int, str, Any, Any]]:
    """Return where two lists of records differ: (index, what, expected, actual).

    What `expected` calls undetermined does not count.
    """
    found: list[tuple[int, str, Any, Any]] = []
    if actual and actual[-1]["result"][0] == "code":        # the guest goes on with code that is not carried out here
        expected, actual = expected[:len(actual) - 1], actual[:-1]
    if len(expected) != len(actual):
        found.append((min(len(expected), len(actual)), "records", len(expected), len(actual)))
    skip = set()
    for i, (op, want, got) in enumerate(zip(ops, expected, actual, strict=False)):
        for what in SEEN_BY_THE_GUEST:
            if what not in want.get("nondet", ()) and want.get(what) != got.get(what):
                found.append((i, what, want.get(what), got.get(what)))
        if i in skip:
            continue
        wants: Counter[str] = Counter(want["delta"])
        gots: Counter[str] = Counter(got["delta"])
        undetermined = set(want.get("nondet_counters", ()))
        together = op["op"] in _DEFERRING and [later["op"] for later in ops[i + 1:i + 2]] == ["null"] and i + 1 < len(actual)
        if together and i + 1 < len(expected):
            skip.add(i + 1)
            wants.update(expected[i + 1]["delta"])
            gots.update(actual[i + 1]["delta"])
            undetermined |= set(expected[i + 1].get("nondet_counters", ()))
        found += [(i, counter, wants[counter], gots[counter])
                  for counter in counters if counter not in undetermined and wants[counter] != gots[counter]]
    return found
