# SPDX-License-Identifier: Apache-2.0
"""The kvmmu command: what it prints, as which exit status, and that bad input ends in one clear line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import format_files
import image_files
import numpy as np
import pytest
from paths import DATA, ROOT
from toy_recordings import NEEDS_ZSTD

import kvmmu
from kvmmu import cli
from kvmmu.comparison.passes import MadePasses
from kvmmu.replay import progress
from kvmmu.replay.synthetic import SyntheticRun
from kvmmu.traces import Recording, bundled, open_npz

CLIPS = DATA / "linux"
L4, L5, PAE = (str(CLIPS / name) for name in ("l4", "l5", "pae"))
JSON_KEYS = {"accesses", "verified", "faults", "mismatches", "seconds"}
CODE, HEAP, DIRECT = 0x402000, 0xFFFFFE0000000000, 0xFFFFFFFF86800000      # mapped in l4: 4K user, 4K kernel, 2M kernel
NX_PAGE = 0x400000                                                         # in l4: a user page, read-only and not executable


def run(capsys, *args):
    """(exit status, stdout, stderr) of the command; argparse leaves by SystemExit, all else returns."""
    try:
        status = cli.main([str(arg) for arg in args])
    except SystemExit as leave:
        status = leave.code
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return status, out, err


def command(*args, before="", **kwargs):
    """The command in a process of its own, after the statement `before`."""
    program = f"import sys\n{before}\nfrom kvmmu.cli import main\nsys.exit(main(sys.argv[1:]))"
    return subprocess.run([sys.executable, "-P", "-c", program, *map(str, args)], cwd=ROOT, text=True, check=False,
                          env=os.environ | {"PYTHONPATH": str(Path(kvmmu.__file__).parents[1]), "PYTHONUNBUFFERED": ""},
                          **{"capture_output": True} | kwargs)


@pytest.fixture(params=["rich", "plain"])
def tables(request, monkeypatch):
    """Tables with rich, and without it."""
    if request.param == "plain":
        monkeypatch.setitem(sys.modules, "rich", None)
    else:
        pytest.importorskip("rich")
    return request.param


@pytest.fixture
def copy(tmp_path):
    """A copy of the l4 clip that a test may spoil."""
    return Path(shutil.copytree(L4, tmp_path / "l4"))


def rewrite(file, **changes):
    np.savez(file, **open_npz(file) | changes)


def flip_row(root, row, mask=1 << 20):
    """Change the physical address of one page row; returns the rows of its accesses and the true address."""
    trace = open_npz(root / "static_trace.npz")
    gpa = trace["page_gpa"].copy()
    gpa[row] ^= np.uint64(mask)
    rewrite(root / "static_trace.npz", page_gpa=gpa)
    return np.flatnonzero(trace["pidx"] == row), int(trace["page_gpa"][row])


def cells(text):
    """The cells of printed tables, row by row."""
    return [[cell.strip() for cell in line.replace("│", "  ").split("  ") if cell.strip()] for line in text.splitlines()]


# -- kvmmu replay -------------------------------------------------------------------------------------------------------

def test_replay_without_arguments_takes_the_bundled_recording(capsys):
    status, out, err = run(capsys, "replay", "--json")
    result = json.loads(out)
    counts = json.loads((bundled() / "meta.json").read_text())["phases"]["dyn"]
    assert (status, err, out.count("\n")) == (0, "", 1)
    assert JSON_KEYS <= set(result)
    assert result["accesses"] == result["verified"] == counts["accesses"]
    assert result["mismatches"] == 0
    assert sum(result["faults"].values()) == counts["page_faults"]
    assert result["faults"] == result["faults_reproduced"]


def test_replay_prints_tables(capsys, tables):
    """Counts by kind, page size and error code, the same figures with rich and without."""
    status, out, err = run(capsys, "replay", L5)
    rows = cells(out)
    assert (status, err) == (0, "")
    for row in (["accesses", "1,500,000"], ["verified against recorded addresses", "1,500,000 (100%)"], ["mismatches", "0"],
                ["table writes applied", "11,169"], ["register contexts", "7"], ["load", "282,447"], ["fetch", "983,265"],
                ["4K", "441,350"], ["2M", "1,058,650"], ["0x14 (U F)", "16", "16"], ["0x7 (P W U)", "19", "19"]):
        assert row in rows
    assert out.startswith("l5, dyn phase, mode 5l")
    assert ("━" in out) == (tables == "rich")


def test_replay_of_a_static_phase_calls_its_faults_not_checkable(capsys, tables):
    status, out, _ = run(capsys, "replay", L4, "--phase", "static")
    assert (status, "not checkable" in out) == (0, True)


def test_replay_takes_a_trace_file(capsys):
    status, out, _ = run(capsys, "replay", f"{L5}/dyn_trace.npz", "--json")
    assert (status, json.loads(out)["phase"]) == (0, "dyn")


def test_replay_reports_a_mismatch(capsys, copy, tables):
    """One flipped bit: exit status 1, the accesses explained with both addresses, the rest counted."""
    rows, truth = flip_row(copy, 0)
    status, out, _ = run(capsys, "replay", copy)
    assert status == 1
    assert out.count("MISMATCH access ") == 20
    assert f"MISMATCH access {rows[0]}: recorded " in out
    assert f"... and {rows.size - 20:,} more" in out
    assert ["mismatches", f"{rows.size:,}"] in cells(out)
    assert f"-> gpa {truth + int(open_npz(copy / 'static_trace.npz')['off'][rows[0]]):#x} (4K page)" in out
    assert "100%" not in out


def test_replay_reports_a_mismatch_as_json(capsys, copy):
    rows, _ = flip_row(copy, 7)
    status, out, _ = run(capsys, "replay", copy, "--json")
    result = json.loads(out)
    assert (status, result["mismatches"], result["accesses"] - result["verified"]) == (1, rows.size, rows.size)
    assert [example["position"] for example in result["examples"]] == rows[:20].tolist()


def test_replay_in_a_process_of_its_own(copy):
    """Exit status 0, 1 and 2 as the shell sees them; nothing but JSON on stdout, nothing but the error on stderr."""
    good = command("replay", L4, "--json")
    assert (good.returncode, good.stderr, json.loads(good.stdout)["mismatches"]) == (0, "", 0)
    flip_row(copy, 0)
    bad = command("replay", copy, "--json")
    assert (bad.returncode, bad.stderr, json.loads(bad.stdout)["mismatches"] > 0) == (1, "", True)
    lost = command("replay", copy / "lost")
    assert (lost.returncode, lost.stdout, lost.stderr) == (2, "", f"kvmmu: {copy / 'lost'}: no such recording or trace\n")


def test_the_command_works_without_rich():
    done = command("replay", PAE, before="sys.modules['rich'] = None")
    assert (done.returncode, done.stderr) == (0, "")
    assert ["accesses", "200,000"] in cells(done.stdout)


@pytest.mark.parametrize("args", [("replay", PAE), ("replay", PAE, "--json"), ("walk", PAE, "0x804a000")])
@pytest.mark.parametrize("before", ["", "sys.modules['rich'] = None"], ids=["rich", "plain"])
def test_a_reader_that_leaves_is_no_mismatch(before, args):
    """`kvmmu replay | head -0`: status 1 would say that the recording has a mismatch. No noise on stderr either."""
    read, write = os.pipe()
    os.close(read)
    done = command(*args, before=before, capture_output=False, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def interrupted(*_, **__):
    raise KeyboardInterrupt


def test_interrupt(capsys, monkeypatch):
    """Ctrl-C: 130, as shells have it, and one line."""
    monkeypatch.setattr("kvmmu.cli.replay.replay", interrupted)
    status, out, err = run(capsys, "replay", L4)
    assert (status, out, err) == (130, "", "kvmmu: interrupted\n")


def test_progress_on_a_terminal_only(capsys, monkeypatch, tables):
    """A bar on stderr if that is a terminal, which ends at 100% in plain text; stdout is the same."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    status, out, err = run(capsys, "replay", L5, "--json")
    assert (status, json.loads(out)["verified"]) == (0, 1_500_000)
    if tables == "plain":
        assert err.startswith("\rreplaying l5 dyn: ")
        assert err.endswith("\rreplaying l5 dyn: 100%\n")


