"""Readers of memory traces. They know nothing of the MMU and need numpy alone."""

from kvmmu.traces._npz import RecordingError, open_npz
from kvmmu.traces.recording import Events, Faults, NptFaults, Recording, Writes, bundled

__all__ = ["Events", "Faults", "NptFaults", "Recording", "RecordingError", "Writes", "bundled", "open_npz"]
