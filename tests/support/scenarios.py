"""Recorded scenarios, and how records of two machines compare."""

import gzip
import json

from paths import DATA

from kvmmu.oracles.comparison import TRUSTED, differences

__all__ = ["LIVE", "TRUSTED", "differences", "found_by_sequences", "recordings", "report"]

LIVE = DATA / "live"

def recordings():
    """The recorded scenarios by name."""
    with gzip.open(LIVE / "scenarios.jsonl.gz", "rt") as lines:
        return {scenario["name"]: scenario for scenario in map(json.loads, lines)}


def found_by_sequences():
    """Scenarios by name in which the machine here once did otherwise, cut from random sequences; without events."""
    with open(LIVE / "found.jsonl") as lines:
        return {scenario["name"]: scenario for scenario in map(json.loads, lines)}


def report(scenario, found, limit=5):
    """Differences as text, with the operations they belong to."""
    lines = [f"{scenario['name']}: {len(found)} differences"]
    for i, what, want, got in found[:limit]:
        op = scenario["ops"][i] if i < len(scenario["ops"]) else "the end"
        lines.append(f"  operation {i} {op}: {what}: expected {want}, got {got}")
    return "\n".join(lines)
