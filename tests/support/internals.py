# SPDX-License-Identifier: Apache-2.0
"""The inside of a machine for tests: `internals.pyx`, compiled once and kept below `build/`.

The module is named by what it is made from: its source, the declarations and headers of the package, and the versions of the
tools. A test that needs it is skipped where Cython or a C compiler is missing.
"""

import functools
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest

import kvmmu

SOURCE = Path(__file__).with_suffix(".pyx")
PACKAGE = Path(kvmmu.__file__).parent
SETUP = """
from Cython.Build import cythonize
from setuptools import Extension, setup

import kvmmu

setup(name="internals", ext_modules=cythonize(
    [Extension("kvmmu_internals", ["kvmmu_internals.pyx"], include_dirs=[kvmmu.get_include()])],
    compiler_directives={"language_level": 3, "nonecheck": True}))
"""


def key():
    """What the compiled module depends on, as a name."""
    import Cython
    digest = hashlib.sha256(f"{sys.version}{Cython.__version__}{SETUP}".encode())
    for path in (SOURCE, *sorted(PACKAGE.rglob("*.pxd")), *sorted(PACKAGE.rglob("*.h"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def cache():
    """A folder that is kept: below build/ of the sources, or among the temporary files if that cannot be written."""
    for root in (SOURCE.parents[2] / "build", Path(tempfile.gettempdir())):
        folder = root / "kvmmu-test-internals"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    return Path(tempfile.mkdtemp())


def compiled(target):
    """Compile the module to a path; another process may do the same at once."""
    pytest.importorskip("setuptools", reason="setuptools is not installed")
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"the C compiler {compiler[0]} is missing")
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        folder = Path(name)
        shutil.copy(SOURCE, folder / "kvmmu_internals.pyx")
        (folder / "setup.py").write_text(SETUP)
        done = subprocess.run([sys.executable, "-P", "setup.py", "build_ext", "--inplace"], cwd=folder, capture_output=True,
                              text=True, check=False, env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)})
        assert done.returncode == 0, done.stdout + done.stderr
        built = next(path for path in folder.glob("kvmmu_internals*") if path.suffix in (".so", ".pyd"))
        os.replace(built, target)


@functools.cache
def extension():
    """The compiled module."""
    pytest.importorskip("Cython", reason="Cython is not installed")
    target = cache() / f"{key()}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not target.exists():
        compiled(target)
    spec = importlib.util.spec_from_file_location("kvmmu_internals", target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def damage(kvm, what, sp, index=0, value=0):
    """Break one thing of a shadow page, or of its entry at index, and leave all others as they are."""
    extension().damage(kvm, what, sp, index, value)


def hit_rights(machine):
    """(tables, rules), bool arrays (acc, nacc, pkey, index): what a TLB entry allows, and what the rules say."""
    return extension().hit_rights(machine)


def pte_lists(n):
    """n lists of SPTE numbers."""
    return extension().PteLists(n)


def memslot(*args, **kwargs):
    """A memslot by itself: (gfn, npages, backing=3, pfn=0)."""
    return extension().Memslot(*args, **kwargs)
