"""What a replay found: the Report, its mismatches, and how a replay ends early."""

from dataclasses import dataclass, field
from typing import Any

__all__ = ["EXPLAINED", "Mismatch", "Report", "ReplayInterrupted"]

EXPLAINED = 20


@dataclass(frozen=True)
class Mismatch:
    """An access or a page fault of the recording that the walk does not reproduce.

    Attributes
    ----------
    position : int
        Number of the access; for a page fault, of the access that followed it.
    gva : int
        Linear address (bytes).
    recorded : str
        What the recording says.
    walked : str
        What the walk says, level by level.
    """

    position: int
    gva: int
    recorded: str
    walked: str

    def __str__(self) -> str:
        return f"access {self.position}: recorded {self.recorded}\n  walked: {self.walked}"


@dataclass
class Report:
    """What a replay found.

    Attributes
    ----------
    name, phase, mode : str
        Of the recording.
    accesses, verified : int
        Replayed, and walked to the recorded physical address.
    kinds : dict of str to int
        Accesses by load, store and fetch.
    page_sizes : dict of str to int
        Accesses that reached memory (as recorded, if that is known) by the size of the page they hit.
    faults, faults_reproduced : dict of str to int
        Recorded page faults by error code, and those that the walk reproduces with the same error code.
    faults_checked : bool
        False in a static phase, whose tables are those of its end: the pages of its faults are mapped in them.
    mismatches : int
        Accesses and faults that were not reproduced.
    examples : list of Mismatch
        The first of them, explained.
    table_writes, contexts, mmio : int
        Page-table writes applied, register contexts, and accesses to MMIO pages.
    seconds : float
        Time for walking and checking. Of a trace file, that of the whole replay: decoding runs beside the walk.
    unchecked : int
        Accesses without a recorded physical address.
    walk_faults : dict of str to int
        Unchecked accesses whose walk fails, by error code or status.
    waited : float
        Of `seconds`, those in which the walk had to wait for decoded rows.
    complete : bool
        False if the replay stopped before the end of the trace.
    """

    name: str
    phase: str
    mode: str
    accesses: int
    verified: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    page_sizes: dict[str, int] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)
    faults_reproduced: dict[str, int] = field(default_factory=dict)
    faults_checked: bool = True
    mismatches: int = 0
    examples: list[Mismatch] = field(default_factory=list)
    table_writes: int = 0
    contexts: int = 0
    mmio: int = 0
    seconds: float = 0.0
    unchecked: int = 0
    walk_faults: dict[str, int] = field(default_factory=dict)
    waited: float = 0.0
    complete: bool = True

    @property
    def rate(self) -> float:
        """Accesses per second."""
        return self.accesses / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        plain = dict(self.__dict__)
        plain["examples"] = [example.__dict__ for example in self.examples]
        return plain | {"rate": self.rate}


class ReplayInterrupted(KeyboardInterrupt):
    """Ctrl-C stopped a replay.

    Attributes
    ----------
    report : Report
        What was done until then.
    """

    def __init__(self, report: Report) -> None:
        super().__init__(f"interrupted after {report.accesses:,} accesses")
        self.report = report