def test_progress_is_called_about_every_million_accesses():
    recording, calls = Recording.open(L5), []
    kvmmu.replay(recording, progress=lambda done, total: calls.append((done, total)))
    done = [0] + [call[0] for call in calls]
    assert {call[1] for call in calls} == {len(recording)}
    assert done == sorted(done)
    assert done[-1] == len(recording)
    assert max(np.diff(done)) <= 1 << 20


# -- kvmmu walk ---------------------------------------------------------------------------------------------------------

def by_hand(name, cr3, gva, shifts, entry_size):
    """The entries of a walk read straight from the file: a list of (index, address, entry)."""
    file = CLIPS / name / ("dyn_tables.npz" if name == "l5" else "tables.npz")
    archive = open_npz(file)
    pages = {int(pfn): page.tobytes() for pfn, page in zip(archive["pfn"], archive["data"], strict=True)}
    table, entries = cr3, []
    for shift in shifts:
        index = gva >> shift & (0x3 if name == "pae" and shift == 30 else 4096 // entry_size - 1)
        address = table + entry_size * index
        entry = int.from_bytes(pages[address >> 12][address & 0xFFF:][:entry_size], "little")
        entries.append((index, address, entry))
        table = entry & 0xFFFFFFFFFF000
        if shift < 39 and entry & 0x80:
            break
    return entries


@pytest.mark.parametrize(("name", "cr3", "gva", "shifts", "names", "size"), [
    ("l4", 0x2750000, CODE + 0x123, (39, 30, 21, 12), "PML4E PDPTE PDE PTE", "4K"),
    ("l4", 0x2750000, DIRECT + 0x1234, (39, 30, 21, 12), "PML4E PDPTE PDE", "2M"),
    ("l5", 0x106CE000, 0xFF1ADC201321F008, (48, 39, 30, 21, 12), "PML5E PML4E PDPTE PDE PTE", "4K"),
    ("l5", 0x106CE000, 0xFFFFFFFF81C00FFF, (48, 39, 30, 21, 12), "PML5E PML4E PDPTE PDE", "2M"),
    ("pae", 0x1211680, 0x804A004, (30, 21, 12), "PDPTE PDE PTE", "4K")])
def test_walk_prints_every_entry(capsys, name, cr3, gva, shifts, names, size):
    """Level, index, place and value of each entry; the rights so far; A and D; the page size and the recorded address."""
    status, out, err = run(capsys, "walk", CLIPS / name, hex(gva))
    lines = out.splitlines()
    entries = by_hand(name, cr3, gva, shifts, 8)
    assert (status, err) == (0, "")
    assert lines[0] == f"supervisor read of {gva:#x}"
    assert [line.split()[0] for line in lines[1:-2]] == names.split()
    write = user = execute = True
    for line, shift, (index, address, entry) in zip(lines[1:-2], shifts[:len(entries)], entries, strict=True):
        register = name == "pae" and shift == 30
        if register:
            entry &= ~0x20
        else:
            write, user, execute = write and entry & 2, user and entry & 4, execute and not entry >> 63
        rights = f"r{'w' if write else '-'}{'x' if execute else '-'}{'u' if user else '-'}"
        flags = [flag for bit, flag in ((5, "A"), (6, "D"), (8, "G"), (7, "PAT" if shift == 12 else "PS")) if entry >> bit & 1]
        assert f"[{index:4}]" in line
        assert ("register" if register else f"at {address:#014x}:") in line
        assert line.split(": ")[1].split() == [f"{entry:#018x}", rights, *flags]
    page = (1 << shifts[len(entries) - 1]) - 1
    gpa = entries[-1][2] & 0xFFFFFFFFFF000 & ~page | gva & page
    assert lines[-2:] == [f"  -> gpa {gpa:#x} ({size} page)", f"  recorded: gpa {gpa:#x} - as walked"]


@NEEDS_ZSTD
def test_walk_of_a_4m_page(capsys):
    """32-bit paging: a PDE with PS ends the walk; entries are four bytes."""
    status, out, _ = run(capsys, "walk", CLIPS / "p32", "0xcfb25abc")
    index, address, entry = by_hand("p32", 0x1CA8000, 0xCFB25ABC, (22, 12), 4)[0]
    assert entry & 0x81 == 0x81
    assert status == 0
    assert f"PDE   [{index:4}] at {address:#014x}: {entry:#018x} rwx- A D G PS" in out
    assert "-> gpa 0xfb25abc (4M page)\n  recorded: gpa 0xfb25abc - as walked" in out


def test_walk_of_several_addresses_as_json(capsys):
    status, out, _ = run(capsys, "walk", L4, hex(CODE), hex(1 << 47), "0x3039", "--json")
    result = json.loads(out)
    assert (status, JSON_KEYS <= set(result), result["seconds"] > 0) == (0, True, True)
    assert (result["accesses"], result["verified"], result["mismatches"]) == (3, 1, 0)
    assert result["faults"] == {"NON_CANONICAL": 1, "0x0": 1}
    first, canonical, missing = result["walks"]
    assert (first["gva"], first["status"], first["level"]) == (CODE, "OK", 1)
    assert first["recorded_gpa"] == [first["gpa"]] == [0x28D0000]
    assert [step["name"] for step in first["steps"]] == ["PML4E", "PDPTE", "PDE", "PTE"]
    assert [step["gpa"] for step in first["steps"]] == [a for _, a, _ in by_hand("l4", 0x2750000, CODE, (39, 30, 21, 12), 8)]
    assert (canonical["rule"], canonical["steps"], canonical["gpa"]) == ("non-canonical", [], None)
    assert (missing["rule"], missing["error_code"], missing["level"]) == ("not-present", 0, 2)
    assert missing["steps"][-1]["entry"] == 0


@pytest.mark.parametrize(("letters", "access", "outcome"), [
    ("r", "supervisor read", "#PF 0x1 (P): SMAP"), ("ra", "supervisor read", "-> gpa"), ("ru", "user read", "-> gpa"),
    ("wu", "user write", "#PF 0x7 (P W U): the page is read-only"), ("xu", "user fetch", "#PF 0x15 (P U F): the page is execute"),
    ("x", "supervisor fetch", "#PF 0x11 (P F): "), ("i", "implicit supervisor read", "#PF 0x1 (P): SMAP"),
    ("ia", "implicit supervisor read", "#PF 0x1 (P): SMAP")])
def test_access_letters(capsys, letters, access, outcome):
    """r w x u a i, combined; a fault of the guest is an answer, so the status is 0."""
    status, out, _ = run(capsys, "walk", L4, hex(NX_PAGE), "--access", letters)
    assert (status, out.splitlines()[0]) == (0, f"{access} of {NX_PAGE:#x}")
    assert outcome in out


def test_walk_in_another_context(capsys):
    """--ctx takes that row's CR3, and its recorded addresses only."""
    trace = open_npz(CLIPS / "l5" / "dyn_trace.npz")
    _, out, _ = run(capsys, "walk", L5, hex(HEAP), "--ctx", "3", "--json")
    walk = json.loads(out)["walks"][0]
    assert walk["steps"][0]["gpa"] & ~0xFFF == int(trace["ctx"][3, 1])
    rows = (trace["page_gva"] == HEAP) & (trace["page_ctx"] == 3)
    assert walk["recorded_gpa"] == trace["page_gpa"][rows].tolist()


def test_walk_contradicts_a_recorded_address(capsys, copy):
    """Exit status 1, the recorded address beside the walked one; a page that was never used proves nothing."""
    _, truth = flip_row(copy, 0)
    status, out, _ = run(capsys, "walk", copy, hex(CODE + 5))
    assert status == 1
    assert out.endswith(f"-> gpa {truth + 5:#x} (4K page)\n  recorded: gpa {(truth ^ 1 << 20) + 5:#x}\n")
    assert run(capsys, "walk", copy, hex(CODE), "--json")[0] == 1
    assert run(capsys, "walk", copy, hex(NX_PAGE))[0] == 0


# -- bad input ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("args", "words"), [
    ((), ["COMMAND"]),
    (("play",), ["'play'", "replay", "walk"]),
    (("replay", "lost"), ["lost: no such recording"]),
    (("replay", ROOT / "tests"), ["tests: is in no format that is known", "static_trace.npz", "dyn_trace.npz"]),
    (("replay", f"{L4}/meta.json"), ["meta.json: is in no format that is known", "static_trace.npz"]),
    (("replay", L4, "--phase", "dyn"), ["no phase 'dyn'", "available is static"]),
    (("replay", L4, "--phase", "live"), ["'live'", "static", "dyn"]),
    (("replay", f"{L5}/dyn_trace.npz", "--phase", "static"), ["is the dyn phase", "'static'"]),
    (("replay", L4, L5), [L5]),
    (("replay", ""), ["the name of the recording or trace is empty"]),
    (("walk", L4), ["GVA"]),
    (("walk", L4, "zz"), ["'zz'", "want hexadecimal with 0x"]),
    (("walk", L4, "402000"), ["'402000'", "0x402000 or 0x62250 (decimal 402000)"]),
    (("walk", L4, "10"), ["'10'", "0x10 or 0xa (decimal 10)"]), (("walk", L4, "beef"), ["'beef'", "with 0x: 0xbeef"]),
    (("walk", L4, "0b11"), ["'0b11'", "0x0b11"]), (("walk", L4, "0x"), ["'0x'"]), (("walk", L4, "9" * 5000), ["with 0x"]),
    (("walk", L4, "\u0661\u0662"), ["hexadecimal with 0x"]),
    (("walk", L4, "0x10000000000000000"), ["0x10000000000000000", "64 bits"]),
    (("walk", L4, "--", "-1"), ["-1", "64 bits"]),
    (("walk", L4, "1.5"), ["'1.5'", "hexadecimal"]),
    (("walk", L4, "0", "--ctx", "1"), ["--ctx 1", "0 to 0"]),
    (("walk", L5, "0", "--ctx", "-1"), ["--ctx -1", "0 to 6"]),
    (("walk", L4, "0", "--ctx", "first"), ["--ctx", "'first'", "int"]),
    (("walk", L4, "0", "--access", "rq"), ["'q'", "r w x u a i"]),
    (("walk", "lost", "0"), ["lost: no such recording"]),
    (("walk", L4, "0", "--phase", "dyn"), ["no phase 'dyn'", "available is static"])])
