"""Recorded scenarios, and how records of two machines compare."""

import gzip
import json
from collections import Counter

from paths import DATA

LIVE = DATA / "live"
# Counters that a host does not disturb.
TRUSTED = (
    "mmu_cache_miss", "mmu_shadow_zapped", "mmu_recycled", "mmu_flooded", "mmu_pde_zapped", "mmu_unsync", "mmu_pte_write",
    "pages_4k", "pages_2m", "pages_1g", "pf_taken", "pf_fixed", "pf_spurious", "pf_emulate", "pf_guest", "invlpg",
    "remote_tlb_flush_requests", "max_mmu_rmap_size", "mmio_exits")
WHAT_THE_GUEST_SAW = ("result", "val", "ptes", "dirty_gfns")
# What happens at the next entry of the guest; an interrupt of the host can bring that entry forward.
DEFERRING = ("cr3", "cr0", "cr4", "efer")


def recordings():
    """The recorded scenarios by name."""
    with gzip.open(LIVE / "scenarios.jsonl.gz", "rt") as lines:
        return {scenario["name"]: scenario for scenario in map(json.loads, lines)}


def found_by_sequences():
    """Scenarios by name in which the machine here once did otherwise, cut from random sequences; without events."""
    with open(LIVE / "found.jsonl") as lines:
        return {scenario["name"]: scenario for scenario in map(json.loads, lines)}


def differences(ops, expected, actual, counters=TRUSTED):
    """Where two lists of records differ: (index, what, expected, actual). What `expected` calls undetermined does not count."""
    found = []
    if actual and actual[-1]["result"][0] == "code":        # the guest goes on with code that is not carried out here
        expected, actual = expected[:len(actual) - 1], actual[:-1]
    if len(expected) != len(actual):
        found.append((min(len(expected), len(actual)), "records", len(expected), len(actual)))
    skip = set()
    for i, (op, want, got) in enumerate(zip(ops, expected, actual, strict=False)):
        for what in WHAT_THE_GUEST_SAW:
            if what not in want.get("nondet", ()) and want.get(what) != got.get(what):
                found.append((i, what, want.get(what), got.get(what)))
        if i in skip:
            continue
        wants, gots, undetermined = Counter(want["delta"]), Counter(got["delta"]), set(want.get("nondet_counters", ()))
        together = op["op"] in DEFERRING and [later["op"] for later in ops[i + 1:i + 2]] == ["null"] and i + 1 < len(actual)
        if together and i + 1 < len(expected):
            skip.add(i + 1)
            wants.update(expected[i + 1]["delta"])
            gots.update(actual[i + 1]["delta"])
            undetermined |= set(expected[i + 1].get("nondet_counters", ()))
        found += [(i, counter, wants[counter], gots[counter])
                  for counter in counters if counter not in undetermined and wants[counter] != gots[counter]]
    return found


def report(scenario, found, limit=5):
    """Differences as text, with the operations they belong to."""
    lines = [f"{scenario['name']}: {len(found)} differences"]
    for i, what, want, got in found[:limit]:
        op = scenario["ops"][i] if i < len(scenario["ops"]) else "the end"
        lines.append(f"  operation {i} {op}: {what}: expected {want}, got {got}")
    return "\n".join(lines)
