"""The recorded scenarios of a live KVM, operation by operation, on the machine here."""

import functools
from collections import Counter

import pytest
import scenarios

from kvmmu.oracles.scenario import ScenarioMachine, run_scenario

RECORDINGS = scenarios.recordings()
FOUND = scenarios.found_by_sequences()
OPERATIONS = sum(len(scenario["expect"]) for scenario in RECORDINGS.values())
KINDS = ("get_page", "unsync_page", "sync_page", "zap_page", "set_spte", "set_A", "set_D")


@functools.cache
def replay(name):
    """The records of a scenario."""
    return run_scenario(RECORDINGS[name])


def events(record, *kinds):
    """Events of some kinds, in order."""
    return [text for text in record.get("trace", ()) if text.split(maxsplit=1)[0] in kinds]


def test_the_recordings_are_all_there():
    """Nothing was lost, and operations of every outcome are among them."""
    assert len(RECORDINGS) == 56
    assert OPERATIONS == 2696
    outcomes = Counter(record["result"][0] for scenario in RECORDINGS.values() for record in scenario["expect"])
    assert outcomes == {"ok": 2011, "#PF": 473, "host": 154, "mmio": 57, "internal": 1}


@pytest.mark.parametrize("name", RECORDINGS)
def test_a_scenario_gives_what_kvm_gave(name):
    """Result, loaded value, changed entries, dirty log and every counter that a host does not disturb."""
    scenario = RECORDINGS[name]
    found = scenarios.differences(scenario["ops"], scenario["expect"], replay(name))
    assert not found, scenarios.report(scenario, found)


@pytest.mark.parametrize("name", FOUND)
def test_what_random_sequences_found_stays_right(name):
    """Each was a bug once."""
    scenario = FOUND[name]
    found = scenarios.differences(scenario["ops"], scenario["expect"], run_scenario(scenario, trace=False))
    assert not found, scenarios.report(scenario, found)


@pytest.mark.parametrize("name", RECORDINGS)
def test_the_audit_is_clean_after_every_operation(name):
    """No invariant of the page tables breaks on the way."""
    machine = ScenarioMachine(RECORDINGS[name], trace=False)
    for i, op in enumerate(RECORDINGS[name]["ops"]):
        machine.apply(op)
        assert machine.vm.audit() == [], f"{name}: operation {i} {op}"


def trace_differences():
    """(scenario, operation, what was recorded, what came) where events of the compared kinds differ."""
    found = []
    for name, scenario in RECORDINGS.items():
        for i, (want, got) in enumerate(zip(scenario["expect"], replay(name), strict=True)):
            if events(want, *KINDS) != events(got, *KINDS):
                found.append((name, i, events(want, *KINDS), events(got, *KINDS)))
    return found


def test_events_are_those_of_kvm_in_order():
    """All compared kinds together, order and content, per operation."""
    found = trace_differences()
    assert len(found) <= 0.05 * OPERATIONS, found[:5]


@pytest.mark.parametrize("kind", KINDS)
def test_events_of_a_kind_are_those_of_kvm(kind):
    """Each kind by itself, and it does occur."""
    total = sum(len(events(record, kind)) for scenario in RECORDINGS.values() for record in scenario["expect"])
    differing = [(name, i) for name, i, want, got in trace_differences()
                 if events({"trace": want}, kind) != events({"trace": got}, kind)]
    assert total > 40
    assert len(differing) <= 0.05 * OPERATIONS
