"""kvmmu scenario: the operations of a guest and its VMM, on the machine here and on the KVM of this computer."""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from kvmmu.cli.output import MISMATCH, OK
from kvmmu.cli.parsing import Commands, command
from kvmmu.oracles.comparison import differences
from kvmmu.oracles.scenario import run_scenario
from kvmmu.oracles.scenario_file import read_scenarios
from kvmmu.replay.terminal import write

__all__ = ["add"]

_OP_WIDTH, _RESULT_WIDTH = 52, 24
_SHOWN = 10                                 # differences of one scenario, as text


def add(commands: Commands) -> None:
    parser = command(
        commands, "scenario", _run, "run a scenario: operations of a guest and its VMM, one by one",
        "Run the operations of a scenario under shadow paging, as KVM of Linux 6.18 does it, and print what each comes to: its "
        "result, and the counters that it moved. A file that has records of a KVM is compared with them. docs/scenarios.md "
        "describes the file and the operations.",
        "scenario perm_readonly.json", "scenario perm_readonly.json --trace", "scenario all.jsonl.gz --name pde_write --live")
    parser.add_argument("file", help="JSON of a scenario, a list of scenarios, or one on each line; may be compressed by gzip")
    parser.add_argument("--name", help="run the scenario of this name alone")
    parser.add_argument("--live", action="store_true",
                        help="run it on the KVM of this computer (/dev/kvm, without two-dimensional paging), and compare")
    parser.add_argument("--trace", action="store_true", help="print the events of the page tables, too")
    parser.add_argument("--json", action="store_true", help="JSON: the records of each scenario, and where they differ")


def _run(args: argparse.Namespace) -> int:
    found = read_scenarios(args.file)
    if args.name is not None:
        names = [str(scenario.get("name")) for scenario in found]
        found = [scenario for scenario in found if scenario.get("name") == args.name]
        if not found:
            raise ValueError(f"--name {args.name}: there is no such scenario; there are {', '.join(names[:20])}"
                             + (f" and {len(names) - 20} more" if len(names) > 20 else ""))
    run_live = _live() if args.live else None
    answers = []
    for scenario in found:
        answer = _answer(scenario, run_live, args)
        answers.append(answer)
        if not args.json:
            write(_text(scenario, answer, args))
    if args.json:
        write(json.dumps({"scenarios": answers}) + "\n")
    return MISMATCH if any(answer["differences"] for answer in answers) else OK


def _live() -> Any:
    """Return the function that runs a scenario on the KVM of this computer; ValueError where there is none that can."""
    from kvmmu.oracles.live_machine import run_live, unavailable

    reason = unavailable()
    if reason is not None:
        raise ValueError(f"--live: the KVM of this computer cannot run scenarios: {reason}")
    return run_live


def _answer(scenario: dict[str, Any], run_live: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Return the records of a scenario, and where they differ from those of a KVM."""
    from kvmmu.oracles.live_machine import CannotRun

    name, ops = scenario.get("name", ""), scenario["ops"]
    records = run_scenario(scenario, trace=args.trace)
    expected: Any = scenario.get("expect")
    if run_live is not None:
        try:
            expected = run_live(scenario)
        except CannotRun as error:
            raise ValueError(f"--live: scenario {name}: {error}") from None
    found = [] if expected is None else differences(ops, expected, records)
    answer = {"name": name, "records": records, "compared": expected is not None, "differences": [
        {"operation": i, "what": what, "kvm": want, "here": got} for i, what, want, got in found]}
    return answer | {"live": expected} if run_live is not None else answer


def _text(scenario: dict[str, Any], answer: dict[str, Any], args: argparse.Namespace) -> str:
    lines = [f"scenario {answer['name']}: {scenario.get('desc', '')}".rstrip(": ")]
    for i, (op, record) in enumerate(zip(scenario["ops"], answer["records"], strict=False)):
        lines.append(f"{i:4}  {_op_text(op):<{_OP_WIDTH}} {_result_text(record):<{_RESULT_WIDTH}} "
                     f"{_counters_text(record['delta'])}".rstrip())
        lines += [f"        {event}" for event in record.get("trace", ())] if args.trace else []
    ran, all_ops = len(answer["records"]), len(scenario["ops"])
    if ran < all_ops:
        lines.append(f"      the guest came to an end; {all_ops - ran} operations are left")
    found = answer["differences"]
    if answer["compared"]:
        where = "the KVM of this computer" if args.live else "the recording"
        lines.append(f"  {ran} operations, {len(found)} differences from {where}")
    for row in found[:_SHOWN]:
        lines.append(f"    operation {row['operation']}: {row['what']}: KVM {row['kvm']}, here {row['here']}")
    return "\n".join(lines) + "\n"


def _op_text(op: dict[str, Any]) -> str:
    rest = " ".join(f"{name}={value}" for name, value in op.items() if name not in ("op", "cpl"))
    who = f"at CPL {op['cpl']}" if "cpl" in op else "by the host"
    return f"{op['op']} {who} {rest}".rstrip()


def _result_text(record: dict[str, Any]) -> str:
    result: Sequence[Any] = record["result"]
    return " ".join(str(part) for part in result) + (f" val={record['val']}" if "val" in record else "")


def _counters_text(delta: dict[str, int]) -> str:
    return " ".join(f"{name} {count:+}" for name, count in sorted(delta.items()))