def test_bad_arguments(capsys, args, words):
    """Exit status 2; the message names the value and what is allowed; nothing on stdout."""
    status, out, err = run(capsys, *args)
    assert (status, out) == (2, "")
    last = err.splitlines()[-1]
    assert last.startswith("kvmmu")
    assert [word for word in words if word not in last] == []


@pytest.mark.parametrize("file", ["static_trace.npz", "tables.npz", "meta.json"])
@pytest.mark.parametrize("share", [0, 0.4, 0.999])
@pytest.mark.parametrize("args", [("replay",), ("walk", "0x402000")])
def test_truncated_recording(capsys, copy, file, share, args):
    """A file cut short is named; exit status 2."""
    whole = (copy / file).read_bytes()
    (copy / file).write_bytes(whole[:int(share * len(whole))])
    status, out, err = run(capsys, args[0], copy, *args[1:])
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"kvmmu: {copy / file}: ")


@pytest.mark.parametrize("command", ["replay", "walk"])
@pytest.mark.parametrize(("column", "mask", "word"), [
    (4, 1 << 5, "CR4.PAE"), (1, 1 << 45, "CR3"), (3, 1 << 0, "PE"), (5, 1 << 40, "EFER")])
def test_a_context_that_no_cpu_can_hold(capsys, copy, command, column, mask, word):
    """Illegal registers in a recording: one line that names the rule, exit status 2."""
    ctx = open_npz(copy / "static_trace.npz")["ctx"].copy()
    ctx[0, column] ^= np.uint64(mask)
    rewrite(copy / "static_trace.npz", ctx=ctx)
    status, out, err = run(capsys, command, copy, *(["0"] if command == "walk" else []))
    assert (status, out) == (2, "")
    assert err.startswith("kvmmu: ")
    assert word in err


