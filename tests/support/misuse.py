# SPDX-License-Identifier: Apache-2.0
"""The C program of tests/embed that misuses kvmmu.h, under a sanitizer."""

import ctypes
import os
import subprocess
import tempfile
from pathlib import Path

from paths import ROOT


def run_misuse(sanitizers, times):
    """Build the program with sanitizers, and run it within this process, whose extension modules are built with them as well."""
    from kvmmu.embed import c_api

    with tempfile.TemporaryDirectory() as scratch:
        library = Path(scratch) / "misuse.so"
        subprocess.run([*os.environ.get("CC", "cc").split(), f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-g", "-O1",
                        "-shared", "-fPIC", "-pthread", ROOT / "tests" / "embed" / "misuse.c", f"-I{ROOT}", "-o", library],
                       check=True, env={name: value for name, value in os.environ.items() if name != "LD_PRELOAD"})
        misuse = ctypes.CDLL(str(library)).misuse
        misuse.argtypes = [ctypes.c_void_p]
        for _ in range(times):
            line = misuse(c_api.address)
            if line:
                raise AssertionError(f"line {line} of misuse.c")
