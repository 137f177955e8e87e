from typing import Self

from kvmmu.traces._text import LineParser

EVENTS: dict[str, int]

class Tasks(LineParser): ...

class PerfScript(Tasks):
    def __new__(cls, *, weight: bool = ..., ip: bool = ..., phys: bool = ..., strict: bool = ...) -> Self: ...

class Ftrace(Tasks):
    def __new__(cls, *, events: int = ..., shadow: bool = ..., strict: bool = ...) -> Self: ...