def test_version_and_help(capsys):
    assert run(capsys, "--version")[:2] == (0, f"kvmmu {kvmmu.__version__}\n")
    for args in (["--help"], *([name, "--help"] for name in ("replay", "convert", "info", "pt", "read", "walk", "spt"))):
        status, out, _ = run(capsys, *args)
        assert (status, out.startswith("usage: kvmmu")) == (0, True)
        assert f"Examples:\n  kvmmu {'' if len(args) == 1 else args[0]}" in out
        assert "Exit status: 0; 1 a mismatch; 2 bad" in out


def examples():
    """The examples of all help texts, with a recording in place of the words for one."""
    found = []
    for name in ("replay", "convert", "info", "walk", "spt"):
        done = command(name, "--help")
        found += [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("  kvmmu ")]
    return found


def test_examples_of_the_help_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("pyarrow")
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "convert", L4, "l4.parquet")[0] == 0
    shutil.copy(bundled("lackey"), "sort.lackey.xz")
    Path("dump.elf").write_bytes(image_files.qemu_core(image_files.Guest()))
    Path("trace.csv").write_text("va,type\n0x1000,R\n")
    load = (0x40_0000, 0x3000, 3, format_files.LOAD, 0)
    Path("boot.qtrace").write_bytes(format_files.qemu_header(vcpus=1) + format_files.qemu_block(0, [load]))
    lines = examples()
    assert len(lines) >= 10
    for args in lines:
        real = [{"RECORDING": L5, "bundled": L4, "100": "2"}.get(arg, arg) for arg in args if args != ["replay"]]
        status, out, err = run(capsys, *(real or ["--version"]))
        assert (status, err, out != "") == (0, "", True), args


