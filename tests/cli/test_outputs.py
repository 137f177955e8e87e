# SPDX-License-Identifier: Apache-2.0
"""The options that write files: they take no file that is read, nothing but regular files, and leave no half ones."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from toy_traces import ENVIRONMENT

import kvmmu
from kvmmu import Design, cli
from kvmmu.traces import Header, Trace, bundled

pq = pytest.importorskip("pyarrow.parquet", reason="PyArrow is not installed (extra arrow)")
pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra plot)")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="links, limits and special files of POSIX")
COMMAND = "import sys; from kvmmu.cli import main; sys.exit(main(sys.argv[1:]))"
LEVEL = '[[level]]\nname = "L1"\nsets = 1\nways = 4\n'


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with inputs of each kind, and no more: every test sees what is left in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_text("addr\n0x1000\n0x2000\n0x1000\n")
    np.save("t.npy", np.arange(0x1000, 0x9000, 64, dtype=np.uint64))
    (tmp_path / "tlb.toml").write_text(LEVEL)
    (tmp_path / "cost.toml").write_text("walk = 3\n")
    return tmp_path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def refused(capsys, *args):
    """The message of a command that fails."""
    assert cli.main(list(map(str, args))) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err


# ---- what is read ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize(("command", "file"), [
    (("replay", "t.npy", "--checkpoint"), "t.npy"), (("replay", "t.csv", "--checkpoint"), "t.csv"),
    (("replay", "t.csv", "--tlb", "tlb.toml", "--checkpoint"), "tlb.toml"),
    *((("compare", "t.csv", option), "t.csv") for option in ("--html", "--parquet")),
    *((("compare", "t.csv", "--tlb", "zen3,tlb.toml", option), "tlb.toml") for option in ("--html", "--parquet")),
    *((("compare", "t.csv", "--cost", "cost.toml", option), "cost.toml") for option in ("--html", "--parquet")),
    (("convert", "t.csv"), "t.csv")])
def test_what_is_read_is_not_replaced(here, capsys, command, file, linked):
    """Also under another name."""
    out = file
    if linked:
        out = "other"
        os.symlink(file, out)
    before = contents(here)
    want = f"kvmmu: {out}: is the same file as {file}, which is read; allowed is another file\n"
    assert refused(capsys, *command, out) == want
    assert contents(here) == before


@pytest.mark.parametrize("option", ["--plot", "--parquet"])
def test_what_pt_reads_is_not_replaced(here, capsys, option):
    os.rename("t.npy", "t.png")                     # what it is does not matter; nothing of it is read before
    assert "is the same file as t.png, which is read" in refused(capsys, "pt", "t.png", "--cr3", "0x1000", option, "t.png")
    assert "is the same file as t.png" in refused(capsys, "walk", "t.png", "0x0", "--cr3", "0x1000", "--plot", "t.png")
    assert "is the same file as t.png" in refused(capsys, "compare", "t.png", "--plot", "t.png")
    assert np.load("t.png").size == 512


def test_the_files_of_an_image_that_lie_beside_it(here, capsys):
    """VMware's state has its memory in another file, and the other way round."""
    for path in ("vm.vmem", "vm.vmss", "vm.vmsn"):
        (here / path).write_bytes(b"nothing")
    for read, out in (("vm.vmss", "vm.vmem"), ("vm.vmem", "vm.vmsn")):
        assert f"kvmmu: {out}: is the same file as {out}, which is read" in refused(capsys, "pt", read, "--parquet", out)
        assert f"kvmmu: {out}: is the same file as {out}" in refused(
            capsys, "replay", "t.csv", "--image", read, "--checkpoint", out)


@pytest.mark.parametrize(("names", "want"), [
    (("x.png", "x.png", "y.png"), "--html x.png: is the file of --parquet, too; want another file"),
    (("y.png", "x.png", "x.png"), "--plot x.png: is the file of --parquet, too; want another file"),
    (("./x.png", "y.png", "x.png"), "--plot x.png: is the file of --html, too; want another file")])
def test_two_outputs_of_one_name(here, capsys, names, want):
    before = contents(here)
    args = [part for pair in zip(("--html", "--parquet", "--plot"), names, strict=True) for part in pair]
    assert refused(capsys, "compare", "t.csv", *args) == f"kvmmu: {want}\n"
    assert contents(here) == before


def test_a_checkpoint_may_be_the_one_to_resume_from(here, capsys):
    def stop(done, total):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        kvmmu.replay("t.npy", checkpoint="state", progress=stop)
    assert cli.main(["replay", "t.npy", "--resume", "state", "--checkpoint", "state", "--checkpoint-every", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accesses"] == 512
    assert kvmmu.replay("t.npy", resume="state").accesses == 512


def test_checkpoints_that_nobody_writes(here, capsys):
    for more in ((), ("--resume", "state")):
        assert refused(capsys, "replay", "t.npy", "--checkpoint-every", "5", *more) == (
            "kvmmu: --checkpoint-every 5: no checkpoints are written; allowed with --checkpoint FILE\n")


# ---- what cannot be written --------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("command", "name"), [
    (("replay", "missing", "--checkpoint"), "state"), (("pt", "missing", "--parquet"), "f"),
    (("pt", "missing", "--plot"), "f.svg"), (("walk", "missing", "0x0", "--plot"), "f.svg"),
    (("compare", "missing", "--plot"), "f.pdf"),
    (("compare", "missing", "--html"), "f"), (("compare", "missing", "--parquet"), "f")])
