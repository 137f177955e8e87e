#!/usr/bin/env python3
"""Build, test and try the sdist in a clean environment of each Python that is named; print a table.

    tools/try_pythons.py dist/kvmmu-0.1.0.tar.gz python3.11 python3.14 [--tests tests/arch tests/walk] [--folder DIR]

Each interpreter makes a virtual environment, builds a wheel from the sdist in it, installs the wheel with the extra `test`, and
runs the tests, then the examples of README and docs, from an empty folder that has the tests and documents of the sdist alone.
"""

import argparse
import os
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path

EXAMPLES = ("tests/test_docs.py", "tests/test_user_script.py")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sdist", type=Path)
    parser.add_argument("python", nargs="+")
    parser.add_argument("--tests", nargs="+", default=["tests"])
    parser.add_argument("--folder", type=Path, default=Path("build/pythons"))
    args = parser.parse_args()
    rows = [attempt(args.sdist.resolve(), python, args.tests, args.folder.resolve()) for python in args.python]
    print("| Python | build | tests | examples |\n|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    sys.exit(any("failed" in cell for row in rows for cell in row))


def attempt(sdist, python, tests, folder):
    """Return a row of the table."""
    name = subprocess.run([python, "-c", "import sys, sysconfig; print(sys.version.split()[0] + "
                           "('t' if sysconfig.get_config_var('Py_GIL_DISABLED') else ''))"],
                          check=True, capture_output=True, text=True).stdout.strip()
    top = folder / name
    with tarfile.open(sdist) as archive:
        archive.extractall(top)
    tree, = (path for path in top.glob("kvmmu-*") if path.is_dir())
    bin = top / "venv" / "bin"
    log = top / "log.txt"

    def run(*command, cwd=top):
        with log.open("a") as file:
            file.write(f"$ {' '.join(map(str, command))}\n")
        done = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"})
        with log.open("a") as file:
            file.write(done.stdout)
        return done

    began = time.monotonic()
    build = run(python, "-m", "venv", top / "venv")
    if not build.returncode:
        build = run(bin / "pip", "wheel", "--no-deps", "-w", top / "wheel", sdist)
    if build.returncode:
        return name, f"failed: {log}", "", ""
    wheel, = (top / "wheel").glob("*.whl")
    built = f"{wheel.stat().st_size / 1e6:.2f} MB, {time.monotonic() - began:.0f} s"
    install = run(bin / "pip", "install", f"kvmmu[test] @ {wheel.as_uri()}")
    if install.returncode:
        return name, built, f"failed to install: {log}", ""
    for path in ("kvmmu", "build"):                     # of the sdist only tests and documents stay
        if (tree / path).exists():
            (tree / path).rename(top / f"{path}-sources")
    return name, built, verdict(run(bin / "pytest", "-q", "-p", "no:cacheprovider", *tests, cwd=tree)), verdict(
        run(bin / "pytest", "-q", "-p", "no:cacheprovider", *EXAMPLES, cwd=tree))


def verdict(done):
    """Return the last line of pytest."""
    lines = [line for line in done.stdout.splitlines() if re.search(r"\d+ (passed|failed|skipped)|no tests ran|rror", line)]
    text = re.sub(r"=+ ?| ?=+", "", lines[-1]) if lines else "no result"
    return text if done.returncode == 0 else f"failed: {text}"


if __name__ == "__main__":
    main()