@pytest.mark.parametrize("total", [0, 10_000_000])
def test_progress_shows_rate_and_time_left(capsys, monkeypatch, tables, total):
    """On a terminal; a total that is unknown leaves out share and time."""
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    if tables == "plain":
        monkeypatch.setattr(progress.time, "perf_counter", lambda: float(next(clock)))
    with progress.progress_bar("replaying x") as advance:
        advance(2_000_000, total)
        advance(5_000_000, total)
    err = capsys.readouterr().err
    if tables == "plain" and total:
        assert [text.strip() for text in err.split("\r")[1:]] == [
            "replaying x: 20% 1.0 M/s, 8 s left", "replaying x: 50% 1.2 M/s, 4 s left"]
    elif tables == "plain":
        assert [text.strip() for text in err.split("\r")[1:]] == [
            "replaying x: 2,000,000 1.0 M/s", "replaying x: 5,000,000 1.2 M/s"]
    else:
        assert "replaying x" in err
        assert "M/s" in err


@pytest.mark.parametrize("bar", ["rich", "plain"])
@pytest.mark.parametrize("command", ["replay", "compare"])
def test_progress_tells_the_pass(capsys, monkeypatch, bar, command):
    """A trace without page tables is read for its pages first: the bar says so."""
    if bar == "plain":
        monkeypatch.setitem(sys.modules, "rich", None)
        monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    assert cli.main([command, "bundled-lackey", "--json"]) == 0
    err = capsys.readouterr().err
    doing = {"replay": "replaying", "compare": "comparing"}[command]
    if bar == "plain":
        passes = [err.index(f"{doing} sort.lackey.xz, {words}: ") for words in ("pass 1 of 2, pages", "pass 2 of 2, walks")]
        assert passes == sorted(passes)
    else:
        assert "sort.lackey.xz, pass 2 of 2, walks" in err


@pytest.mark.parametrize("command", ["replay", "compare"])
def test_an_interrupt_of_the_first_pass(capsys, monkeypatch, command):
    """The message says that no walk had begun; there is nothing to report."""
    monkeypatch.setattr(SyntheticRun, "_add_pages", interrupted)
    monkeypatch.setattr(MadePasses, "_find_pages", interrupted)
    status, out, err = run(capsys, command, "bundled-lackey")
    assert (status, out) == (130, "")
    read = "after 0 rows were read for their pages" if command == "replay" else "while the trace was read for its pages"
    assert err == f"kvmmu: interrupted {read} (pass 1 of 2); no walk had begun\n"


@pytest.mark.parametrize("bar", ["rich", "plain"])
def test_progress_of_a_replay_that_resumes(capsys, monkeypatch, bar):
    """What was done before it does not count for the rate and the time left."""
    if bar == "plain":
        monkeypatch.setitem(sys.modules, "rich", None)
        monkeypatch.setitem(sys.modules, "rich.console", None)
    clock = iter(range(0, 1000, 1))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(progress.time, "perf_counter", lambda: float(next(clock)))
    with progress.progress_bar("replaying x", True) as advance:
        advance(900_000_000, 1_000_000_000)
        advance(901_000_000, 1_000_000_000)
        advance(904_000_000, 1_000_000_000)
    err = capsys.readouterr().err
    if bar == "plain":
        assert [text.strip() for text in err.split("\r")[1:]] == [
            "replaying x: 90%", "replaying x: 90% 1.0 M/s, 99 s left", "replaying x: 90% 2.0 M/s, 48 s left"]
    else:
        assert "M/s" in err
        assert "900." not in err


