from kvmmu.traces._text import LineParser

EVENTS: dict[str, int]

class PerfScript(LineParser):
    def __init__(self, *, weight: bool = ..., ip: bool = ..., phys: bool = ..., strict: bool = ...) -> None: ...

class Ftrace(LineParser):
    def __init__(self, *, events: int = ..., shadow: bool = ..., strict: bool = ...) -> None: ...
