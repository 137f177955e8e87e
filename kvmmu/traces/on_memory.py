"""A trace of another tool on memory that somebody gives: with its events, from registers on that are given too."""

from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from kvmmu.arch._bits import Op
from kvmmu.traces.foreign import ForeignTrace, Notes
from kvmmu.traces.header import Header, RegisterSet
from kvmmu.traces.stream import Chunk, Trace

__all__ = ["TraceOnMemory"]

_COLUMNS = ("op", "addr", "access", "gpa", "size", "vcpu", "value", "ip")


class TraceOnMemory(Trace):
    """A trace without registers, to be replayed on guest memory.

    Each processor begins with the registers that are given. Where the trace does not tell what registers its processors load,
    all of its rows are of one processor.

    Parameters
    ----------
    trace : Trace
        Of another tool. If its reader can tell events, they are read, unless it was opened with `events=False`.
    registers : RegisterSet
    slots : sequence of (int, int, bool)
        Of the memory: guest-physical address, size, whether it is read-only.

    Attributes
    ----------
    notes : Notes
        What the reader passed over in the last reading, and the stores that went to none of the slots.
    """

    def __init__(self, trace: Trace, registers: RegisterSet, slots: Sequence[tuple[int, int, bool]]) -> None:
        self._trace = trace.with_events() if isinstance(trace, ForeignTrace) else trace
        self._one_vcpu = not (isinstance(self._trace, ForeignTrace) and self._trace.tells_registers)
        header = trace.header
        super().__init__(Header(registers=(registers,) * (1 if self._one_vcpu else header.vcpus), name=header.name,
                                source=header.source), ())
        self.path = getattr(trace, "path", None)
        self._notes = Notes()
        writable = sorted((gpa, gpa + size) for gpa, size, readonly in slots if not readonly)
        self._starts, self._ends = (np.array([slot[n] for slot in writable], np.uint64) for n in (0, 1))

    @property
    def notes(self) -> Notes:
        skipped = dict(self._trace.notes.skipped) if isinstance(self._trace, ForeignTrace) else {}
        return Notes(skipped | self._notes.skipped)

    def chunks(self) -> Generator[Chunk]:
        """Yield the chunks, checked."""
        self._notes = Notes()
        for chunk in self._trace.chunks():
            within = self._without_lost_stores(chunk) if chunk.has_events else chunk
            yield replace(within, vcpu=None, vcpus=1) if self._one_vcpu else within

    def _without_lost_stores(self, chunk: Chunk) -> Chunk:
        """Return a chunk without its writes to where the memory has no writable slot: no walk can read them."""
        rows = np.flatnonzero(chunk.op == np.uint8(Op.GUEST_WRITE))
        if not rows.size:
            return chunk
        addr = chunk.addr[rows]
        slot = np.searchsorted(self._starts, addr, side="right")
        lost = slot == 0
        if self._starts.size:
            lost |= addr >= self._ends[np.maximum(slot, 1) - 1]
        if not lost.any():
            return chunk
        self._notes.add("stores outside of the memory", int(np.count_nonzero(lost)))
        kept = np.ones(len(chunk), bool)
        kept[rows[lost]] = False
        columns: dict[str, Any] = {name: getattr(chunk, name) for name in _COLUMNS}
        return replace(chunk, **{name: column[kept] for name, column in columns.items() if column is not None})
