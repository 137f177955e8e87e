"""Whole machines on a live KVM: the recorded scenarios again, and random sequences against the machine here.

Set ``KVMMU_LIVE_OPERATIONS`` for a longer run; every run starts from the same seed.
"""

import pytest
import scenarios

from kvmmu.oracles import live_machine

UNAVAILABLE = live_machine.unavailable()
pytestmark = pytest.mark.skipif(UNAVAILABLE is not None, reason=f"live KVM: {UNAVAILABLE}")
RECORDINGS = scenarios.recordings()


def run_or_skip(scenario):
    """The records of a live run."""
    try:
        return live_machine.run_live(scenario)
    except live_machine.CannotRun as reason:
        pytest.skip(str(reason))


def undetermined(scenario, records, other):
    """What differs between two live runs of a scenario, as `differences()` names it."""
    return {(i, what) for i, what, *_ in scenarios.differences(scenario["ops"], records, other)}


@pytest.mark.parametrize("name", RECORDINGS)
def test_a_recorded_scenario_runs_again_as_recorded(name):
    """This KVM does what the recorded one did: the driver is the recorder's equal. A host may disturb a run, but not three."""
    scenario = RECORDINGS[name]
    for _ in range(3):
        found = scenarios.differences(scenario["ops"], scenario["expect"], run_or_skip(scenario))
        if not found:
            break
    assert not found, scenarios.report(scenario, found)
