"""The extension modules of kvmmu, their two directive sets, and the build switches. All else is in pyproject.toml."""

import gc
import multiprocessing
import os
import re
import sys
from functools import cache
from pathlib import Path

from Cython.Build import cythonize
from Cython.Compiler import Options
from setuptools import Extension, setup

# Kernels index memory that their callers checked; the others keep Cython's own checks.
SAFE = ["arch._bits", "memory._maker", "walk.batch._arrays", "arch._roles", "memory._memory", "arch._format", "walk._columns",
        "walk._vcpu_arch", "walk._second_stage", "walk._register_sets", "walk._arguments", "walk._explain", "walk.pagewalk",
        "walker", "memory._lock", "machine._audit_tlb", "mmu.kvm._state", "mmu.audit._leaf", "mmu.audit._guest",
        "mmu.audit._shadow", "mmu.audit._audit", "mmu.kvm._inspect", "mmu.kvm._memslots", "memory._regions",
        "memory._callbacks", "walk._mappings", "embed._models", "embed._registers", "embed.c_api", "embed._tlb_fill",
        "memory._mapping", "memory._saved", "mmu.kvm._saved", "machine._saved", "machine._hw_record", "tlb._saved"]
KERNEL = ["_walk", "memory._vmx_memory", "walk._setup", "walk._fast", "walk.batch._kernels", "walk.batch._leaf",
          "walk.batch._psc", "walk.batch._leaves", "walk.batch._rows", "walk.batch._blocks", "walk.batch._uniform",
          "walk.batch._mixed", "walk.batch._schedule", "walk.batch._job", "replay._recorded_faults", "replay._replay_blocks",
          "replay._replay_registers", "traces._rows", "traces._places",
          "tables._edit", "tables._builder", "tables._page_set", "tables._filler", "tlb._tlb", "tlb._structure", "tlb._recency",
          "tlb._counts", "tlb._details", "tlb._levels", "tlb._hierarchy", "tlb._stream", "machine._exits", "machine._access",
          "machine._modes", "machine._machine", "mmu.core._spte", "mmu.core._slots", "mmu.core._rmap", "mmu.core._trace",
          "mmu.core._kvm", "mmu.core._page", "mmu.core._unsync", "mmu.core._fault", "mmu.tdp._tdp", "mmu.tdp._range",
          "mmu.shadow._zap", "mmu.shadow._range", "mmu.shadow._guest_tables", "mmu.shadow._leaf", "mmu.shadow._sync",
          "mmu.shadow._shadow", "mmu.shadow._roots", "mmu.shadow._track", "mmu.kvm._entry", "machine._explain",
          "machine._rights", "machine._roots", "machine._emulation", "machine._flushes", "machine._mmus", "mmu.core._pte_list",
          "mmu.kvm._gfns", "walk._scan", "mmu.core._copy", "embed._page_cache", "embed._vcpus", "embed._memories",
          "embed._lookups", "embed._nested_walk"]
# Parsers: kernels whose loops call methods of objects, which are no None, without the GIL.
PARSER = ["traces._sink", "traces._text", "traces._text_events", "traces._binary", "traces._qemu", "traces._recorded_rows",
          "replay._replay"]

# Modules that run when objects are made, looked at, saved or audited, and in no loop over rows: compiled for size. Whether a
# module belongs here was found by counting the instructions of scalar calls, batches, TLB hits and first touches.
SMALL = {"arch._bits", "arch._roles", "embed._registers", "embed.c_api", "machine._audit_tlb", "machine._explain",
         "machine._hw_record", "machine._mmus", "machine._saved", "memory._callbacks", "memory._maker", "memory._mapping",
         "memory._regions", "memory._saved", "mmu.audit._audit", "mmu.audit._guest", "mmu.audit._leaf", "mmu.audit._shadow",
         "mmu.kvm._inspect", "mmu.kvm._memslots", "mmu.kvm._saved", "mmu.kvm._state", "walk._columns", "walk._explain",
         "walk._mappings", "walk._register_sets", "walk._second_stage", "walk._vcpu_arch", "walker"}

# C sources beside the Cython source of a module.
C_SOURCES = {"walk.batch._kernels": [f"kvmmu/walk/batch/kernels/{name}.c" for name in ("portable", "avx2", "avx512")]}

# A class that can be pickled says how; Cython writes no methods of its own that refuse it.
SAFE_DIRECTIVES = {"language_level": 3, "binding": True, "embedsignature": True, "nonecheck": True, "auto_pickle": False}
KERNEL_DIRECTIVES = SAFE_DIRECTIVES | {
    "boundscheck": False, "wraparound": False, "initializedcheck": False, "cdivision": True}
