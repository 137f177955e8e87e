"""What the benchmarks compile when they run: the plain C walker, and Cython loops over kvmmu's public `.pxd` files."""

import ctypes
import functools
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import kvmmu

HERE = Path(__file__).parent
FLAGS = ["-O3"]
SETUP = """
from Cython.Build import cythonize
from setuptools import Extension, setup

import kvmmu

setup(name="scalar_loops", ext_modules=cythonize(
    [Extension("scalar_loops", ["scalar_loops.pyx"], include_dirs=[kvmmu.get_include()], extra_compile_args=["-O3"])],
    compiler_directives={"language_level": 3, "binding": True, "boundscheck": False, "wraparound": False}))
"""


class Missing(Exception):
    """Something that a comparison needs is not on this machine; the message says what."""


@functools.cache
def folder():
    """A directory that lasts as long as the process."""
    made = tempfile.TemporaryDirectory(prefix="kvmmu-bench-")
    folder.keep = made
    return Path(made.name)


def compiler():
    """The system's C compiler, as a list of words."""
    words = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    if shutil.which(words[0]) is None:
        raise Missing(f"the C compiler {words[0]} is not installed")
    return words[:1]


@functools.cache
def plain_walk():
    """The shared object of plain_walk.c."""
    target = folder() / "plain_walk.so"
    subprocess.run([*compiler(), *FLAGS, "-std=gnu11", "-shared", "-fPIC", "-o", target, HERE / "plain_walk.c"], check=True)
    library = ctypes.CDLL(str(target))
    word, pointer = ctypes.c_uint64, ctypes.c_void_p
    arguments = [pointer, word, word, pointer, word, pointer, pointer, pointer]
    for name in ("plain_walk_rows", "plain_walk_chain"):
        getattr(library, name).argtypes, getattr(library, name).restype = arguments, None
    library.vmem_translate_rows.argtypes = [pointer, pointer, pointer, word, pointer]
    library.vmem_translate_rows.restype = word
    return library


@functools.cache
def plain_tlb():
    """The shared object of plain_tlb.c."""
    target = folder() / "plain_tlb.so"
    subprocess.run([*compiler(), *FLAGS, "-std=gnu11", "-shared", "-fPIC", "-o", target, HERE / "plain_tlb.c"], check=True)
    library = ctypes.CDLL(str(target))
    library.plain_tlb_run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    library.plain_tlb_run.restype = None
    library.plain_tlb_size.restype = ctypes.c_size_t
    return library


@functools.cache
def table_loops():
    """The shared object of table_loops.c, a program over the function table of kvmmu.h."""
    target = folder() / "table_loops.so"
    subprocess.run([*compiler(), *FLAGS, "-std=gnu11", "-shared", "-fPIC", f"-I{kvmmu.get_include()}", "-o", target,
                    HERE / "table_loops.c"], check=True)
    library = ctypes.CDLL(str(target))
    word, pointer = ctypes.c_uint64, ctypes.c_void_p
    library.open_guest.argtypes = [pointer, pointer, word, word, word, word, word, pointer, pointer]
    for name in ("walk_rows", "walk_many"):
        getattr(library, name).argtypes = [word, pointer, ctypes.c_size_t, ctypes.c_uint32, pointer]
    return library


@functools.cache
def scalar_loops():
    """The extension module of scalar_loops.pyx, built as one outside the tree."""
    compiler()
    shutil.copy(HERE / "scalar_loops.pyx", folder())
    (folder() / "setup.py").write_text(SETUP)
    environment = {**os.environ, "PYTHONPATH": str(Path(kvmmu.__file__).parents[1])}
    done = subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=folder(), env=environment,
                          capture_output=True, text=True, check=False)
    if done.returncode:
        raise Missing(f"the extension does not compile: {done.stderr[-2000:]}")
    built = next(path for path in folder().glob("scalar_loops*") if path.suffix in (".so", ".pyd"))
    spec = importlib.util.spec_from_file_location("scalar_loops", built)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
