from kvmmu.traces._sink import Sink

def champsim(records: bytes | bytearray, start: int, sink: Sink, *, cloudsuite: bool = ..., fetch: bool = ...) -> int: ...

class Threads:
    def __len__(self) -> int: ...

class Drmemtrace:
    version: int
    file_type: int
    timestamp: int
    prefetches: int
    flushes: int
    footers: int
    def __init__(self, threads: Threads, *, core: int = ..., fetch: bool = ..., narrow: bool = ...) -> None: ...
    def run(self, records: bytes | bytearray, start: int, sink: Sink,
            to_timestamp: bool = ...) -> tuple[int, bool, str | None]: ...