PARSER_DIRECTIVES = KERNEL_DIRECTIVES | {"nonecheck": False}

DEBUG = os.environ.get("KVMMU_DEBUG_CYTHON") == "1"         # Cython's checks everywhere
WERROR = os.environ.get("KVMMU_WERROR") == "1"              # warnings of Cython and of the C compiler are errors
SANITIZE = os.environ.get("KVMMU_SANITIZE", "")             # e.g. "address,undefined"
# Keep the names of functions, for profilers and debuggers: always in place, and of other builds if this is 1.
SYMBOLS = os.environ.get("KVMMU_SYMBOLS") == "1" or SANITIZE or "--inplace" in sys.argv or "develop" in sys.argv

COMPILE_ARGS = ["-O3", "-std=gnu11", "-Wno-unused-function", "-g0"]      # of gcc and clang
LINK_ARGS = [] if SYMBOLS else ["-Wl,-x"] if sys.platform == "darwin" else ["-Wl,-s"]
if WERROR:
    Options.warning_errors = True
    COMPILE_ARGS += ["-Werror"]
if SANITIZE:
    COMPILE_ARGS += [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1"]
    LINK_ARGS += [f"-fsanitize={SANITIZE}"]


FOR_SIZE = [] if SANITIZE else ["-Os"]
# The code of memoryviews, which all modules share.
SHARED = Extension("kvmmu._cython", [], extra_compile_args=COMPILE_ARGS + FOR_SIZE, extra_link_args=LINK_ARGS)
# What a Cython compilation makes lives until its end. Looking for garbage as often as by default takes a third of its time.
gc.set_threshold(100_000, 20, 100)
# Processes that run Cython. A new start method would import this file once more.
CAN_FORK = "fork" in multiprocessing.get_all_start_methods() and sys.platform != "darwin"
if CAN_FORK:
    multiprocessing.set_start_method("fork", force=True)


@cache
def files_behind(path):
    """Return the files of kvmmu that a Cython or C source is compiled from: what it includes and cimports, and their own."""
    path = Path(path)
    text = path.read_text()
    found = {Path(name) for name in re.findall(r'^\s*(?:cdef extern from|#\s*include)\s+"(kvmmu/[^"]*)"', text, re.MULTILINE)}
    if path.suffix == ".pyx":
        found.add(path.with_suffix(".pxd"))
    for module in re.findall(r"^\s*(?:from|cimport) (kvmmu[\w.]*)(?: cimport|\s*$)", text, re.MULTILINE):
        found.add(Path(module.replace(".", "/")).with_suffix(".pxd"))
    found = {file for file in found if file.exists() and file != path}
    return frozenset(found.union(*map(files_behind, found)))


def headers_of(source):
    """Return the C files that a Cython source is compiled with."""
    return sorted(str(file) for file in files_behind(source) if file.suffix in (".h", ".c"))


def extensions(names, directives):
    modules = []
    for name in names:
        source = f"kvmmu/{name.replace('.', '/')}.pyx"
        more = C_SOURCES.get(name, [])
        headers = {header for file in (source, *more) for header in headers_of(file)}
        modules.append(Extension(f"kvmmu.{name}", [source, *more], include_dirs=["."],
                                 extra_compile_args=COMPILE_ARGS + (FOR_SIZE if name in SMALL else []),
                                 extra_link_args=LINK_ARGS, depends=sorted(headers)))
    return cythonize(modules + ([SHARED] if names is SAFE else []), compiler_directives=directives,
                     build_dir="build/cython-debug" if DEBUG else "build/cython", nthreads=os.cpu_count() if CAN_FORK else 0,
                     shared_utility_qualified_name=SHARED.name)


# What pip runs to ask for the name and the requirements, for which Cython need not run.
METADATA_ALONE = {"egg_info", "dist_info"} & set(sys.argv)

setup(
    ext_modules=[] if METADATA_ALONE else (
        extensions(SAFE, SAFE_DIRECTIVES) + extensions(KERNEL, SAFE_DIRECTIVES if DEBUG else KERNEL_DIRECTIVES) +
        extensions(PARSER, SAFE_DIRECTIVES | {"nonecheck": False} if DEBUG else PARSER_DIRECTIVES)),
    options={"build_ext": {"parallel": os.cpu_count()}},
)
