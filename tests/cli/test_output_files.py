# SPDX-License-Identifier: Apache-2.0
"""Where `convert` and ParquetWriter write: what they replace, what they refuse, and what they leave behind."""

import gc
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from toy_traces import CLIPS, ENVIRONMENT, header

import kvmmu
from kvmmu import cli
from kvmmu.traces import ParquetTrace, ParquetWriter, Recording, TraceError, convert

pytest.importorskip("pyarrow", reason="PyArrow is not installed (extra arrow)")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="modes, links and special files of POSIX")

CLIP = CLIPS / "ntoy"
COMMAND = "import sys; from kvmmu.cli import main; sys.exit(main(sys.argv[1:]))"
ROWS = {"op": np.zeros(3, np.uint8), "addr": np.zeros(3, np.uint64), "access": np.zeros(3, np.uint8)}


def command(*args):
    return cli.main(["convert", *map(str, args)])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def is_trace(path):
    return ParquetTrace(path).rows > 0


# -- what is replaced ---------------------------------------------------------------------------------------------------

def test_a_new_file_has_the_mode_that_the_umask_leaves(tmp_path):
    before = os.umask(0o027)
    try:
        assert command(CLIP, tmp_path / "out.parquet") == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out.parquet").stat().st_mode) == 0o640


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o666, 0o400])
def test_a_file_that_is_replaced_leaves_its_mode(tmp_path, mode):
    out = tmp_path / "out.parquet"
    out.write_text("private")
    out.chmod(mode)
    seen = []

    def look(done, total):
        part, = set(names(tmp_path)) - {"out.parquet"}
        seen.append(stat.S_IMODE((tmp_path / part).stat().st_mode))
    convert(Recording.open(CLIP), out, progress=look)
    assert stat.S_IMODE(out.stat().st_mode) == mode
    assert is_trace(out)
    assert {other & 0o077 & ~mode for other in seen} == {0}, "nobody else reads it while it is written"


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_its_target_is_written(tmp_path, there):
    """The temporary file lies in the folder of the target, which may be another file system."""
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "real.parquet", tmp_path / "link.parquet"
    if there:
        target.write_text("before")
        target.chmod(0o600)
    link.symlink_to("elsewhere/real.parquet")
    assert command(CLIP, link) == 0
    assert (link.is_symlink(), os.readlink(link), is_trace(target)) == (True, "elsewhere/real.parquet", True)
    assert (names(tmp_path), names(tmp_path / "elsewhere")) == (["elsewhere", "link.parquet"], ["real.parquet"])
    assert not there or stat.S_IMODE(target.stat().st_mode) == 0o600


def test_another_name_of_the_file_that_is_replaced_keeps_it(tmp_path):
    """A hard link that is none of the inputs: the old content stays under the other name."""
    (tmp_path / "out").write_text("before")
    os.link(tmp_path / "out", tmp_path / "other")
    assert command(CLIP, tmp_path / "out") == 0
    assert ((tmp_path / "other").read_text(), is_trace(tmp_path / "out")) == ("before", True)


# -- what is refused ----------------------------------------------------------------------------------------------------

def make(path, kind):
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a directory":
        path.mkdir()
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(os.path.relpath(path))
    else:
        try:
            os.mknod(path, 0o666 | (stat.S_IFCHR if kind == "a character device" else stat.S_IFBLK), os.makedev(1, 3))
        except PermissionError:
            pytest.skip("making a device node needs root")
    return path.lstat()


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("kind", ["a FIFO", "a directory", "a socket", "a character device", "a block device"])
def test_what_is_no_file_is_refused_before_anything_is_read(tmp_path, monkeypatch, capsys, kind, linked):
    """Also by a link to it. It stays what it was. A recording that is not there shows that nothing was read."""
    monkeypatch.chdir(tmp_path)
    before = make(tmp_path / "out", kind)
    out = "out"
    if linked:
        out = "link"
        Path(out).symlink_to("out")
    assert command("lost", out) == 2
    out_text, err = capsys.readouterr()
    assert (out_text, err) == ("", f"kvmmu: {out}: is {kind}; allowed is a new file, or a regular one to replace\n")
    for write in (lambda: convert(Recording.open(CLIP), out), lambda: ParquetWriter(out, header())):
        with pytest.raises(OSError, match=f"is {kind}"):
            write()
    after = (tmp_path / "out").lstat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert names(tmp_path) == sorted({"out", out})


