# SPDX-License-Identifier: Apache-2.0
"""A user's script over the whole public API runs, and type checkers accept it in their strict modes."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kvmmu

SCRIPT = Path(__file__).parent / "support" / "user_script.py"
PACKAGE = Path(kvmmu.__file__).parent


@pytest.fixture
def project(tmp_path):
    """A folder with the script beside the package, and a script that names everything that is public."""
    (tmp_path / "kvmmu").symlink_to(PACKAGE)
    shutil.copy(SCRIPT, tmp_path)
    names = "".join(f"    kvmmu.{name},\n" for name in kvmmu.__all__)
    (tmp_path / "names.py").write_text(f"import kvmmu\n\nEVERYTHING: tuple[object, ...] = (\n{names})\n")
    return tmp_path


def test_it_runs(capsys):
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "the page is read-only" in capsys.readouterr().out


@pytest.mark.parametrize("version", ["3.11", "3.14"])
def test_mypy_accepts_it(project, version):
    """Also for Python 3.11, where arrays of numpy are no buffers to type checkers."""
    pytest.importorskip("mypy", reason="mypy is not installed (extra dev)")
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--python-version", version,
               SCRIPT.name, "names.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=project, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_pyright_accepts_it(project):
    """Pyright takes its program from the npm registry at its first run, if it comes from PyPI."""
    pyright = shutil.which("pyright", path=str(Path(sys.executable).parent)) or shutil.which("pyright")
    if pyright is None:
        pytest.skip("pyright is not installed")
    (project / "pyrightconfig.json").write_text(json.dumps(
        {"typeCheckingMode": "strict", "reportUnnecessaryTypeIgnoreComment": "error", "include": [SCRIPT.name, "names.py"]}))
    command = [pyright, "--pythonpath", sys.executable]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=project, check=False, timeout=300)
    except subprocess.TimeoutExpired:
        pytest.skip("pyright could not fetch its program")
    if " error" not in done.stdout:
        pytest.skip(f"pyright does not start: {done.stderr}")
    assert done.returncode == 0, done.stdout


def test_import_loads_only_what_is_needed():
    """What takes long to load, and most programs do not need, is loaded when it is."""
    heavy = {"zipfile", "tempfile", "random", "importlib.resources", "json", "rich", "concurrent.futures", "pyarrow",
             "matplotlib", "html", "kvmmu.cli", "kvmmu.images", "kvmmu.oracles", "tomllib"}
    program = "import sys, numpy; before = set(sys.modules); import kvmmu; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert heavy & set(done.stdout.split()) == set()
