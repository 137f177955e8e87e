from typing import Self

from kvmmu.traces._sink import Sink

REASONS: dict[int, str]

class QemuRecords:
    left: int
    values: int
    registers: int
    cut: int
    def __new__(cls, *, fetch: bool = ..., events: bool = ...) -> Self: ...
    def run(self, records: bytes | bytearray, start: int, sink: Sink) -> tuple[int, str | None]: ...