@pytest.mark.parametrize("way", ["itself", "hard link", "symbolic link", "path"])
@pytest.mark.parametrize("name", ["meta.json", "static_trace.npz", "tables.npz", "kvm_translate.npz"])
def test_a_file_of_the_recording_is_refused(tmp_path, capsys, name, way):
    """Under whatever name, those that this phase does not read as well."""
    rec = Path(shutil.copytree(CLIP, tmp_path / "rec"))
    out = rec / name
    if way == "hard link":
        os.link(out, tmp_path / "out")
    elif way == "symbolic link":
        (tmp_path / "out").symlink_to(out)
    out = {"itself": out, "path": tmp_path / "rec" / ".." / "rec" / name}.get(way, tmp_path / "out")
    before = (rec / name).read_bytes()
    assert command(rec, out) == 2
    assert "is the same file as" in capsys.readouterr().err
    with pytest.raises(OSError, match="is the same file as"):
        convert(Recording.open(rec), out)
    assert (rec / name).read_bytes() == before
    assert len(Recording.open(rec)) == 200_000


def test_a_new_file_in_the_folder_of_the_recording_is_allowed(tmp_path):
    rec = Path(shutil.copytree(CLIP, tmp_path / "rec"))
    assert command(rec, rec / "out.parquet") == 0
    assert is_trace(rec / "out.parquet")


@pytest.mark.parametrize("out", ["lost/out.parquet", "file/out.parquet", "loop", "x" * 300])
def test_places_that_cannot_be_written(tmp_path, monkeypatch, capsys, out):
    """The message has the name that was given, not that of the temporary file."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("loop").symlink_to("loop")
    assert command(CLIP, out) == 2
    assert capsys.readouterr().err.startswith(f"kvmmu: {out}: ")
    assert names(tmp_path) == ["file", "loop"]


def test_a_full_disk_is_told_with_the_name(tmp_path):
    """Here by a limit of the size of files. Nothing is left, and the file that was there is whole."""
    (tmp_path / "out.parquet").write_text("before")
    program = ("import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
               f"resource.setrlimit(resource.RLIMIT_FSIZE, (100_000,) * 2)\n{COMMAND}")
    done = subprocess.run([sys.executable, "-Pc", program, "convert", CLIP, tmp_path / "out.parquet"], text=True, check=False,
                          capture_output=True, env=ENVIRONMENT)
    assert (done.returncode, done.stderr) == (2, f"kvmmu: {tmp_path / 'out.parquet'}: File too large\n")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("out.parquet", "before")]


# -- the life of a writer -----------------------------------------------------------------------------------------------

def test_a_closed_writer_says_so(tmp_path):
    """close() twice is harmless, also within `with`; rows behind it are refused with a sentence."""
    with ParquetWriter(tmp_path / "out.parquet", header()) as writer:
        writer.write(ROWS)
        writer.close()
        with pytest.raises(ValueError, match="out.parquet: its writer is closed"):
            writer.write(ROWS)
    writer.close()
    assert ParquetTrace(tmp_path / "out.parquet").rows == 3
    assert names(tmp_path) == ["out.parquet"]


def test_a_writer_that_is_dropped_leaves_nothing(tmp_path):
    writer = ParquetWriter(tmp_path / "out.parquet", header())
    writer.write(ROWS)
    assert len(names(tmp_path)) == 1
    del writer
    gc.collect()
    assert names(tmp_path) == []


def test_a_program_that_ends_without_close_leaves_nothing(tmp_path):
    program = ("import sys\nfrom kvmmu.traces import *\nwriter = ParquetWriter(sys.argv[1], "
               "Header(registers=(RegisterSet(cr0=1, cr3=0, cr4=0, efer=0),)))\nsys.modules['keep'] = writer")
    subprocess.run([sys.executable, "-Pc", program, tmp_path / "out.parquet"], check=True, env=ENVIRONMENT)
    assert names(tmp_path) == []


def test_a_fork_leaves_the_file_of_its_parent(tmp_path):
    """A child that ends as Python does would otherwise remove the temporary file that the parent writes."""
    program = ("import os, sys\nfrom kvmmu.traces import *\nwriter = ParquetWriter(sys.argv[1], "
               "Header(registers=(RegisterSet(cr0=1, cr3=0, cr4=0, efer=0),)))\n"
               "if os.fork() == 0:\n    sys.exit()\nos.wait()\nwriter.close()")
    subprocess.run([sys.executable, "-Pc", program, tmp_path / "out.parquet"], check=True, env=ENVIRONMENT)
    assert names(tmp_path) == ["out.parquet"]


def test_rows_that_are_refused_leave_the_writer_usable(tmp_path):
    with ParquetWriter(tmp_path / "out.parquet", header()) as writer:
        writer.write(ROWS)
        with pytest.raises(TraceError):
            writer.write(ROWS | {"op": np.full(3, 99, np.uint8)})
        writer.write(ROWS)
    assert ParquetTrace(tmp_path / "out.parquet").rows == 6


def test_two_writers_of_one_file(tmp_path):
    """Each has a temporary file of its own; what is there in the end is that of one of them, whole."""
    recording, errors = Recording.open(CLIP), []

    def go(repeat):
        try:
            convert(recording, tmp_path / "one.parquet", repeat=repeat)
        except BaseException as error:
            errors.append(error)
    threads = [threading.Thread(target=go, args=(repeat,)) for repeat in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert names(tmp_path) == ["one.parquet"]
    report = kvmmu.replay(tmp_path / "one.parquet")
    assert report.accesses in (200_000, 400_000, 600_000)
    assert report.verified == report.accesses


def test_a_signal_while_the_temporary_file_is_made_leaves_nothing(tmp_path):
    """It comes when the file is there, and nobody but the exception knows of it."""
    code = f"""
