# SPDX-License-Identifier: Apache-2.0
"""Programs that Valgrind's lackey traces here and now: our counts are lackey's own, and the footprint is that of plain Python."""

import json
import re
import shutil
import subprocess

import pytest

from kvmmu.cli import main
from kvmmu.traces import describe_trace

VALGRIND = shutil.which("valgrind")
PROGRAMS = {"true": ["true"], "ls": ["ls", "/"], "sort": ["sort", "-n", "WORDS"]}
KINDS = {"I": ("fetch",), " L": ("load",), " S": ("store",), " M": ("load", "store")}
TOP = 4                                                     # levels of 4-level paging

pytestmark = pytest.mark.skipif(VALGRIND is None, reason="valgrind is not installed")


class Traced:
    """A trace, what lackey says of it in the end, and its rows by plain Python."""

    def __init__(self, folder, program):
        words = folder / "words"
        words.write_text("".join(f"{n * 7919 % 1009}\n" for n in range(60)))
        self.path = folder / "program.lackey"
        command = [str(words) if word == "WORDS" else word for word in PROGRAMS[program]]
        done = subprocess.run([VALGRIND, "--tool=lackey", "--trace-mem=yes", "--basic-counts=yes", f"--log-file={self.path}",
                               *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=120)
        if done.returncode:
            pytest.skip(f"valgrind does not run {command[0]} here: {done.stderr[-200:]}")
        text = self.path.read_text()
        self.instructions = int(re.search(r"guest instrs:\s+([\d,]+)", text)[1].replace(",", ""))
        self.kinds = dict.fromkeys(("load", "store", "fetch"), 0)
        self.modifies = self.others = 0
        self.accesses = []
        for line in text.splitlines():
            kind = line[:2].rstrip()
            if kind not in KINDS or line[2] != " ":
                self.others += 1
                continue
            where, size = line[3:].split(",")
            self.modifies += kind == " M"
            for name in KINDS[kind]:
                self.kinds[name] += 1
                self.accesses.append((int(where, 16), int(size)))

    def pages(self, shift):
        return {page for where, size in self.accesses for page in (where >> shift, where + size - 1 >> shift)}

    def crossings(self, shift):
        return sum(where >> shift != where + size - 1 >> shift for where, size in self.accesses)


@pytest.fixture(scope="module", params=PROGRAMS)
def traced(request, tmp_path_factory):
    return Traced(tmp_path_factory.mktemp(request.param), request.param)


def test_counts(traced):
    """Instructions are those that lackey counted; loads, stores and modifies are its lines."""
    found = describe_trace(traced.path)
    assert traced.instructions == found["kinds"]["fetch"] > 50_000
    assert traced.kinds == found["kinds"]
    assert traced.modifies > 100
    assert {"lines": traced.others} == found["skipped"]
    assert len(traced.pages(12)) == found["pages_touched"]
    assert "lackey" == found["format"]


@pytest.mark.parametrize(("page", "shift", "level"), [("4k", 12, 1), ("2m", 21, 2)])
def test_replay_with_demand_paging(traced, page, shift, level, capsys):
    """Footprint, faults, crossings and references of the command are what plain Python counts."""
    assert 0 == main(["replay", str(traced.path), "--page", page, "--pager", "--json"])
    report = json.loads(capsys.readouterr().out)
    pages, crossings = len(traced.pages(shift)), traced.crossings(shift)
    walks = len(traced.accesses) + crossings
    assert (len(traced.accesses), traced.kinds, {}) == (report["accesses"], report["kinds"], report["walk_faults"])
    assert (pages, pages, crossings) == (report["pages_touched"], report["first_touch_faults"], report["crossings"])
    assert 4096 * len(traced.pages(12)) == report["footprint"]["touched_bytes"]
    assert pages << shift == report["footprint"]["mapped_bytes"]
    assert (walks, walks * (TOP + 1 - level)) == (report["walks"], report["refs"]["total"])
