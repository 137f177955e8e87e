"""Traces of kvmmu's own plugin for QEMU: `examples/qemu-plugin/kvmmu_trace.c`."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kvmmu.traces._qemu import QemuRecords
from kvmmu.traces._sink import Sink
from kvmmu.traces.compressed import open_bytes
from kvmmu.traces.foreign import Brings, Columns, ForeignTrace, Notes, whole_records
from kvmmu.traces.header import MAX_VCPUS, TraceError

__all__ = ["FORMAT", "HEADER", "QemuPluginFormat"]

HEADER = np.dtype([("magic", "S8"), ("bytes", "<u4"), ("flags", "<u4"), ("vcpus", "<u4"), ("api", "<u4"), ("target", "S16"),
                   ("zero", "V24")])
_MAGIC = b"kvmmuQT1"
_TELLS_REGISTERS = 8                # of the flags
_UNIT = 16                          # bytes of a block's header, and of a record


class QemuPluginFormat:
    """A header of 64 bytes, then blocks of records of one vCPU each."""

    name = "qemu-plugin"

    def sniff(self, head: bytes, path: Path) -> int:
        return 100 if head.startswith(_MAGIC) else 0

    def open(self, path: Path, *, fetch: bool = True, events: bool | None = None) -> ForeignTrace:
        """Open a trace of the plugin.

        Parameters
        ----------
        path : Path
        fetch : bool
            Read instruction fetches too.
        events : bool, optional
            Read values of stores as GUEST_WRITE and changes of registers as MOV_CR3 and so on, where the plugin could tell them.
            They need guest memory and registers to be replayed. By default they are read when the trace is replayed on a vCPU.
        """
        with open_bytes(path) as stream:
            header = _header_of(path, stream.read(HEADER.itemsize))
        vcpus = int(header["vcpus"]) or MAX_VCPUS
        tells = bool(events and header["flags"] & _TELLS_REGISTERS)

        def read(notes: Notes) -> Iterator[Columns]:
            with open_bytes(path) as stream:
                _header_of(path, stream.read(HEADER.itemsize))
                records = QemuRecords(fetch=fetch, events=bool(events))
                sink = Sink(vcpu=True, gpa=True, value=bool(events))
                for block, offset in whole_records(stream, _UNIT, "a record"):
                    position = 0
                    while position < len(block):
                        position, reason = records.run(block, position, sink)
                        if len(sink):
                            yield sink.take()
                        if reason is not None:
                            raise TraceError(f"{path}: what is at byte {HEADER.itemsize + offset + position} {reason}")
                if not events:
                    notes.add("values of stores", records.values)
                    notes.add("changes of registers", records.registers)
                notes.add("values of stores, what of them is in the next page", records.cut)
                if records.left:
                    raise TraceError(f"{path}: ends at byte {stream.offset}, inside a block: {records.left} records are missing")

        def with_events() -> ForeignTrace:
            return self.open(path, fetch=fetch, events=True)

        return ForeignTrace(self.name, path, read, Brings(gpa=True, ip=True, size=True, vcpu=True), vcpus=vcpus,
                            with_events=with_events if events is None else None, tells_registers=tells)


def _header_of(path: Path, data: bytes | bytearray) -> np.void:
    if len(data) < HEADER.itemsize or not data.startswith(_MAGIC):
        raise TraceError(f"{path}: has no header of {HEADER.itemsize} bytes that begins with {_MAGIC.decode()}")
    header: np.void = np.frombuffer(data, HEADER, 1)[0]
    if header["bytes"] != HEADER.itemsize:
        raise TraceError(f"{path}: its header has {header['bytes']} bytes; allowed are {HEADER.itemsize}")
    if header["vcpus"] > MAX_VCPUS:
        raise TraceError(f"{path}: its header tells {header['vcpus']} vCPUs; allowed are up to {MAX_VCPUS}")
    return header


FORMAT = QemuPluginFormat()
