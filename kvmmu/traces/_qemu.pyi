from kvmmu.traces._sink import Sink

class QemuRecords:
    left: int
    values: int
    registers: int
    def __init__(self, *, fetch: bool = ..., events: bool = ...) -> None: ...
    def run(self, records: bytes | bytearray, start: int, sink: Sink) -> tuple[int, str | None]: ...
