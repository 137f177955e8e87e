"""Readers and writers of memory traces. They know nothing of the MMU and need numpy alone, but for Parquet (extra `arrow`)."""
# Below: arch._bits, arch.arguments, arch.extras, arch.files, arch.words
# Order: _sink, _text, _text_events, _binary, _qemu, _recorded_rows, _arrow, _files, _npz, _schema, header, named, compressed,
#     _rows, _places, stream, foreign, on_memory, tables, qemu_plugin, qemu_execlog, pinatrace, perf_script, numpy_arrays,
#     csv, lackey, ftrace, drmemtrace, champsim, parquet, opening, recording, source, conversion

from typing import TYPE_CHECKING, Any

from kvmmu.arch._bits import Op
from kvmmu.traces._npz import RecordingError, open_npz
from kvmmu.traces.conversion import convert
from kvmmu.traces.header import Header, RegisterSet, Stage, TraceError
from kvmmu.traces.parquet import ParquetTrace, ParquetWriter, is_parquet
from kvmmu.traces.recording import Events, Faults, NptFaults, Recording, Writes, bundled
from kvmmu.traces.stream import Chunk, Trace

if TYPE_CHECKING:
    from kvmmu.traces.opening import describe_trace, open_trace

__all__ = [
    "Chunk", "Events", "Faults", "Header", "NptFaults", "Op", "ParquetTrace", "ParquetWriter", "Recording", "RecordingError",
    "RegisterSet", "Stage", "Trace", "TraceError", "Writes", "bundled", "convert", "describe_trace", "is_parquet", "open_npz",
    "open_trace",
]


def __getattr__(name: str) -> Any:
    """Load the readers of other tools' traces when somebody asks for them."""
    if name in ("describe_trace", "open_trace"):
        from kvmmu.traces import opening

        return getattr(opening, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
