"""What a report is headed by: the file that was read, whole."""

import pytest

from kvmmu.cli import main
from kvmmu.traces import bundled, convert, open_trace


def test_a_converted_trace_is_headed_by_its_file(tmp_path, capsys):
    """The trace in a Parquet file has the name of what it was converted from; the heading has both."""
    convert(open_trace(bundled("lackey")), tmp_path / "s.parquet")
    assert main(["replay", str(tmp_path / "s.parquet")]) == 0
    assert capsys.readouterr().out.startswith("s.parquet: sort.lackey.xz (lackey): 4-level paging")
    assert main(["replay", "bundled-lackey"]) == 0
    assert capsys.readouterr().out.startswith("sort.lackey.xz (lackey): 4-level paging")


@pytest.mark.usefixtures("tables")
def test_a_long_path_is_not_cut(tmp_path, capsys, monkeypatch):
    """No line ends inside a name, however narrow tables are."""
    monkeypatch.setenv("COLUMNS", "80")
    folder = tmp_path / ("a folder of a long name" * 4)
    folder.mkdir()
    (folder / "the_trace.csv").write_text("addr,op\n4096,R\n")
    assert main(["info", str(folder / "the_trace.csv")]) == 0
    assert str(folder / "the_trace.csv") == capsys.readouterr().out.splitlines()[0]


@pytest.fixture(params=["rich", "plain"])
def tables(request, monkeypatch):
    """Tables with rich, and without it."""
    if request.param == "plain":
        monkeypatch.setitem(__import__("sys").modules, "rich", None)
    else:
        pytest.importorskip("rich")


@pytest.mark.parametrize("command", ["walk", "pt", "read", "diff"])
def test_commands_on_images_name_their_argument_alike(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    out = capsys.readouterr().out
    assert "IMAGE" in out.split("positional arguments:")[1].split("options:")[0]