# -- where the output goes ----------------------------------------------------------------------------------------------

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="descriptors and devices of POSIX")
LAUNCHED = "import sys; from _kvmmu_command import main; sys.exit(main())"


def shell(redirection, *args, before="", **environment):
    """The command by a shell that redirects its output."""
    program = f"import sys\n{before}\nfrom kvmmu.cli import main\nsys.exit(main(sys.argv[1:]))"
    return subprocess.run(["sh", "-c", f'exec "$0" -P -c "$@" {redirection}', sys.executable, program, *map(str, args)],
                          capture_output=True, text=True, check=False, env=os.environ | {
                              "PYTHONPATH": str(Path(kvmmu.__file__).parents[1]), "PYTHONUNBUFFERED": ""} | environment)


@POSIX
@pytest.mark.parametrize("args", [("replay", PAE), ("replay", PAE, "--json"), ("walk", PAE, "0x804a000"), ("spt", PAE),
                                  ("convert", PAE, "/nowhere/out.parquet")])
def test_a_closed_stdout(args):
    """Told at once, before anything is done: what it prints is what the command is for."""
    done = shell(">&-", *args)
    assert (done.returncode, done.stderr) == (2, "kvmmu: standard output is closed: there is nowhere to print to\n")


@POSIX
def test_a_closed_stderr():
    """Nobody can be told; the answer and the status are the same."""
    done = shell("2>&-", "replay", PAE, "--json")
    assert (done.returncode, json.loads(done.stdout)["mismatches"]) == (0, 0)
    assert shell("2>&-", "replay", "lost").returncode == 2
    assert shell("2>&- >&-", "replay", "lost").returncode == 2
    assert shell("2>&- >&-", "lost").returncode == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("buffered", ["", "1"])
@pytest.mark.parametrize("args", [("replay", PAE), ("replay", PAE, "--json"), ("walk", PAE, "0x804a000"), ("spt", PAE),
                                  ("--help",), ("--version",)])
def test_a_full_stdout(args, buffered):
    """One line, and not Python's own at exit, which also has another status."""
    done = shell(">/dev/full", *args, PYTHONUNBUFFERED=buffered)
    assert (done.returncode, done.stderr) == (2, "kvmmu: standard output: No space left on device\n")


@pytest.mark.parametrize("before", ["", "sys.modules['rich'] = None"], ids=["rich", "plain"])
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437", "utf-8"])
def test_an_output_of_any_encoding(encoding, before, copy):
    """Tables in characters that it has; a name from a file with those that it has not as escapes."""
    meta = json.loads((copy / "meta.json").read_text())
    (copy / "meta.json").write_text(json.dumps(meta | {"scenario": "z\u00fcrich \u4e2d"}))
    program = f"import sys\n{before}\nfrom kvmmu.cli import main\nsys.exit(main(sys.argv[1:]))"
    environment = os.environ | {"PYTHONPATH": str(Path(kvmmu.__file__).parents[1]), "PYTHONIOENCODING": encoding}
    command = [sys.executable, "-P", "-c", program, "replay", copy]
    done = subprocess.run(command, capture_output=True, check=False, env=environment)
    text = done.stdout.decode(encoding)
    assert (done.returncode, done.stderr) == (0, b"")
    shown = "z\u00fcrich \u4e2d".encode(encoding, "backslashreplace").decode(encoding)
    assert text.startswith(f"{shown}, static phase, mode 4l")
    rows = [[cell.strip() for cell in line.replace("|", "  ").split("  ") if cell.strip()] for line in text.splitlines()]
    assert ["accesses", "200,000"] in (rows if "\u2502" not in text else cells(text))


def test_text_from_files_is_text(capsys, copy, tables):
    """Neither markup nor escape sequences nor line ends of a name reach the terminal."""
    name = "[link=file:///etc/passwd]click[/link] [/b] :smile: \x1b]0;title\x07 \x9b31m \u202e \r\nb"
    meta = json.loads((copy / "meta.json").read_text())
    (copy / "meta.json").write_text(json.dumps(meta | {"scenario": name}))
    status, out, err = run(capsys, "replay", copy)
    assert (status, err) == (0, "")
    shown = r"[link=file:///etc/passwd]click[/link] [/b] :smile: \x1b]0;title\x07 \x9b31m \u202e \r\nb, static phase, mode 4l"
    assert " ".join(shown.split()) in " ".join(out.split())
    assert not set(out) & set("\x1b\x07\x9b\u202e\r")


@POSIX
def test_names_of_files_in_messages_are_text(capsys, tmp_path):
    """One line, without escapes and without bytes that no encoding has."""
    path = os.fsdecode(os.fsencode(str(tmp_path)) + b"/a\x1b[31m\nb\xff")
    status, out, err = run(capsys, "replay", path)
    assert (status, out) == (2, "")
    assert err == f"kvmmu: {tmp_path}/a\\x1b[31m\\nb\\udcff: no such recording or trace\n"