def test_places_that_are_refused_before_anything_is_read(here, capsys, command, name):
    """The trace that is not there shows it. A FIFO would wait for a reader."""
    os.mkfifo(name)
    assert refused(capsys, *command, name) == f"kvmmu: {name}: is a FIFO; allowed is a new file, or a regular one to replace\n"
    assert refused(capsys, *command, f"none/{name}").startswith(f"kvmmu: none/{name}: No such file or directory")
    assert refused(capsys, *command, "") == f"kvmmu: {command[-1]}: is empty; want the name of a file\n"
    os.unlink(name)
    assert sorted(contents(here)) == ["cost.toml", "t.csv", "t.npy", "tlb.toml"]


@pytest.mark.parametrize(("command", "name"), [
    (("replay", "bundled", "--checkpoint-every", "0", "--checkpoint"), "state"), (("pt", "bundled", "--parquet"), "f"),
    (("pt", "bundled", "--plot"), "f.svg"), (("walk", "bundled", "0x401000", "--plot"), "f.svg"),
    (("compare", "bundled-lackey", "--plot"), "f.svg"), (("compare", "bundled-lackey", "--html"), "f"),
    (("compare", "bundled-lackey", "--parquet"), "f")])
def test_a_full_disk_leaves_no_half_file(here, command, name):
    """Here by a limit of the size of files. The message has the name, and what was there is whole."""
    if "--plot" in command:
        subprocess.run([sys.executable, "-Pc", "import matplotlib.font_manager"], check=True, env=ENVIRONMENT)    # its cache
    (here / name).write_text("before")
    before = contents(here)
    program = ("import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
               f"resource.setrlimit(resource.RLIMIT_FSIZE, (512,) * 2)\n{COMMAND}")
    done = subprocess.run([sys.executable, "-Pc", program, *command, name], text=True, check=False, capture_output=True,
                          env=ENVIRONMENT)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, f"kvmmu: {name}: File too large")
    assert contents(here) == before


# ---- from Python -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def found():
    return kvmmu.compare(bundled("lackey"), [Design()])


@pytest.mark.parametrize("method", ["to_html", "to_parquet", "plot"])
def test_comparisons_are_written_to_named_files(found, here, method):
    write = getattr(found, method)
    for path in (5, 0, True, b"f.png"):
        with pytest.raises(TypeError, match=f"path: want a path as str or path-like, got {type(path).__name__}"):
            write(path)
    with pytest.raises(ValueError, match="path: is empty"):
        write("")
    os.mkfifo("f.png")
    with pytest.raises(OSError, match="is a FIFO; allowed is a new file"):
        write("f.png")
    os.unlink("f.png")
    if method == "plot":
        for path in (here, "ff", ".png"):
            with pytest.raises(ValueError, match=f"path: {path} ends in no suffix; want .png, .svg or .pdf"):
                write(path)
    assert sorted(contents(here)) == ["cost.toml", "t.csv", "t.npy", "tlb.toml"]


@pytest.mark.parametrize("name", ["t.npy", "t.csv"])
def test_a_checkpoint_over_the_trace(here, name):
    with pytest.raises(OSError, match="is the same file as t.*, which is read"):
        kvmmu.replay(name, checkpoint=name)


def test_names_that_are_no_utf8(here, capsys):
    r"""They are shown as \udcff in what holds UTF-8 alone."""
    rows = {"op": np.zeros(4, np.uint8), "addr": np.arange(4, dtype=np.uint64) << np.uint64(12), "access": np.zeros(4, np.uint8)}
    odd = os.fsdecode(b"n\xff")
    found = kvmmu.compare(Trace(Header(registers=(), name=odd), [rows]), [Design(odd)])
    assert "n\\udcff" in found.to_html("a.html")
    assert "n\\udcff" in (here / "a.html").read_text(encoding="utf-8")
    found.to_parquet("a.parquet")
    assert pq.read_table("a.parquet").to_pydict()["name"] == ["n\\udcff"]
    found.plot("a.svg")
    (here / f"{odd}.csv").write_bytes((here / "t.csv").read_bytes())
    assert cli.main(["compare", f"{odd}.csv", "--html", "b.html", "--parquet", "b.parquet", "--plot", "b.svg"]) == 0
    capsys.readouterr()
    assert "n\\udcff" in (here / "b.html").read_text(encoding="utf-8")
