"""The stubs of the compiled modules: the names that the modules have, and the signatures."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import kvmmu
from kvmmu.arch._roles import CpuRole

PACKAGE = Path(kvmmu.__file__).parent
STUBS = sorted(PACKAGE.rglob("*.pyi"))
# C arrays, a base: nothing for Python
HIDDEN = {"CachedPages", "Memslots", "Modes", "RegisterSetWalks", "SlotTable", "WalkCache", "WalkCopy", "Workspace"}


def module_of(path):
    """Name of the module behind a stub or a compiled file."""
    return ".".join(("kvmmu", *path.relative_to(PACKAGE).parts[:-1], path.name.split(".")[0]))


def public_names(module):
    """Names that a module defines itself, underscored ones aside; the imported ones belong to others."""
    return {name for name, value in vars(module).items()
            if not name.startswith("_") and name not in HIDDEN and type(value).__name__ != "module"
            and getattr(value, "__module__", module.__name__) == module.__name__}


def stub_names(path):
    """Names that a stub defines."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names.add(node.name)
        elif isinstance(node, ast.AnnAssign):
            names.add(node.target.id)
    return names


@pytest.mark.parametrize("stub", STUBS, ids=module_of)
def test_names(stub):
    assert stub_names(stub) == public_names(importlib.import_module(module_of(stub)))


def test_every_module_with_a_python_face_has_a_stub():
    compiled = {module_of(path) for path in PACKAGE.rglob("*.*") if path.suffix in (".so", ".pyd")}
    faces = {name for name in compiled if public_names(importlib.import_module(name))}
    assert {module_of(path) for path in STUBS} == faces


def test_stubtest(tmp_path):
    """mypy's stubtest finds each name, argument and default of the stubs at run time, and the other way round."""
    pytest.importorskip("mypy", reason="mypy is not installed (extra dev)")
    allowed = tmp_path / "allowed"
    # Bits of a role are looked up in __getattr__; Cython adds dunder names of its own, and shows no signature of __cinit__() and
    # of keyword-only arguments of __init__().
    bits = "|".join(name for name in dir(CpuRole(0)) if not name.startswith("_"))
    allowed.write_text(f"kvmmu.arch._roles.CpuRole.({bits}|__getattr__)\n"
                       rf"kvmmu\.([a-z_]+\.)+(_\w+|{'|'.join(sorted(HIDDEN))})" "\n"
                       r"kvmmu\.(tables|tlb|traces)\._\w+\.\w+\.__init__" "\n"
                       r"kvmmu\.([a-z_]+\.)+\w+\.__(reduce|setstate|pyx_vtable|new|buffer)\w*__" "\n")
    config = tmp_path / "mypy.ini"
    config.write_text("[mypy]\npython_version = 3.14\n[mypy-pyarrow.*]\nignore_missing_imports = True\n")
    (tmp_path / "kvmmu").symlink_to(PACKAGE)
    command = [sys.executable, "-m", "mypy.stubtest", "--allowlist", allowed, "--ignore-unused-allowlist",
               "--ignore-disjoint-bases", "--mypy-config-file", config, *(module_of(stub) for stub in STUBS)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
