"""What is said of a file that is not there: what it should be, and what the caller may have meant."""

import pytest

import kvmmu
from kvmmu.cli import main
from kvmmu.traces import Recording, bundled, describe_trace

STDIN = "-: standard input is not read; want the path of a {}, a file that can be read more than once"


@pytest.mark.parametrize(("args", "words"), [
    (("replay", "{}"), "recording or trace"), (("compare", "{}"), "recording or trace"), (("spt", "{}"), "recording or trace"),
    (("convert", "{}", "out.parquet"), "recording or trace"), (("info", "{}"), "recording, trace or memory image"),
    (("pt", "{}"), "recording, trace or memory image"), (("walk", "{}", "0x1000"), "recording, trace or memory image"),
    (("read", "{}", "0x1000", "8"), "recording, trace or memory image"), (("diff", "{}"), "recording, trace or memory image"),
    (("replay", "bundled-lackey", "--image", "{}"), "image"), (("replay", "bundled-lackey", "--resume", "{}"), "checkpoint")])
def test_the_message_says_what_a_command_takes(tmp_path, monkeypatch, capsys, args, words):
    """`-` is told to be standard input."""
    monkeypatch.chdir(tmp_path)
    for name, message in (("lost", f"lost: no such {words}\n"), ("-", STDIN.format(words))):
        assert main([arg.format(name) for arg in args]) == 2
        out, err = capsys.readouterr()
        assert "" == out
        assert err.startswith(f"kvmmu: {message}")


@pytest.mark.parametrize(("name", "argument"), [("bundled", "recording"), ("bundled-lackey", "lackey")])
@pytest.mark.parametrize("function", [
    kvmmu.replay, kvmmu.open_trace, describe_trace, Recording.open, lambda trace: kvmmu.compare(trace, [kvmmu.Design()])])
def test_names_of_the_command_in_python(tmp_path, monkeypatch, name, argument, function):
    """The error says how Python finds the bundled data; the call works."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"{name}: no such .* is kvmmu.traces.bundled\('{argument}'\)"):
        function(name)
    assert bundled(argument).exists()


def test_a_file_of_such_a_name(tmp_path, monkeypatch, capsys):
    """`-` and `bundled-lackey` are files where there are such files."""
    monkeypatch.chdir(tmp_path)
    for name in ("-", "bundled-lackey"):
        (tmp_path / name).write_text("I  0040,3\n S 10,4\n")
        assert 2 == kvmmu.replay(name).accesses
        assert main(["info", "--json", name]) == 0
        assert '"accesses": 2' in capsys.readouterr().out