def test_progress_shows_names_as_text(capsys, monkeypatch, tables):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress.progress_bar("replaying [/b] \x1b]0;t\x07") as advance:
        advance(2_000_000, 0)
    err = capsys.readouterr().err
    assert r"replaying [/b] \x1b]0;t\x07" in err


def test_a_long_message_is_cut(capsys, copy):
    meta = json.loads((copy / "meta.json").read_text())
    (copy / "meta.json").write_text(json.dumps(meta | {"cr0": "z" * 100_000}))
    status, _, err = run(capsys, "replay", copy)
    assert (status, len(err) < 3000, err.startswith(f"kvmmu: {copy}/meta.json: cr0: is 'zzz")) == (2, True, True)


@pytest.mark.parametrize(("error", "status", "words"), [
    (MemoryError(), 2, "kvmmu: out of memory"), (MemoryError("so much"), 2, "kvmmu: out of memory: so much"),
    (OSError(5, "Input/output error", "file"), 2, "kvmmu: file: Input/output error"), (RuntimeError("what"), 3, "kvmmu: a bug"),
    (PermissionError(13, "Permission denied", b"file\xff"), 2, "kvmmu: file\\udcff: Permission denied")])
def test_exit_status_1_is_a_mismatch_and_nothing_else(capsys, monkeypatch, error, status, words):
    def failing(*_, **__):
        raise error
    monkeypatch.setattr("kvmmu.cli.replay.replay", failing)
    assert cli.main(["replay", L4]) == status
    assert capsys.readouterr().err.splitlines()[0].startswith(words)


# -- how it starts ------------------------------------------------------------------------------------------------------

def test_as_a_module():
    done = subprocess.run([sys.executable, "-P", "-m", "kvmmu", "--version"], text=True, capture_output=True, check=False,
                          env=os.environ | {"PYTHONPATH": str(Path(kvmmu.__file__).parents[1])})
    assert (done.returncode, done.stdout, done.stderr) == (0, f"kvmmu {kvmmu.__version__}\n", "")


def started(before, *args, ignored=False):
    """The command as its script starts it, with a module in the middle of its imports that says so and waits."""
    program = "\n".join([
        "import signal, sys", "class Waiting:", "    def find_spec(self, name, path=None, target=None):",
        f"        if name == {before!r}:", "            print('here', flush=True)", "            import time",
        f"            time.sleep({1 if ignored else 60})", "sys.meta_path.insert(0, Waiting())",
        "signal.signal(signal.SIGINT, signal.SIG_IGN)" if ignored else "", LAUNCHED])
    return subprocess.Popen([sys.executable, "-Pc", program, *args], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=os.environ | {"PYTHONPATH": os.pathsep.join(
                                [str(Path(kvmmu.__file__).parents[1]), str(ROOT)])})


@POSIX
@pytest.mark.parametrize("module", ["kvmmu", "numpy", "kvmmu.arch._bits", "kvmmu.vm.vcpu", "kvmmu.cli", "rich.table"])
def test_ctrl_c_during_the_imports(module):
    """One line and 130, wherever it comes."""
    process = started(module, "replay", PAE)
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "kvmmu: interrupted\n")


@POSIX
def test_an_ignored_ctrl_c_stays_ignored():
    process = started("kvmmu.cli", "replay", PAE, "--json", ignored=True)
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, json.loads(out)["mismatches"], err) == (0, 0, "")


@POSIX
def test_tests_that_inherit_an_ignored_ctrl_c(tmp_path):
    """`trap "" INT; make test`, as in a background job: the test that sends a Ctrl-C passes, and at once."""
    began = time.monotonic()
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", ROOT / "tests" / "replay" / "test_trace_replay.py",
             "-k", "test_the_command_stops_on_sigint"]
    done = subprocess.run(["sh", "-c", 'trap "" INT; exec "$0" "$@"', sys.executable, *tests], cwd=tmp_path, text=True,
                          capture_output=True, check=False)
    assert done.returncode == 0, done.stdout
    assert time.monotonic() - began < 50


def test_nothing_more_is_imported_than_before():
    """`import kvmmu` without what only the command, its files or its output need. (rich imports some of it for itself.)"""
    program = ("import sys\nsys.modules['rich'] = None\nimport kvmmu\nprint(*{name.split('.')[0] for name in sys.modules} & "
               "{'mmap', 'pyarrow', 'zstandard', 'matplotlib', 'secrets'}, 'kvmmu.cli' in sys.modules)")
    done = subprocess.run([sys.executable, "-P", "-c", program], text=True, capture_output=True, check=True, env=os.environ | {
        "PYTHONPATH": str(Path(kvmmu.__file__).parents[1])})
    assert done.stdout == "False\n"


# -- traces -------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    """Clips as Parquet traces, made when they are asked for."""
    pytest.importorskip("pyarrow")
    from kvmmu.traces import convert

    folder = tmp_path_factory.mktemp("parquet")

    def made(name):
        path = folder / f"{name}.parquet"
        if not path.exists():
            convert(Recording.open(CLIPS / name), path)
        return path
    return made


