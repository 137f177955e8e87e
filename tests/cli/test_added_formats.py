"""The command with formats that another package adds by entry points: their options, and what they raise."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kvmmu

PACKAGE = '''
import numpy as np
from kvmmu.traces import TraceError
from kvmmu.traces.foreign import Brings, ForeignTrace

class Numbers:
    """Lines with an address in decimal; nothing says which types the options have but their defaults."""
    name = "numbers"
    def sniff(self, head, path):
        if head.startswith(b"sniff"):
            raise KeyError("no such thing")
        return 100 if head.startswith(b"numbers") else 0
    def open(self, path, fetch=True, *, step=8, scale=1.0, label=None, word="a", fields=("addr",)):
        def read(notes):
            lines = path.read_text().split()[1:]
            if "damaged" in lines:
                raise TraceError(f"{path}: line 3 is damaged")
            data = np.array([int(int(line) * scale) for line in lines], np.uint64)
            if step > 255:
                raise OverflowError(step)
            size = np.full(data.size, step, np.uint8)
            yield {"op": np.full(data.size, 2 if fetch is True else 0, np.uint8), "addr": data,
                   "access": np.full(data.size, 20 if fetch is True else 4, np.uint8), "size": size}
        return ForeignTrace(self.name, path, read, Brings(size=True))
'''
TAPES = '''
class Tape:
    name = "tape"
    def sniff(self, head, path):
        return 100 if head.startswith(b"TAPE") else 0
    def open(self, path):
        raise IndexError("no reel")
'''


@pytest.fixture
def added(tmp_path):
    """Run the command where a package adds the formats `numbers` and `tape`."""
    (tmp_path / "my_package.py").write_text(PACKAGE)
    (tmp_path / "my_tapes.py").write_text(TAPES)
    (tmp_path / "my_package-1.dist-info").mkdir()
    (tmp_path / "my_package-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: my_package\nVersion: 1\n")
    (tmp_path / "my_package-1.dist-info" / "entry_points.txt").write_text(
        "[kvmmu.traces]\nnumbers = my_package:Numbers\n[kvmmu.images]\ntape = my_tapes:Tape\n")
    paths = os.pathsep.join([str(Path(kvmmu.__file__).parents[1]), str(tmp_path)])

    def command(*args):
        return subprocess.run([sys.executable, "-P", "-m", "kvmmu", *map(str, args)], text=True, capture_output=True, check=False,
                              cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths})
    return command


@pytest.mark.parametrize(("option", "kinds", "highest"), [
    ("fetch=no", {"load": 2}, 8192), ("fetch=yes", {"fetch": 2}, 8192), ("step=0x10", {"fetch": 2}, 8192),
    ("scale=0.5", {"fetch": 2}, 4096), ("label=x", {"fetch": 2}, 8192), ("word=2", {"fetch": 2}, 8192)])
def test_options_have_the_type_of_their_default(added, tmp_path, option, kinds, highest):
    (tmp_path / "run").write_text("numbers\n4096\n8192\n")
    done = added("info", "run", "--option", option, "--json")
    assert ("", 0) == (done.stderr, done.returncode)
    found = json.loads(done.stdout)
    assert kinds == {kind: count for kind, count in found["kinds"].items() if count}
    assert highest == found["highest"]


@pytest.mark.parametrize(("option", "message"), [
    ("fetch=maybe", "fetch is one of yes, no, true, false"), ("fetch=1", "fetch is one of"),
    ("step=x", "step is a number, 8 or 0x8"),
    ("scale=x", "scale is a number, 0.5 or 8"), ("fields=a,b", "fields is a tuple, which has no form as text"),
    ("colour=red", "the options of the format numbers are fetch, fields, label, scale, step, word")])
def test_values_of_another_type_are_refused(added, tmp_path, option, message):
    (tmp_path / "run").write_text("numbers\n4096\n8192\n")
    done = added("replay", "run", "--option", option)
    assert (2, "") == (done.returncode, done.stdout)
    assert f"kvmmu: --option {option}: " in done.stderr
    assert message in done.stderr


@pytest.mark.parametrize("command", ["replay", "info", "convert", "compare"])
@pytest.mark.parametrize(("text", "options", "words"), [
    ("numbers\n4096g\n", (), "the trace format 'numbers' raised ValueError ({}, line 18): invalid literal for int()"),
    ("numbers\n4096\n", ("--option", "step=300"), "the trace format 'numbers' raised OverflowError ({}, line 20): "),
    ("sniff\n", (), "the trace format 'numbers' raised KeyError ({}, line 11): 'no such thing'")])
def test_exceptions_of_a_format_are_not_bugs_of_kvmmu(added, tmp_path, command, text, options, words):
    """The message names the format, the exception and the line; the exit status is that of bad input."""
    (tmp_path / "run").write_text(text)
    done = added(command, "run", *(["out.parquet"] if command == "convert" else []), *options)
    assert 2 == done.returncode
    assert f"kvmmu: {words.format(tmp_path / 'my_package.py')}" in done.stderr
    assert "a bug" not in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.parquet").exists()


def test_exceptions_of_an_image_format(added, tmp_path):
    (tmp_path / "run").write_bytes(b"TAPE")
    done = added("pt", "run", "--cr3", "0x1000")
    assert (2, "") == (done.returncode, done.stdout)
    assert f"kvmmu: the image format 'tape' raised IndexError ({tmp_path / 'my_tapes.py'}, line 7): no reel\n" == done.stderr


def test_an_error_of_the_file_is_told_as_it_is(added, tmp_path):
    """A TraceError of a format is told as it is."""
    (tmp_path / "run").write_text("numbers\ndamaged\n")
    done = added("replay", "run")
    assert (2, "kvmmu: run: line 3 is damaged\n") == (done.returncode, done.stderr)
