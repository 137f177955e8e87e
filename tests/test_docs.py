# SPDX-License-Identifier: Apache-2.0
"""The examples of README and docs run.

The blocks of a page run in their order, in an empty folder: ```python in one namespace, the commands behind `$` of ```console
in a shell. Lines below a command are what it prints, and ```output is what the ```python before it prints; `...` stands for any
text, alone on a line for any lines. ```toml and ```json are read. Blocks of other languages show what other tools want, and do
not run: none of them has a command of kvmmu.
"""

import ast
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))}
BLOCK = re.compile(r"^```(\S*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
RUN = ("python", "output", "console", "toml", "json")


def blocks_of(page, *languages):
    """Yield language, line and text of the blocks of a page; of all languages by default."""
    for block in BLOCK.finditer(PAGES[page]):
        if not languages or block[1] in languages:
            yield block[1], PAGES[page].count("\n", 0, block.start()) + 2, block[2]


def commands_of(text):
    """Yield each command of a console block, with the lines below it."""
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, output = re.sub(r"\\\n>? *", "", part).partition("\n")
        yield command, output


def matches(expected, actual):
    """True if the output of a command is as the page shows it; as many spaces as there are count as one."""
    expected, actual = (re.sub(" +", " ", text) for text in (expected, actual))
    lines = ["(?:.*\n)*" if line.strip() == "..." else re.escape(line.rstrip()).replace(r"\.\.\.", ".*") + r" ?\n"
             for line in expected.splitlines()]
    return re.fullmatch("".join(lines), actual + ("" if actual.endswith("\n") else "\n")) is not None


def run_python(text, names, where):
    """Run a block; returns what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(text, where, "exec"), names)
    return printed.getvalue()


def run_console(text, where):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "COLUMNS": "120", "PYTHONSAFEPATH": "1"}
    for command, output in commands_of(text):
        done = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment, check=False)
        shown = done.stdout + done.stderr
        assert not output or matches(output, shown), f"{where}: {command}\nprints\n{shown}"
        assert output or done.returncode == 0, f"{where}: {command}\n{shown}"


@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks_of(page, *RUN))])
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, printed = {"__name__": "__main__"}, ""
    for language, line, text in blocks_of(page, *RUN):
        where = f"{page}:{line}"
        if language == "python":
            printed = run_python("\n" * (line - 1) + text, names, page)
        elif language == "output":
            assert matches(text, printed), f"{where}: the block before prints\n{printed}"
        elif language == "console":
            run_console(text, where)
        else:
            (tomllib if language == "toml" else json).loads(text)


@pytest.mark.parametrize("page", PAGES)
def test_blocks_can_be_pasted(page):
    """The interactive interpreter before Python 3.13 wants an empty line behind a statement with a body."""
    for _, line, text in blocks_of(page, "python"):
        lines = text.splitlines()
        for statement, following in pairwise(ast.parse(text).body):
            if hasattr(statement, "body"):
                assert not lines[statement.end_lineno].strip(), f"{page}:{line - 1 + following.lineno}: want an empty line before"


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_kvmmu_run(page):
    """Commands of kvmmu stand in blocks that run, but for what they say of the files of a guest that QEMU ran before."""
    for language, line, text in blocks_of(page):
        if language not in RUN and "(qemu)" not in text:
            assert not re.search(r"^(\$ )?kvmmu ", text, re.MULTILINE), f"{page}:{line}: want a block of console"


@pytest.mark.parametrize("page", PAGES)
def test_blocks_are_fenced(page):
    """An indented block would be none that is run."""
    text = BLOCK.sub("", PAGES[page])
    assert not re.findall(r"(?:^|\n)\n {4}(?! *[-*\d])\S.*", text)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", BLOCK.sub("", PAGES[page])):
        assert "://" in target or ((ROOT / page).parent / target).exists(), f"{page}: {target}"


@pytest.mark.parametrize(("expected", "actual", "same"), [
    ("a 1\nb\n", "a 1\nb\n", True), ("a ...\n", "a 17 x\n", True), ("a\n...\nz\n", "a\nb\nc\nz\n", True), ("a\n", "b\n", False),
    ("a\n...\n", "b\nc\n", False), ("a.b\n", "axb\n", False), ("a  b\n", "a b  \n", True)])
def test_outputs_are_compared(expected, actual, same):
    assert matches(expected, actual) == same
