"""Readers and writers of memory traces. They know nothing of the MMU and need numpy alone, but for Parquet (extra `arrow`)."""

from kvmmu._bits import Op
from kvmmu.traces._npz import RecordingError, open_npz
from kvmmu.traces.conversion import convert
from kvmmu.traces.header import Header, RegisterSet, Stage, TraceError
from kvmmu.traces.opening import describe_trace, open_trace
from kvmmu.traces.parquet import ParquetTrace, ParquetWriter, is_parquet
from kvmmu.traces.recording import Events, Faults, NptFaults, Recording, Writes, bundled
from kvmmu.traces.stream import Chunk, Trace

__all__ = [
    "Chunk", "Events", "Faults", "Header", "NptFaults", "Op", "ParquetTrace", "ParquetWriter", "Recording", "RecordingError",
    "RegisterSet", "Stage", "Trace", "TraceError", "Writes", "bundled", "convert", "describe_trace", "is_parquet", "open_npz",
    "open_trace",
]
