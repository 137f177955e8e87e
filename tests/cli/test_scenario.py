# SPDX-License-Identifier: Apache-2.0
"""kvmmu scenario, and the file of a scenario."""

import gzip
import json
import os
import random
import re
from pathlib import Path

import pytest
import scenarios

from kvmmu.cli import main
from kvmmu.oracles import live_machine
from kvmmu.oracles.guest_stub import INSTRUCTIONS
from kvmmu.oracles.operations import HOST_OPERATIONS, check_scenario
from kvmmu.oracles.scenario import ScenarioMachine
from kvmmu.oracles.scenario_file import read_scenarios

RECORDINGS = scenarios.recordings()
DOCS = Path(__file__).parents[2] / "docs" / "scenarios.md"


@pytest.fixture
def one(tmp_path):
    path = tmp_path / "one.json"
    path.write_text(json.dumps(RECORDINGS["perm_readonly"]))
    return path


def test_a_recording_is_compared(one, capsys):
    assert main(["scenario", str(one)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("scenario perm_readonly: user write to RO leaf")
    assert re.search(r"^ +3  store at CPL 3 va=0x40010008 val=0xabc001e2ff +#PF 7 40010008 +exits \+1 pf_guest \+1 pf_taken \+1$",
                     out, re.MULTILINE)
    assert out.endswith("  21 operations, 0 differences from the recording\n")
    assert "set_spte" not in out
    assert main(["scenario", str(one), "--trace"]) == 0
    assert "set_spte" in capsys.readouterr().out


def test_a_mismatch_is_told(one, capsys):
    scenario = json.loads(one.read_text())
    scenario["expect"][4]["val"] = "7"
    scenario["expect"][3]["delta"]["pf_taken"] += 1
    one.write_text(json.dumps(scenario))
    assert main(["scenario", str(one)]) == 1
    out = capsys.readouterr().out
    assert "    operation 3: pf_taken: KVM 2, here 1\n    operation 4: val: KVM 7, here 110e2ff\n" in out
    assert main(["scenario", str(one), "--json"]) == 1
    answer, = json.loads(capsys.readouterr().out)["scenarios"]
    assert answer["compared"]
    assert answer["differences"] == [{"operation": 3, "what": "pf_taken", "kvm": 2, "here": 1},
                                     {"operation": 4, "what": "val", "kvm": "7", "here": "110e2ff"}]
    assert len(answer["records"]) == 21


def test_files_of_many(tmp_path, capsys):
    names = ["nx_toggle", "pde_write", "mmio_hole"]
    lines = "\n".join(json.dumps(RECORDINGS[name]) for name in names) + "\n"
    (tmp_path / "lines.jsonl").write_text(lines)
    (tmp_path / "lines.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "list.json").write_text(json.dumps([RECORDINGS[name] for name in names]))
    for path in tmp_path.iterdir():
        assert [scenario["name"] for scenario in read_scenarios(path)] == names
        assert main(["scenario", str(path), "--name", "pde_write"]) == 0
        assert capsys.readouterr().out.count("scenario ") == 1
    assert main(["scenario", str(tmp_path / "list.json"), "--name", "x"]) == 2
    assert "there are nx_toggle, pde_write, mmio_hole" in capsys.readouterr().err


def test_all_recordings_pass(tmp_path, capsys):
    path = tmp_path / "all.json"
    path.write_text(json.dumps(list(RECORDINGS.values())))
    assert main(["scenario", str(path)]) == 0
    assert capsys.readouterr().out.count(" 0 differences from the recording") == len(RECORDINGS)


def test_live_without_kvm(one, capsys, monkeypatch):
    """Says what is missing, and ends with status 2."""
    monkeypatch.setattr(live_machine, "unavailable", lambda: "[Errno 2] No such file or directory: '/dev/kvm'")
    assert main(["scenario", str(one), "--live"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == ("kvmmu: --live: the KVM of this computer cannot run scenarios: "
                   "[Errno 2] No such file or directory: '/dev/kvm'\n")


def test_live(one, capsys):
    reason = live_machine.unavailable()
    if reason is not None:
        pytest.skip(f"this machine runs no scenarios: {reason}")
    assert main(["scenario", str(one), "--live"]) == 0
    assert capsys.readouterr().out.endswith("  21 operations, 0 differences from the KVM of this computer\n")


def test_the_page_has_every_operation():
    """docs/scenarios.md lists the operations that there are, with their arguments."""
    text = DOCS.read_text()
    guest, host = text[text.index("## Operations of the guest"):].split("## Operations of the VMM")
    rows = re.findall(r"^\| (`[^|]*)\|", guest, re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} - {"op"} == set(INSTRUCTIONS)
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*) \|", host.split("## Records")[0], re.MULTILINE)
    assert {name: set(re.findall(r"`(\w+)`", arguments)) for name, arguments in rows if name != "op"} == {
        name: {argument.strip("[]") for argument in arguments} for name, arguments in HOST_OPERATIONS.items()}
    methods = {name.removeprefix("_op_") for name in vars(ScenarioMachine) if name.startswith("_op_")}
    assert methods == set(HOST_OPERATIONS)


@pytest.mark.parametrize(("change", "message"), [
    (lambda s: s.pop("slots"), "'slots' is missing"),
    (lambda s: s.update(ops=3), "ops: want a list, got 3"),
    (lambda s: s["ops"].append({"op": "jump", "cpl": 0}), r"ops\[21\]: op of the guest: want one of null, load"),
    (lambda s: s["ops"].append({"op": "jump"}), r"ops\[21\]: op of the host \(one of the guest has a cpl\): want one of host_w"),
    (lambda s: s["ops"].append({"op": "load", "cpl": 1}), r"ops\[21\]: cpl: want 0 or 3, got 1"),
    (lambda s: s["ops"].append({"op": "load", "cpl": 3, "va": "xyz"}), r"ops\[21\]: va: want hexadecimal digits"),
    (lambda s: s["ops"].append({"op": "host_write", "gpa": 0}), r"ops\[21\]: val: want an integer .* got nothing"),
    (lambda s: s["ops"].append({"op": "slot_delete", "slot": 9}), "slot: there is no slot 9; there are 0, 31"),
    (lambda s: s["ops"].append({"op": "dontneed", "slot": 0, "off": 0, "len": 1 << 40}), "off, len: want whole pages of"),
    (lambda s: s["slots"][0].update(size=1 << 50), "at most 0x40000000 bytes"),
    (lambda s: s["slots"][0].update(backing="1g"), "backing: want one of 4k, 2m, got '1g'"),
    (lambda s: s["regs"].update(cr2="0"), "regs: want one of cr0"),
    (lambda s: s["mem"].append(["0x0"]), r"mem\[\d+\]: want \[address, word\]"),
    (lambda s: s["expect"][0].pop("delta"), r"expect\[0\]: delta: want an object with names, got nothing"),
])
def test_what_is_wrong_is_named(one, capsys, change, message):
    scenario = json.loads(one.read_text())
    change(scenario)
    with pytest.raises(ValueError, match=message):
        check_scenario(scenario)
    one.write_text(json.dumps(scenario))
    assert main(["scenario", str(one)]) == 2
    assert re.search(message, capsys.readouterr().err)


def places(value, path=()):
    """Paths to every value in JSON."""
    yield path
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


def test_nonsense_ends_with_a_sentence(tmp_path, capsys):
    """Values of every kind anywhere in a scenario, and damaged files: status 0, 1 or 2, and no traceback."""
    rng = random.Random(5)
    names = sorted(RECORDINGS)
    values = [None, True, -1, 0, 1, 7, 1 << 40, 1 << 70, 1.5, "", "zz", "0xfff", "-1", [], [[]], {}, {"op": "load"}, "4k", "nopg"]
    path = tmp_path / "x.json"
    for _ in range(400):
        scenario = json.loads(json.dumps(RECORDINGS[rng.choice(names)]))
        scenario["ops"] = scenario["ops"][:20]
        for _ in range(rng.choice([1, 1, 3])):
            spot = rng.choice([place for place in places(scenario) if place and place[0] != "expect" or len(place) == 3])
            owner = scenario
            for key in spot[:-1]:
                owner = owner[key]
            if isinstance(owner, dict) and rng.random() < 0.2:
                del owner[spot[-1]]
            else:
                owner[spot[-1]] = rng.choice(values)
        path.write_text(json.dumps(scenario))
        assert main(["scenario", str(path)]) in (0, 1, 2), (spot, capsys.readouterr().err)
    for data in (b"", b"{", b"[]", b"\x1f\x8b", gzip.compress(b"{}" * 100)[:30], b"\xff" * 100, b"[" * 100000, b"3", b"null\n3"):
        path.write_bytes(data)
        assert main(["scenario", str(path)]) == 2
    assert main(["scenario", str(tmp_path)]) == 2
    assert main(["scenario", str(tmp_path / "missing")]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_a_file_that_is_no_regular_one(tmp_path, capsys):
    """It is refused at once, by its name: nobody may ever write to a FIFO."""
    os.mkfifo(tmp_path / "fifo")
    for path, kind in ((tmp_path / "fifo", "a FIFO"), (tmp_path, "a directory"), ("/dev/null", "a character device")):
        assert main(["scenario", str(path)]) == 2
        assert capsys.readouterr().err == f"kvmmu: {path}: is {kind}; allowed is a regular file\n"
