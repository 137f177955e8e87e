"""Whole machines on a live KVM: the recorded scenarios again, and random sequences against the machine here.

Set ``KVMMU_LIVE_OPERATIONS`` for a longer run; every run starts from the same seed.
"""

import os

import pytest
import scenarios
from live_sequences import sequence

from kvmmu.oracles import live_machine, run_scenario

UNAVAILABLE = live_machine.unavailable()
pytestmark = pytest.mark.skipif(UNAVAILABLE is not None, reason=f"live KVM: {UNAVAILABLE}")
RECORDINGS = scenarios.recordings()
OPERATIONS = int(os.environ.get("KVMMU_LIVE_OPERATIONS", "1000"))
PER_SEQUENCE = 200
SEQUENCES_PER_TEST = 50
SEQUENCES = -(-OPERATIONS // PER_SEQUENCE)
RUNS = 5


def run_or_skip(scenario):
    """The records of a live run."""
    try:
        return live_machine.run_live(scenario)
    except live_machine.CannotRun as reason:
        pytest.skip(str(reason))


def settled(scenario, records):
    """Those records again with what a few more live runs do not agree on marked as undetermined."""
    records = [dict(record) for record in records]
    for _ in range(RUNS - 1):
        for i, what, *_ in scenarios.differences(scenario["ops"], records, run_or_skip(scenario)):
            if what == "records":
                pytest.skip(f"{scenario['name']}: the host does not run it to the same end twice")
            key = "nondet" if what in scenarios.WHAT_THE_GUEST_SAW else "nondet_counters"
            records[i].setdefault(key, set()).add(what)
    return records


@pytest.mark.parametrize("name", RECORDINGS)
def test_a_recorded_scenario_runs_again_as_recorded(name):
    """This KVM does what the recorded one did: the driver is the recorder's equal. A host may disturb a run, but not three."""
    scenario = RECORDINGS[name]
    for _ in range(3):
        found = scenarios.differences(scenario["ops"], scenario["expect"], run_or_skip(scenario))
        if not found:
            break
    assert not found, scenarios.report(scenario, found)


@pytest.mark.parametrize("first", range(0, SEQUENCES, SEQUENCES_PER_TEST))
def test_a_random_sequence_does_the_same_live_and_here(first, capsys):
    """Result, value, entries, dirty log and counters of every operation. A few live runs must agree on what differs."""
    compared = 0
    for seed in range(first, min(first + SEQUENCES_PER_TEST, SEQUENCES)):
        scenario = sequence(seed, PER_SEQUENCE, paging=seed % 8 != 7)
        here, live = run_scenario(scenario, trace=False), run_or_skip(scenario)
        found = scenarios.differences(scenario["ops"], live, here)
        if found:
            found = scenarios.differences(scenario["ops"], settled(scenario, live), here)
        assert not found, scenarios.report(scenario, found)
        compared += len(live)
    assert compared > 100
    with capsys.disabled():
        print(f"\n{compared} operations compared with a live KVM")
