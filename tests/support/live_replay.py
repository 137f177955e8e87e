"""One random sequence again, on a live KVM and here: where they differ, and the shortest scenario in which they still do.

    python tests/support/live_replay.py SEED [--operations N] [--shrink] [--save FILE]

``--shrink`` drops operations and initial memory as long as the first difference stays one of its kind; ``--save`` appends what is
left, with what the live KVM did, to a file of recorded scenarios.
"""

import argparse
import json
import sys

import scenarios
from live_sequences import OPERATIONS, sequence

from kvmmu.oracles import live_machine, run_scenario
from kvmmu.oracles.comparison import SEEN_BY_THE_GUEST

AROUND = 4                  # operations printed before a difference
RUNS = 5


def settle(scenario, records):
    """Live records with what a few more runs do not agree on marked as undetermined."""
    records = [dict(record) for record in records]
    for _ in range(RUNS - 1):
        for i, what, *_ in scenarios.differences(scenario["ops"], records, live_machine.run_live(scenario)):
            if what == "records":
                raise ValueError(f"{scenario['name']}: two live runs do not come to the same end")
            key = "nondet" if what in SEEN_BY_THE_GUEST else "nondet_counters"
            records[i].setdefault(key, set()).add(what)
    return records


def compare(scenario):
    """(differences, live records): a live KVM against the machine here.

    What differs has to in every one of a few live runs: an interrupt of the host can make the guest take a fault twice, or flush
    and synchronize one operation early.
    """
    here, found, live = run_scenario(scenario, trace=False), None, []
    for _ in range(RUNS):
        live = live_machine.run_live(scenario)
        now = scenarios.differences(scenario["ops"], live, here)
        places = {difference[:2] for difference in now}
        found = now if found is None else [difference for difference in found if difference[:2] in places]
        if not found:
            break
    return found, live


def kind(found):
    """What the first difference is about: what has to stay the same while a scenario shrinks."""
    return found[0][1] if found else None


def shrink(scenario):
    """A part of a scenario that differs in the same way and cannot lose anything more."""
    found, _ = compare(scenario)
    wanted = kind(found)
    if wanted is None:
        raise ValueError(f"{scenario['name']}: nothing differs")
    small = scenario | {"ops": scenario["ops"][:found[0][0] + 2]}
    for key in ("ops", "mem", "ops", "watch"):
        small = shrink_list(small, key, wanted)
    return small


def shrink_list(scenario, key, wanted):
    """The same with as few elements of a list as there can be."""
    size = max(1, len(scenario[key]) // 2)
    while True:
        at = 0
        while at < len(scenario[key]):
            less = scenario | {key: scenario[key][:at] + scenario[key][at + size:]}
            if differs(less, wanted):
                scenario = less
            else:
                at += size
        if size == 1:
            return scenario
        size //= 2


def differs(scenario, wanted):
    """Whether a scenario that lost something is still one, and differs first in what is wanted."""
    try:
        return kind(compare(scenario)[0]) == wanted
    except (KeyError, OSError, ValueError, live_machine.CannotRun):
        return False


def show(scenario, found, live):
    """Print the first difference with the operations before it."""
    print(scenarios.report(scenario, found))
    if found:
        at = found[0][0]
        for i in range(max(0, at - AROUND), min(at + 1, len(live))):
            print(f"  {i}: {json.dumps(scenario['ops'][i])}\n      {json.dumps(live[i], default=sorted)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seed", type=int)
    parser.add_argument("--operations", type=int, default=OPERATIONS, help="of the sequence, default %(default)s")
    parser.add_argument("--shrink", action="store_true")
    parser.add_argument("--save", metavar="FILE")
    arguments = parser.parse_args()
    reason = live_machine.unavailable()
    if reason is not None:
        sys.exit(f"live KVM: {reason}")
    scenario = sequence(arguments.seed, arguments.operations)
    if arguments.shrink:
        scenario = shrink(scenario)
    found, live = compare(scenario)
    show(scenario, found, live)
    if arguments.shrink:
        print(json.dumps(scenario["ops"], indent=1))
    if arguments.save:
        with open(arguments.save, "a") as file:
            print(json.dumps(scenario | {"expect": settle(scenario, live), "runs": RUNS}, default=sorted), file=file)
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
