"""Traces of ChampSim: records of 64 bytes, or of 96 for CloudSuite; usually `.champsimtrace.xz`."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kvmmu.traces._binary import champsim
from kvmmu.traces._sink import Sink
from kvmmu.traces.compressed import open_bytes
from kvmmu.traces.foreign import Brings, Columns, ForeignTrace, Notes, option_error, whole_records

__all__ = ["CLOUDSUITE", "FORMAT", "INSTRUCTION", "ChampsimFormat"]

INSTRUCTION = np.dtype([("ip", "<u8"), ("is_branch", "u1"), ("taken", "u1"), ("to_registers", "u1", 2),
                        ("from_registers", "u1", 4), ("stores", "<u8", 2), ("loads", "<u8", 4)])
CLOUDSUITE = np.dtype({"names": ["ip", "is_branch", "taken", "to_registers", "from_registers", "stores", "loads", "asid"],
                       "formats": ["<u8", "u1", "u1", ("u1", 4), ("u1", 4), ("<u8", 4), ("<u8", 4), ("u1", 2)],
                       "offsets": [0, 8, 9, 10, 14, 24, 56, 88], "itemsize": 96})
_FEWEST = 8                         # records that tell the format of a file with any name
_NEAR = 1 << 20                     # bytes to the next instruction, mostly


class ChampsimFormat:
    """One record is one instruction: its fetch, up to four loads, up to two stores (CloudSuite: four). Sizes are not told."""

    name = "champsim"

    def sniff(self, head: bytes, path: Path) -> int:
        named = "champsim" in path.name.lower()
        fits = max(_fit(head, INSTRUCTION), _fit(head, CLOUDSUITE))
        return 80 if named and fits > 0.5 else 55 if fits > 0.9 and len(head) >= _FEWEST * INSTRUCTION.itemsize else 0

    def open(self, path: Path, *, fetch: bool = True, record: int | None = None) -> ForeignTrace:
        """Open a ChampSim trace.

        Parameters
        ----------
        path : Path
        fetch : bool
            Read instruction fetches too.
        record : {64, 96}, optional
            Bytes of a record; told by the first ones otherwise.
        """
        if record is not None and record not in (64, 96):
            raise option_error(self.name, "record", record, "64 or 96")

        def read(notes: Notes) -> Iterator[Columns]:
            with open_bytes(path) as stream:
                head = stream.peek()
                itemsize = record or (96 if _fit(head, CLOUDSUITE) > _fit(head, INSTRUCTION) else 64)
                sink = Sink(size=False)
                for block, _ in whole_records(stream, itemsize, "an instruction"):
                    position = 0
                    while position < len(block):
                        position = champsim(block, position, sink, cloudsuite=itemsize == 96, fetch=fetch)
                        if len(sink):
                            yield sink.take()

        return ForeignTrace(self.name, path, read, Brings(ip=True))


def _fit(head: bytes, dtype: np.dtype[np.void]) -> float:
    """Return how much the head looks like such records, 0 to 1: 0 if one of them cannot be."""
    records = np.frombuffer(head, dtype, len(head) // dtype.itemsize)
    if not records.size:
        return 0.0
    ip = records["ip"]
    addresses = np.concatenate([records["loads"].ravel(), records["stores"].ravel(), ip])
    top = addresses >> np.uint64(47)
    canonical = (top == 0) | (top == (1 << 17) - 1)
    flags = (records["is_branch"] <= 1) & (records["taken"] <= 1)
    if not canonical.all() or not flags.all() or np.count_nonzero(ip < 0x1000) > ip.size // 20:
        return 0.0
    steps = np.abs(np.diff(ip.astype(np.int64)))
    near = (steps < _NEAR) & (steps > 0)
    return float(np.count_nonzero(near) + 1) / ip.size


FORMAT = ChampsimFormat()
