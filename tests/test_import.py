# SPDX-License-Identifier: Apache-2.0
"""What `import kvmmu` loads, and what a public name loads when it is first asked for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import kvmmu


def run(program):
    """Return what a program prints in a new Python."""
    done = subprocess.run([sys.executable, "-Pc", program], text=True, capture_output=True, check=True, env=os.environ | {
        "PYTHONPATH": str(Path(kvmmu.__file__).parents[1])})
    return done.stdout.strip()


def test_import_loads_no_replay_no_traces_and_no_reports():
    """They take half as long to load as everything else."""
    loaded = run("import sys, kvmmu; print(*sys.modules)").split()
    heavy = ("kvmmu.replay.", "kvmmu.traces", "kvmmu.images", "kvmmu.report", "kvmmu.comparison", "kvmmu.tlb.hierarchy", "lzma",
             "bz2", "urllib")
    assert [] == [name for name in loaded if name.startswith(heavy)]


@pytest.mark.parametrize("name", sorted(kvmmu._LOADED_LATER))
def test_a_name_that_is_loaded_later_is_the_first_thing_that_a_program_asks_for(name):
    """It can be imported, it is an attribute, and dir() has it before."""
    value = getattr(kvmmu, name)
    expected = f"True {value.__module__} {value.__name__}"
    assert expected == run(f"import kvmmu; known = {name!r} in dir(kvmmu); from kvmmu import {name}; "
                           f"assert {name} is kvmmu.{name}; print(known, {name}.__module__, {name}.__name__)")


@pytest.mark.parametrize("before", ["", "import kvmmu.replay.result", "from kvmmu.replay import result", "import kvmmu.cli",
                                    "kvmmu.open_trace", "kvmmu.compare"])
def test_replay_is_the_function_and_not_its_package(before):
    """In whatever order the modules of the package are loaded."""
    assert "function" == run(f"import kvmmu\n{before}\nprint(type(kvmmu.replay).__name__)")


def test_all_public_names_are_in_dir_and_come_with_a_star():
    """And a name that is not there is an AttributeError."""
    assert set(kvmmu.__all__) <= set(dir(kvmmu))
    assert "[]" == run("import kvmmu\nfrom kvmmu import *\nprint([name for name in kvmmu.__all__ if name not in globals()])")
    with pytest.raises(AttributeError, match="module 'kvmmu' has no attribute 'reply'"):
        kvmmu.reply  # noqa: B018
