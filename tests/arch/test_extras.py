"""The hint where an optional package is missing."""

import sys
from pathlib import Path

import pytest

import kvmmu
from kvmmu.arch.extras import missing_extra
from kvmmu.images import kdump
from kvmmu.replay.scheduling import dask
from kvmmu.report.figure import matplotlib_or_error
from kvmmu.traces._arrow import pyarrow


@pytest.mark.parametrize(("module", "extra", "call"), [
    ("pyarrow", "arrow", pyarrow), ("dask", "dask", dask), ("matplotlib", "plot", matplotlib_or_error),
    ("lzo", "lzo", lambda: kdump._unpacker(kdump._LZO)), ("cramjam", "images", lambda: kdump.unsnap(b"")),
    ("zstandard", "images", lambda: kdump._unzstd(b""))])
def test_the_command_is_of_this_python(module, extra, call, monkeypatch):
    """The command that a message names installs into the Python that runs, in a virtual environment or not."""
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError) as caught:
        call()
    assert str(caught.value).endswith(f", the extra kvmmu[{extra}]: {sys.executable} -m pip install 'kvmmu[{extra}]'")


def test_a_path_with_a_blank(monkeypatch):
    """A shell takes the command as it is."""
    monkeypatch.setattr(sys, "executable", "/opt/my python/bin/python3")
    assert "'/opt/my python/bin/python3' -m pip install 'kvmmu[cli]'" in str(missing_extra("x", "cli"))


def test_one_place():
    """No other module tells how to install an extra."""
    texts = {path.name: path.read_text() for kind in ("*.py", "*.pyx") for path in Path(kvmmu.__file__).parent.rglob(kind)}
    assert ["extras.py"] == [name for name, text in texts.items() if "pip install" in text or "install kvmmu[" in text]