import os, signal
from kvmmu.arch import files
close = os.close

def killed(descriptor):
    os.close = close
    close(descriptor)
    os.kill(os.getpid(), signal.SIGTERM)

def make(self, folder, make=files.NewFile._make):
    os.close = killed
    make(self, folder)

files.NewFile._make = make
{COMMAND}"""
    process = subprocess.run([sys.executable, "-Pc", code, "convert", CLIPS / "l4", tmp_path / "out.parquet"], env=ENVIRONMENT,
                             text=True, capture_output=True, timeout=60, check=False)
    assert names(tmp_path) == []
    assert (process.returncode, process.stdout, process.stderr) == (-signal.SIGTERM, "", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_signals_leave_nothing(tmp_path, number):
    """The temporary file is removed; the exit status is that of the signal."""
    process = subprocess.Popen([sys.executable, "-Pc", COMMAND, "convert", CLIPS / "l4", tmp_path / "out.parquet",
                                "--repeat", "10000"], env=ENVIRONMENT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 60
        while not names(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert names(tmp_path)[0].endswith(".part")
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert names(tmp_path) == []
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert (out, err) == ("", "kvmmu: interrupted\n" if number == signal.SIGINT else "")


def test_a_signal_that_a_parent_has_ignored_stays_ignored(tmp_path):
    """As under nohup."""
    program = ("import signal, sys, threading\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\nfrom kvmmu.cli import main\n"
               "threading.Timer(0, lambda: signal.raise_signal(signal.SIGHUP)).start()\nsys.exit(main(sys.argv[1:]))")
    done = subprocess.run([sys.executable, "-Pc", program, "convert", CLIP, tmp_path / "out.parquet"], env=ENVIRONMENT, text=True,
                          capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert is_trace(tmp_path / "out.parquet")
