"""Whole machines on a live KVM: the recorded scenarios again, and random sequences against the machine here.

Set ``KVMMU_LIVE_OPERATIONS`` for a longer run, ``KVMMU_LIVE_SEED`` for another first seed.
"""

import os

import live_replay
import pytest
import scenarios
from live_sequences import OPERATIONS as PER_SEQUENCE
from live_sequences import sequence

from kvmmu.oracles import live_machine

UNAVAILABLE = live_machine.unavailable()
pytestmark = pytest.mark.skipif(UNAVAILABLE is not None, reason=f"live KVM: {UNAVAILABLE}")
RECORDINGS = scenarios.recordings() | scenarios.found_by_sequences()
OPERATIONS = int(os.environ.get("KVMMU_LIVE_OPERATIONS", "2000"))
FIRST = int(os.environ.get("KVMMU_LIVE_SEED", "0"))
SEQUENCES_PER_TEST = 50
SEQUENCES = -(-OPERATIONS * 11 // (10 * PER_SEQUENCE))       # some guests come to an early end


def run_or_skip(scenario):
    """The records of a live run."""
    try:
        return live_machine.run_live(scenario)
    except live_machine.CannotRun as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("name", RECORDINGS)
def test_a_recorded_scenario_runs_again_as_recorded(name):
    """This KVM does what the recorded one did: the driver is the recorder's equal. A host may disturb a run, but not three."""
    scenario = RECORDINGS[name]
    for _ in range(3):
        found = scenarios.differences(scenario["ops"], scenario["expect"], run_or_skip(scenario))
        if not found:
            break
    assert not found, scenarios.report(scenario, found)


@pytest.mark.parametrize("first", range(FIRST, FIRST + SEQUENCES, SEQUENCES_PER_TEST))
def test_a_random_sequence_does_the_same_live_and_here(first, capsys):
    """Result, value, entries, dirty log and counters of every operation."""
    compared = 0
    for seed in range(first, min(first + SEQUENCES_PER_TEST, FIRST + SEQUENCES)):
        scenario = sequence(seed)
        found, live = live_replay.compare(scenario)
        assert not found, f"{scenarios.report(scenario, found)}\nagain: python tests/support/live_replay.py {seed} --shrink"
        compared += len(live)
    assert compared > 100
    with capsys.disabled():
        print(f"\n{compared} operations compared with a live KVM")
