"""The extension modules of kvmmu, their two directive sets, and the build switches. All else is in pyproject.toml."""

import os
import sys
from glob import glob

from Cython.Build import cythonize
from Cython.Compiler import Options
from setuptools import Extension, setup

# Kernels index memory that their callers checked; the others keep Cython's own checks.
SAFE = ["arch._bits", "memory._maker", "walk.batch._arrays", "arch._roles", "memory._regions", "memory._memory",
        "memory._callbacks", "arch._format", "walk._contexts", "walk._arguments", "walk._explain", "walk._mappings",
        "walk.pagewalk", "walker", "memory._lock", "machine._audit_tlb", "mmu.kvm._memory", "mmu.kvm._state",
        "mmu.audit._leaf", "mmu.audit._guest", "mmu.audit._shadow", "mmu.audit._audit", "mmu.kvm._inspect",
        "mmu.audit._damage"]
KERNEL = ["_walk", "walk._setup", "walk._fast", "walk._scan", "walk.batch._psc", "walk.batch._leaf",
          "walk.batch._rows", "walk.batch._straight", "walk.batch._blocks", "walk.batch._job", "replay._replay_blocks",
          "replay._replay", "traces._rows", "tables._edit", "tables._builder", "tables._page_set", "tables._filler",
          "tlb._tlb", "machine._exits", "machine._access", "machine._l1_flushes", "machine._modes", "machine._machine",
          "mmu.core._spte", "mmu.core._slots", "mmu.core._rmap", "mmu.core._trace", "mmu.core._kvm", "mmu.core._page",
          "mmu.core._unsync", "mmu.core._fault", "mmu.tdp._tdp", "mmu.tdp._range", "mmu.shadow._zap", "mmu.shadow._range",
          "mmu.shadow._guest_tables", "mmu.shadow._leaf", "mmu.shadow._sync", "mmu.shadow._shadow", "mmu.shadow._roots",
          "mmu.shadow._track", "mmu.kvm._entry"]
# Parsers: kernels whose loops call methods of objects, which are no None, without the GIL.
PARSER = ["traces._sink", "traces._text", "traces._text_events", "traces._binary", "traces._qemu"]

SAFE_DIRECTIVES = {"language_level": 3, "binding": True, "embedsignature": True, "nonecheck": True}
KERNEL_DIRECTIVES = SAFE_DIRECTIVES | {
    "boundscheck": False, "wraparound": False, "initializedcheck": False, "cdivision": True}
PARSER_DIRECTIVES = KERNEL_DIRECTIVES | {"nonecheck": False}

DEBUG = os.environ.get("KVMMU_DEBUG_CYTHON") == "1"         # Cython's checks everywhere
WERROR = os.environ.get("KVMMU_WERROR") == "1"              # warnings of Cython and of the C compiler are errors
SANITIZE = os.environ.get("KVMMU_SANITIZE", "")             # e.g. "address,undefined"

COMPILE_ARGS = ["/std:c11", "/O2"] if sys.platform == "win32" else ["-O3", "-std=gnu11", "-Wno-unused-function"]
LINK_ARGS = []
if WERROR:
    Options.warning_errors = True
    COMPILE_ARGS += ["-Werror"]
if SANITIZE:
    COMPILE_ARGS += [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1"]
    LINK_ARGS += [f"-fsanitize={SANITIZE}"]


def extensions(names, directives):
    modules = [
        Extension(f"kvmmu.{name}", [f"kvmmu/{name.replace('.', '/')}.pyx"], include_dirs=["."],
                  extra_compile_args=COMPILE_ARGS, extra_link_args=LINK_ARGS, depends=glob("kvmmu/**/*.h", recursive=True))
        for name in names
    ]
    return cythonize(modules, compiler_directives=directives, build_dir="build/cython-debug" if DEBUG else "build/cython")


setup(
    ext_modules=(extensions(SAFE, SAFE_DIRECTIVES) + extensions(KERNEL, SAFE_DIRECTIVES if DEBUG else KERNEL_DIRECTIVES) +
                 extensions(PARSER, SAFE_DIRECTIVES | {"nonecheck": False} if DEBUG else PARSER_DIRECTIVES)),
    options={"build_ext": {"parallel": os.cpu_count()}},
)
