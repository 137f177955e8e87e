# SPDX-License-Identifier: Apache-2.0
"""Figures of walks: every entry that was read has one cell, in order; failures are marked; the command saves them."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from builders import PageTables, mode_regs
from driver_nested import EptTables

import kvmmu
from kvmmu import Access, CpuModel, Ept, GuestMemory, Npt, Vcpu, WalkRecord, cli

matplotlib = pytest.importorskip("matplotlib", reason="needs matplotlib (extra plot)")
colors = pytest.importorskip("matplotlib.colors")
FAILED_EDGE = "#c00020"
GVA, PAGE_NGPA, NPT_BASE = 0x7F0000403123, 0x800000, 0x400000
HOST = 0x1000000                              # nGPA n lies at GPA HOST + n


def memory(*tables, offsets):
    """GuestMemory with these tables, each moved up by its offset."""
    gpas, data = [], []
    for table, offset in zip(tables, offsets, strict=True):
        where, pages = table.pages()
        gpas += (where + np.uint64(offset)).tolist()
        data += list(pages)
    return GuestMemory.from_pages(np.array(gpas, np.uint64), np.array(data, np.uint64))


def nested_record(mode="4l", access=0, *, guest_flags="p w u a d", spoil=None, gva=GVA):
    """A two-dimensional walk of `gva`, 4K pages everywhere; spoil(guest, host) may change the tables first."""
    guest, host = PageTables(mode, 0x100000), PageTables(mode, NPT_BASE)
    guest.map(gva & ~0xFFF, PAGE_NGPA, guest_flags, upper="p w u a")
    for ngpa in (*guest.tables(), PAGE_NGPA):
        host.map(ngpa, HOST + ngpa, "p w u a d", upper="p w u a")
    if spoil:
        spoil(guest, host)
    vcpu = Vcpu(memory(guest, host, offsets=(HOST, 0)), cpu=CpuModel(vendor="amd"), tdp="npt")
    vcpu.set_regs(**mode_regs("5l" if mode == "5l" else "4l", 0))
    vcpu.enter_nested(Npt(NPT_BASE, cr4=vcpu.regs.cr4, efer=vcpu.regs.efer), **guest.regs())
    return vcpu.gva_walk.walk_record(gva, access)


def flat_record(mode, access=0, flags="p w u a d", gva=0x403123):
    tables = PageTables(mode)
    tables.map(gva & ~0xFFF, 0x5000, flags)
    vcpu = Vcpu(memory(tables, offsets=(0,)))
    vcpu.set_regs(**tables.regs())
    return vcpu.gva_walk.walk_record(gva, access)


def cells(figure):
    """{gid: patch} of the cells."""
    return {patch.get_gid(): patch for patch in figure.axes[0].patches if patch.get_gid()}


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def reads(figure):
    return sum(gid.startswith("ref ") for gid in cells(figure))


def failed(figure):
    """gids of the cells that are marked."""
    edge = colors.to_rgba(FAILED_EDGE)
    return [gid for gid, patch in cells(figure).items() if patch.get_edgecolor() == edge]


def overlaps(figure):
    """Texts that run into each other or out of the figure."""
    renderer = pytest.importorskip("matplotlib.backends.backend_agg").FigureCanvasAgg(figure).get_renderer()
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in figure.axes[0].texts if text.get_text()]
    found = [one for one, box in boxes if box.x0 < 0 or box.y0 < 0 or box.x1 > figure.bbox.x1 or box.y1 > figure.bbox.y1]
    return found + [(one, other) for number, (one, a) in enumerate(boxes) for other, b in boxes[number + 1:]
                    if min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1]


@pytest.mark.parametrize(("mode", "refs"), [("4l", 24), ("5l", 35)])
def test_the_whole_grid(mode, refs):
    """24 references for 4-on-4, 35 for 5-on-5: numbered, and each with its place as the record has it."""
    record = nested_record(mode)
    figure = kvmmu.plot_walk(record)
    assert record.refs == reads(figure) == refs
    assert [text for text in texts(figure) if text.isdigit()] == [str(number + 1) for number in range(refs)]
    places = [f"at {place:#x}" for step in record.steps
              for place in (*(nested.gpa for nested in step.nested.steps), step.nested.gpa)]
    places += [f"at {step.gpa:#x}" for step in record.final.steps]
    assert [text for text in texts(figure) if text.startswith("at ")] == places
    assert failed(figure) == []
    assert "page" in cells(figure)
    assert record.outcome() in texts(figure)
    assert overlaps(figure) == []


@pytest.mark.parametrize(("mode", "refs"), [("32", 2), ("pae", 2), ("4l", 4), ("5l", 5)])
def test_one_stage_is_one_row(mode, refs):
    record = flat_record(mode)
    figure = kvmmu.plot_walk(record)
    assert record.refs == reads(figure) == refs
    assert ("register" in cells(figure)) == (mode == "pae")
    assert "PTE [3]" in texts(figure)
    assert "rwxu A D" in texts(figure)
    assert f"gpa {0x5123:#x}" in texts(figure)
    assert overlaps(figure) == []
    assert len({patch.get_y() for patch in cells(figure).values()}) == 1


def test_a_page_fault_marks_its_entry():
    record = flat_record("4l", Access.WRITE | Access.USER, "p u a")
    figure = kvmmu.plot_walk(record)
    assert failed(figure) == ["ref 4"]
    assert {"\N{BALLOT X} write", "#PF", record.outcome()} <= set(texts(figure))
    assert "page" not in cells(figure)
    assert overlaps(figure) == []


def test_an_address_that_is_not_canonical():
    figure = kvmmu.plot_walk(WalkRecord(
        gva=1 << 60, access=Access.READ, status=kvmmu.Status.NON_CANONICAL, gpa=None, error_code=0, level=0,
        rule="non-canonical"))
    assert failed(figure) == ["refused"]
    assert {"\N{BALLOT X} non-canonical", "#GP"} <= set(texts(figure))
    assert overlaps(figure) == []


def test_paging_off():
    vcpu = Vcpu(GuestMemory(0x4000))
    figure = kvmmu.plot_walk(vcpu.gva_walk.walk_record(0x1234))
    assert list(cells(figure)) == ["page"]
    assert "gpa 0x1234" in texts(figure)


def test_a_fault_of_the_first_stage_under_two():
    """The entry of the row is red; there is no final row."""
    record = nested_record(access=Access.WRITE | Access.USER, guest_flags="p u a d")
    figure = kvmmu.plot_walk(record)
    assert record.refs == reads(figure) == 20
    assert failed(figure) == ["ref 20"]
    assert "#PF" in texts(figure)
    assert "final nGPA" not in texts(figure)
    assert overlaps(figure) == []


def test_a_fault_of_the_second_stage_on_a_table():
    """The nested entry is red, and the entry that it hides is not drawn as read."""
    record = nested_record(spoil=lambda guest, host: host.clear_bits(guest.tables()[2], 1, 1))
    figure = kvmmu.plot_walk(record)
    assert record.refs == reads(figure) == 14
    assert failed(figure) == ["ref 14"]
    assert {"\N{BALLOT X} not-present", "#NPF", "not reached", record.outcome()} <= set(texts(figure))
    assert {"unread"} == {gid for gid in cells(figure) if not gid.startswith("ref ")}
    assert overlaps(figure) == []


def test_a_fault_of_the_second_stage_on_the_page():
    record = nested_record(access=Access.WRITE, spoil=lambda guest, host: host.clear_bits(PAGE_NGPA, 1, 2))
    figure = kvmmu.plot_walk(record)
    assert failed(figure) == ["ref 24"]
    assert {"\N{BALLOT X} write", "final nGPA"} <= set(texts(figure))


@pytest.mark.parametrize(("kind", "of_pae"), [(PageTables, 19), (EptTables, 14)], ids=["npt", "ept"])
def test_other_guests_under_a_second_stage(kind, of_pae):
    """PAE: the PDPTE is an entry under NPT, else a register, which nothing translates. Paging off: a final address alone."""
    guest, host = PageTables("pae", 0x100000), kind("4l", NPT_BASE)
    guest.map(0x403000, PAGE_NGPA)
    for ngpa in (*guest.tables(), PAGE_NGPA):
        host.map(ngpa, HOST + ngpa)
    vcpu = Vcpu(memory(guest, host, offsets=(HOST, 0)), tdp="ept" if kind is EptTables else "npt")
    vcpu.set_regs(**mode_regs("4l", 0))
    stage = Ept(NPT_BASE | 0x1E) if kind is EptTables else Npt(NPT_BASE, cr4=vcpu.regs.cr4, efer=vcpu.regs.efer)
    for registers, gva, refs in ((guest.regs(), 0x403123, of_pae), ({"cr0": 0x11, "cr4": 0, "efer": 0}, PAGE_NGPA, 4)):
        vcpu.leave_nested()
        vcpu.enter_nested(stage, **registers)
        record = vcpu.gva_walk.walk_record(gva)
        figure = kvmmu.plot_walk(record)
        assert record.refs == reads(figure) == refs
        assert ("register" in cells(figure)) == bool(record.steps and kind is EptTables)
        assert "page" in cells(figure)
        assert overlaps(figure) == []


def test_large_pages_leave_columns_empty():
    """A second stage of 1G pages has two entries a row."""
    guest, host = PageTables("4l", 0x100000), PageTables("4l", NPT_BASE)
    guest.map(GVA & ~0xFFF, PAGE_NGPA)
    host.map(0, 0, level=3)
    vcpu = Vcpu(memory(guest, host, offsets=(0, 0)), tdp="npt")
    vcpu.set_regs(**mode_regs("4l", 0))
    vcpu.enter_nested(Npt(NPT_BASE, cr4=vcpu.regs.cr4, efer=vcpu.regs.efer), **guest.regs())
    record = vcpu.gva_walk.walk_record(GVA)
    figure = kvmmu.plot_walk(record)
    assert record.refs == reads(figure) == 14
    assert "rwxu PS" in texts(figure)


def test_flags_of_ept_entries_are_its_own():
    """EPT has A and D in bits 8 and 9; bits 5:3 are the memory type."""
    step = replace(flat_record("4l").steps[-1], ept=True, entry=0x5037)
    assert step.flags == ""
    assert replace(step, entry=0x5337).flags == "A D"
    assert replace(step, entry=0x53B7, level=2).flags == "A D PS"
    assert str(replace(step, entry=0x5337)).endswith("A D")


def test_a_violation_of_ept():
    tables = PageTables("4l")
    tables.map(GVA & ~0xFFF, 0x5000)
    vcpu = Vcpu(memory(tables, offsets=(0,)))
    vcpu.enter_nested(Ept(0x3000 | 0x1E), **tables.regs())
    figure = kvmmu.plot_walk(vcpu.gva_walk.walk_record(GVA))
    assert failed(figure) == ["ref 1"]
    assert "EPT violation" in texts(figure)
    assert overlaps(figure) == []


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_files_and_axes_of_the_caller(tmp_path, suffix):
    path = tmp_path / f"walk.{suffix}"
    record = nested_record()
    assert kvmmu.plot_walk(record, path).axes
    assert path.stat().st_size > 10_000
    figure = pytest.importorskip("matplotlib.figure").Figure()
    axes = figure.subplots(1, 2)
    assert kvmmu.plot_walk(record, ax=axes[1]) is figure
    assert not axes[0].texts
    assert axes[1].texts


@pytest.mark.parametrize("json", [(), ("--json",)])
def test_the_command_saves_a_figure(tmp_path, capsys, json):
    path = tmp_path / "walk.png"
    assert cli.main(["walk", "bundled", "0x402000", "--plot", str(path), *json]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert ("4202496" if json else "0x402000") in capsys.readouterr().out


def test_the_command_draws_one_walk(tmp_path, capsys):
    path = tmp_path / "walk.png"
    assert cli.main(["walk", "bundled", "0x402000", "0x403000", "--plot", str(path)]) == 2
    assert capsys.readouterr().err == "kvmmu: --plot: a figure shows one walk, got 2 addresses\n"
    assert not path.exists()


def test_a_format_that_matplotlib_does_not_write(tmp_path, capsys):
    """Allowed is what the help says, the same for all commands and functions, also if matplotlib writes more."""
    for name, suffix in (("walk.xyz", ".xyz"), ("walk.jpg", ".jpg"), ("walk", "no suffix"), (".png", "no suffix")):
        path = tmp_path / name
        for command in (["walk", "bundled", "0x402000"], ["pt", "bundled"], ["compare", "bundled-lackey"]):
            assert cli.main([*command, "--plot", str(path)]) == 2
            assert capsys.readouterr().err == f"kvmmu: --plot: {path} ends in {suffix}; want .png, .svg or .pdf\n"
        with pytest.raises(ValueError, match=f"path: .* ends in {suffix}; want .png, .svg or .pdf"):
            kvmmu.plot_walk(flat_record("4l"), path)
    with pytest.raises(ValueError, match="path: is empty"):
        kvmmu.plot_walk(flat_record("4l"), "")
    with pytest.raises(TypeError, match="path: want a path or None, got int"):
        kvmmu.plot_walk(flat_record("4l"), 5)
    assert not list(tmp_path.iterdir())


def test_the_suffix_is_of_any_case(tmp_path):
    kvmmu.plot_walk(flat_record("4l"), tmp_path / "walk.PNG")
    assert (tmp_path / "walk.PNG").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"kvmmu\[plot\]"):
        kvmmu.plot_walk(flat_record("4l"))


def test_importing_the_package_leaves_matplotlib_alone():
    program = "import sys, kvmmu, kvmmu.cli; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", program], check=False).returncode == 0