@pytest.mark.parametrize(("name", "gva", "ctx"), [
    ("l4", hex(CODE + 0x123), "0"), ("l4", hex(DIRECT), "0"), ("l4", "0x3039", "0"), ("l5", hex(HEAP), "3"),
    ("pae", "0x804a004", "0"), ("ndyn", "0x401000", "1"), ("ntoy", "0x401000", "1")])
def test_walk_of_a_trace(capsys, parquet, name, gva, ctx):
    """The same walk as in the recording that it came from; it is not searched for recorded addresses."""
    status, out, err = run(capsys, "walk", CLIPS / name, gva, "--ctx", ctx)
    assert (status, err) == (0, "")
    expected = [line for line in out.splitlines() if not line.startswith("  recorded: ")]
    status, out, err = run(capsys, "walk", parquet(name), gva, "--ctx", ctx)
    assert (status, out.splitlines(), err) == (0, expected, "")


def test_walk_of_a_trace_begins_with_the_registers_of_its_start(capsys, parquet):
    trace = open_npz(CLIPS / "l5" / "dyn_trace.npz")
    first = int(trace["page_ctx"][trace["pidx"][0]])
    expected = run(capsys, "walk", parquet("l5"), "0xffffffff81c00fff", "--ctx", first)
    assert run(capsys, "walk", parquet("l5"), "0xffffffff81c00fff") == expected


@pytest.mark.parametrize(("args", "words"), [
    (["--ctx", "7"], "--ctx 7: the trace has contexts 0 to 6"), (["--ctx", "-1"], "--ctx -1: the trace has contexts 0 to 6"),
    (["--phase", "dyn"], "--phase dyn: a trace has one phase")])
def test_bad_arguments_with_a_trace(capsys, parquet, args, words):
    status, out, err = run(capsys, "walk", parquet("l5"), "0x0", *args)
    assert (status, out, err) == (2, "", f"kvmmu: {words}\n")


@pytest.mark.parametrize("name", ["l4", "l5", "pae", "ndyn"])
@pytest.mark.parametrize("args", [[], ["--tdp", "npt", "--backing", "4k"]])
def test_spt_of_a_trace(capsys, parquet, name, args):
    """The machine of a recording and that of its trace map the same."""
    found = []
    for source in (CLIPS / name, parquet(name)):
        status, out, err = run(capsys, "spt", source, "--json", *args)
        assert (status, err) == (0, "")
        found.append({(spte["kind"], spte["level"], spte["gfn"], spte["count"], spte["hpa"], spte["flags"])
                      for spte in json.loads(out)["sptes"] if spte["kind"] != "table"})
    assert found[0] == found[1] != set()


@pytest.mark.parametrize("command", ["walk", "spt"])
def test_a_trace_without_memory(capsys, tmp_path, command):
    pytest.importorskip("pyarrow")
    from kvmmu.traces import Header, ParquetWriter, RegisterSet

    with ParquetWriter(tmp_path / "x.parquet", Header(registers=(RegisterSet(cr0=1, cr3=0, cr4=0, efer=0),))) as writer:
        writer.write(op=np.zeros(1, np.uint8), addr=np.zeros(1, np.uint64), access=np.zeros(1, np.uint8))
    status, out, err = run(capsys, command, tmp_path / "x.parquet", *(["0x0"] if command == "walk" else []))
    assert (status, out) == (2, "")
    assert err.startswith(f"kvmmu: {tmp_path / 'x.parquet'}: the trace brings no memory")


def test_options_of_a_format(capsys, tmp_path):
    """--option gives every option of a reader, of the type that the reader declares."""
    table = tmp_path / "hexadecimal.csv"
    table.write_text("va;op\n10000;R\n1ffff;W\n")
    options = [part for text in ("base=16", "header=yes", "delimiter=;") for part in ("--option", text)]
    status, out, err = run(capsys, "info", table, "--columns", "addr=va", *options, "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)["kinds"] == {"load": 1, "store": 1, "fetch": 0}
    assert json.loads(out)["pages_touched"] == 2
    lackey = tmp_path / "lackey"
    lackey.write_text("I  04001090,3\n L 1ffeffe7e8,8\n" * 4)
    kinds = [json.loads(run(capsys, "replay", lackey, "--option", f"fetch={value}", "--json")[1])["kinds"]
             for value in ("yes", "false")]
    assert kinds == [{"load": 4, "store": 0, "fetch": 4}, {"load": 4, "store": 0, "fetch": 0}]


@pytest.mark.parametrize(("option", "message"), [
    ("base", "want NAME=VALUE; the options of the format csv are base, columns, delimiter, header, vcpus"),
    ("colour=red", "want NAME=VALUE; the options of the format csv are"), ("base=ten", "base is a number"),
    ("header=maybe", "header is one of yes, no, true, false"), ("base=8", "allowed for csv is 10 or 16")])
def test_options_that_a_format_does_not_have(capsys, tmp_path, option, message):
    table = tmp_path / "table.csv"
    table.write_text("addr,op\n4096,R\n")
    status, out, err = run(capsys, "replay", table, "--option", option)
    assert (status, out) == (2, "")
    assert message in " ".join(err.split())


def test_a_recording_has_no_options(capsys):
    status, _, err = run(capsys, "replay", L4, "--option", "base=16")
    assert status == 2
    assert "is a recording" in err
