"""A walk as a figure: its entries in the order of their reads, in two stages as the grid of the manuals. Needs matplotlib."""

import os
import textwrap
from typing import TYPE_CHECKING, Any

from kvmmu.arch._bits import Status
from kvmmu.arch.extras import missing_extra
from kvmmu.arch.faults import access_text, nested_title
from kvmmu.arch.files import check_path, writing
from kvmmu.arch.words import rights_text
from kvmmu.walk.record import WalkRecord, WalkStep, size_text

if TYPE_CHECKING:
    from os import PathLike

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["FIGURE_SUFFIXES", "check_figure_path", "matplotlib_or_error", "plot_walk", "save_figure"]

FIGURE_SUFFIXES = (".png", ".svg", ".pdf")

# All lengths are inches, which are also the units of the axes.
_CELL_WIDTH, _CELL_HEIGHT = 1.78, 0.92
_COLUMN, _ROW = 2.12, 1.38
_LABEL = 1.6
_TITLE, _HEADINGS, _BOTTOM, _MARGIN = 0.8, 0.35, 1.05, 0.25
_MIN_WIDTH = 8.8
_BOLD, _OUTCOME_LINE = 0.12, 0.26           # width and height of a letter of the outcome
_FONT = 9.0
_LINE = 0.2
_EDGE, _FAILED_EDGE = 1.2, 2.6            # points

# From the palette of Okabe and Ito, which colour-blind people tell apart; a failure also has a cross and a thick edge.
_FIRST = ("#dcebf7", "#0072b2")
_SECOND = ("#fbf5d2", "#9a8200")
_PAGE = ("#d5f0e6", "#00795a")
_FAILED = ("#fbdcdc", "#c00020")
_UNREAD = ("#ffffff", "#8a8a8a")
_FLAGS = {"A": "accessed", "D": "dirty", "G": "global", "PS": "large page", "PAT": "memory type"}
_INK = "#222222"
_FAINT = "#555555"


def matplotlib_or_error() -> Any:
    """Return matplotlib with the parts that figures are made of; an ImportError names the extra."""
    try:
        import matplotlib.figure
        import matplotlib.patches
    except ImportError:
        raise missing_extra("figures need matplotlib", "plot") from None
    return matplotlib


def check_figure_path(name: str, path: "str | PathLike[str]") -> str:
    """Return the format of a figure by the suffix of the path that it is to be saved at."""
    suffix = os.path.splitext(check_path(name, path))[1].lower()
    if suffix not in FIGURE_SUFFIXES:
        raise ValueError(f"{name}: {os.fspath(path)} ends in {suffix or 'no suffix'}; want {', '.join(FIGURE_SUFFIXES[:-1])} "
                         f"or {FIGURE_SUFFIXES[-1]}")
    return suffix[1:]


def save_figure(figure: "Figure", path: "str | PathLike[str]") -> None:
    """Save a figure: whole, or not at all."""
    kind = check_figure_path("path", path)
    with writing(path) as part:
        figure.savefig(part, format=kind)


def plot_walk(record: WalkRecord, path: "str | PathLike[str] | None" = None, ax: "Axes | None" = None) -> "Figure":
    """Draw one walk: each entry with its index, place, rights and flags, numbered in the order of the reads.

    A two-dimensional walk has one row per entry of the first stage and one for the final address: the entries of the second
    stage that translate its address, then the entry itself. Rights are those down to and including an entry, as in `str(record)`.
    An entry that failed is red, with its rule; beyond it nothing is drawn.

    Parameters
    ----------
    record : WalkRecord
        From `PageWalk.walk_record()` or `Vcpu.hw_walk_record()`.
    path : str or path-like, optional
        Save the figure there; the suffix chooses the format (.png, .svg, .pdf).
    ax : matplotlib.axes.Axes, optional
        Draw here; fonts do not shrink with it. By default on a figure of its own, of the size that the walk needs.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ImportError
        matplotlib is missing.
    ValueError, OSError
        `path` has another suffix, or cannot be written.
    """
    if not isinstance(record, WalkRecord):
        raise TypeError(f"record: want a WalkRecord, got {type(record).__name__}")
    if path is not None and not isinstance(path, str) and not hasattr(path, "__fspath__") and not hasattr(path, "write"):
        raise TypeError(f"path: want a path or None, got {type(path).__name__}")
    if ax is not None and not hasattr(ax, "get_figure"):
        raise TypeError(f"ax: want an Axes of matplotlib or None, got {type(ax).__name__}")
    matplotlib = matplotlib_or_error()
    if path is not None:
        check_figure_path("path", path)
    drawing = _Drawing(record)
    figure = None if ax is None else ax.get_figure(root=True)
    if ax is None or figure is None:
        figure = matplotlib.figure.Figure(figsize=(drawing.width, drawing.height), dpi=120)
        ax = figure.add_axes((0, 0, 1, 1))
    drawing.draw(ax)
    if path is not None:
        save_figure(figure, path)
    return figure


class _Drawing:
    """One walk on one Axes. The gid of a cell tells what it is: "ref 7", "register", "unread" or "page"."""

    def __init__(self, record: WalkRecord) -> None:
        self.record = record
        self.stages = [step.nested for step in record.steps if step.nested] + ([record.final] if record.final else [])
        self.two_dimensional = bool(self.stages)
        self.columns = max(len(stage.steps) for stage in self.stages) if self.stages else len(record.steps)
        self.rows = self._count_rows()
        self.top = _TITLE + (_HEADINGS if self.two_dimensional else 0)
        self.width = max(2 * _MARGIN + _LABEL + (self.columns + 1) * _COLUMN, _MIN_WIDTH)
        self.outcome = textwrap.wrap(record.outcome(), int((self.width - 2 * _MARGIN) / _BOLD))
        self.bottom = _BOTTOM + (len(self.outcome) - 1) * _OUTCOME_LINE
        self.height = self.top + self.rows * _ROW + self.bottom - (_ROW - _CELL_HEIGHT)
        self.reads = 0
        self.flags: set[str] = set()

    def _count_rows(self) -> int:
        if not self.two_dimensional:
            return 1
        for number, step in enumerate(self.record.steps):
            if step.nested is not None and step.nested.status:
                return number + 1
        return len(self.record.steps) + (self.record.final is not None)

    def draw(self, ax: "Axes") -> None:
        self.ax = ax
        ax.set_xlim(0, self.width)
        ax.set_ylim(0, self.height)
        ax.set_aspect("equal")
        ax.set_axis_off()
        self._write_title()
        if self.two_dimensional:
            self._draw_grid()
        else:
            self._draw_line()
        self._write_outcome()

    # ---- where things lie ---------------------------------------------------------------------------------------------

    def _x(self, column: int) -> float:
        """Return the left edge of a column of cells."""
        return _MARGIN + _LABEL + column * _COLUMN + (_COLUMN - _CELL_WIDTH) / 2

    def _y(self, row: int) -> float:
        """Return the middle of a row."""
        return self.height - self.top - row * _ROW - _CELL_HEIGHT / 2

    # ---- the two shapes -----------------------------------------------------------------------------------------------

    def _draw_line(self) -> None:
        steps = self.record.steps
        if steps:
            self._label(0, "root", "", "CR3" if steps[0].gpa is not None else "registers")
        else:
            self._label(0, "address", f"{self.record.gva:#x}", "")
            if self.record.status:
                self._arrow(0, -1, 0)
                self._cell(0, 0, _FAILED, "refused", width=_FAILED_EDGE)
                self._lines(0, 0, [self._cross(self.record), (_status_text(self.record.status), {"color": _FAILED[1]})])
        for column, step in enumerate(steps):
            failed = bool(self.record.status) and step is steps[-1]
            self._arrow(0, column - 1, column)
            self._entry(0, column, step, _FIRST, self.record if failed else None)
        if self.record.status == Status.OK:
            self._arrow(0, len(steps) - 1, self.columns)
            self._page(0)

    def _draw_grid(self) -> None:
        self._write_headings()
        record = self.record
        for row, step in enumerate(record.steps[:self.rows]):
            if row:
                self._turn(row)
            name = f"where the {step.name} lies"
            if step.gpa is None:
                self._label(row, "register", "", name)
            else:
                space = record.first_space
                self._label(row, f"{space}, from CR3" if row == 0 else space, f"{step.gpa:#x}", name)
            if step.nested is not None:
                self._second_stage(row, step.nested)
                if step.nested.status:
                    self._unread(row, f"{step.name} [{step.index}]")
                    return
            failed = record.status and record.final is None and step is record.steps[-1]
            self._arrow(row, len(step.nested.steps) - 1 if step.nested else -1, self.columns)
            self._entry(row, self.columns, step, _FIRST, record if failed else None)
        if record.final is not None:
            row = len(record.steps)
            if row:
                self._turn(row)
            self._label(row, f"final {record.first_space}", f"{record.ngpa:#x}", "where the byte lies")
            self._second_stage(row, record.final)
            if record.final.status:
                self._unread(row, "page")
            else:
                self._arrow(row, len(record.final.steps) - 1, self.columns)
                self._page(row)

    def _second_stage(self, row: int, stage: WalkRecord) -> None:
        for column, step in enumerate(stage.steps):
            failed = bool(stage.status) and step is stage.steps[-1]
            self._arrow(row, column - 1, column)
            self._entry(row, column, step, _SECOND, stage if failed else None)

    # ---- pieces -------------------------------------------------------------------------------------------------------

    def _cell(self, row: int, column: int, colours: tuple[str, str], gid: str, *, width: float = _EDGE, style: str = "-") -> None:
        from matplotlib.patches import FancyBboxPatch

        face, edge = colours
        self.ax.add_patch(FancyBboxPatch(
            (self._x(column), self._y(row) - _CELL_HEIGHT / 2), _CELL_WIDTH, _CELL_HEIGHT, gid=gid, facecolor=face,
            edgecolor=edge, linewidth=width, linestyle=style, boxstyle="round,pad=0,rounding_size=0.06", zorder=2))

    def _lines(self, row: int, column: int, texts: list[tuple[str, dict[str, Any]]]) -> None:
        """Draw lines of text, centred in a cell."""
        top = self._y(row) + _LINE * (len(texts) - 1) / 2
        for number, (text, style) in enumerate(texts):
            self.ax.text(self._x(column) + _CELL_WIDTH / 2, top - number * _LINE, text, ha="center", va="center_baseline",
                         fontsize=_FONT, family="monospace", zorder=3, **({"color": _INK} | style))

    def _entry(self, row: int, column: int, step: WalkStep, colours: tuple[str, str], failure: WalkRecord | None) -> None:
        """Draw the cell of one entry that was read; failure is the walk that ended here."""
        if step.gpa is not None:
            self.reads += 1
        self.flags.update(step.flags.split())
        gid = "register" if step.gpa is None else f"ref {self.reads}"
        if failure is not None:
            colours = _FAILED
        self._cell(row, column, colours, gid, width=_FAILED_EDGE if failure else _EDGE)
        if step.gpa is not None:
            self._badge(row, column, colours[1])
        place = "register" if step.gpa is None else f"{step.gpa if step.nested is None else step.nested.gpa:#x}"
        texts: list[tuple[str, dict[str, Any]]] = [
            (f"{step.name} [{step.index}]", {"weight": "bold"}),
            (place if step.gpa is None else f"at {place}", {}),
            (f"{rights_text(step.pte_access)} {step.flags}".rstrip(), {}),
        ]
        if failure is not None:
            texts.append(self._cross(failure))
            self.ax.text(self._x(column) + _CELL_WIDTH / 2, self._y(row) - _CELL_HEIGHT / 2 - 0.07, _status_text(failure.status),
                         ha="center", va="top", fontsize=_FONT, weight="bold", color=_FAILED[1], zorder=3)
        self._lines(row, column, texts)

    @staticmethod
    def _cross(failure: WalkRecord) -> tuple[str, dict[str, Any]]:
        """Return a line of a cell: a cross, and the rule."""
        return f"\N{BALLOT X} {failure.rule}", {"weight": "bold", "color": _FAILED[1]}

    def _page(self, row: int) -> None:
        """Draw the cell at the end of a walk that succeeds."""
        self._cell(row, self.columns, _PAGE, "page")
        size = size_text(self.record.page_size)
        self._lines(row, self.columns, [(size, {"weight": "bold"}), (f"{self.record.space} {self.record.gpa:#x}", {})])

    def _unread(self, row: int, name: str) -> None:
        """Draw the cell of an entry that the walk did not read."""
        self._cell(row, self.columns, _UNREAD, "unread", style="--")
        self._lines(row, self.columns, [(name, {"color": _FAINT}), ("not reached", {"color": _FAINT})])

    def _badge(self, row: int, column: int, colour: str) -> None:
        """Draw the number of a read on the upper left corner of its cell."""
        self.ax.text(self._x(column) + 0.04, self._y(row) + _CELL_HEIGHT / 2 - 0.02, str(self.reads), ha="center", va="center",
                     fontsize=_FONT - 1, weight="bold", color="white", zorder=5,
                     bbox={"boxstyle": "round,pad=0.25", "facecolor": colour, "edgecolor": "white", "linewidth": 0.8})

    def _label(self, row: int, title: str, address: str, name: str) -> None:
        """Draw the address or the register that a row starts from."""
        x, y = self._x(0) - 0.4, self._y(row)
        texts = [(title, "bold", _INK, "sans-serif"), (address, "normal", _INK, "monospace"),
                 (name, "normal", _FAINT, "sans-serif")]
        texts = [text for text in texts if text[0]]
        for number, (text, weight, colour, family) in enumerate(texts):
            self.ax.text(x, y + _LINE * ((len(texts) - 1) / 2 - number), text, ha="right", va="center_baseline", weight=weight,
                         color=colour, family=family, fontsize=_FONT if family == "monospace" else _FONT - 0.5, zorder=3)

    def _arrow(self, row: int, source: int, target: int) -> None:
        """Draw an arrow from cell to cell of a row; source -1 is the label."""
        start = self._x(0) - 0.36 if source < 0 else self._x(source) + _CELL_WIDTH
        self._line_to([(start, self._y(row)), (self._x(target), self._y(row))])

    def _turn(self, row: int) -> None:
        """Draw an arrow from the entry at the right of the row above to the label of this one."""
        right, left = self._x(self.columns) + _CELL_WIDTH / 2, _MARGIN + _LABEL / 2
        above = self._y(row - 1) - _CELL_HEIGHT / 2
        between = (above + self._y(row) + _CELL_HEIGHT / 2) / 2
        self._line_to([(right, above), (right, between), (left, between), (left, self._y(row) + 0.34)])

    def _line_to(self, points: list[tuple[float, float]]) -> None:
        """Draw a line through points with an arrow head at its end."""
        from matplotlib.patches import FancyArrowPatch
        from matplotlib.path import Path

        self.ax.add_patch(FancyArrowPatch(path=Path(points), arrowstyle="-|>,head_length=4,head_width=2.4", color=_FAINT,
                                          linewidth=1.1, joinstyle="round", zorder=1, shrinkA=0, shrinkB=0))

    # ---- words --------------------------------------------------------------------------------------------------------

    def _write_title(self) -> None:
        record = self.record
        self.ax.text(_MARGIN, self.height - 0.3, f"{access_text(record.access)} of {record.gva:#x}", fontsize=13, weight="bold",
                     color=_INK, va="center_baseline")

    def _write_headings(self) -> None:
        y = self.height - self.top + 0.26
        middle = (self._x(0) + self._x(self.columns - 1) + _CELL_WIDTH) / 2
        first, last = self.record.first_space, self.record.space.upper()
        headings = ((_MARGIN + _LABEL / 2, "address to read", _INK),
                    (middle, f"second stage: {first}\N{RIGHTWARDS ARROW}{last}", _SECOND[1]),
                    (self._x(self.columns) + _CELL_WIDTH / 2, f"first stage: GVA\N{RIGHTWARDS ARROW}{first}", _FIRST[1]))
        for x, text, colour in headings:
            self.ax.text(x, y, text, ha="center", va="center_baseline", fontsize=_FONT + 1, weight="bold", color=colour)

    def _write_outcome(self) -> None:
        failed = self.record.status != Status.OK
        colour = _FAILED[1] if failed else _PAGE[1]
        for number, line in enumerate(reversed(self.outcome)):
            self.ax.text(_MARGIN, 0.55 + number * _OUTCOME_LINE, line, fontsize=12, weight="bold", color=colour,
                         va="center_baseline")
        if not self.record.steps and not self.stages:
            return
        reads = "1 entry read" if self.reads == 1 else f"{self.reads} entries read"
        flags = ", ".join(f"{flag} {meaning}" for flag, meaning in _FLAGS.items() if flag in self.flags)
        self.ax.text(_MARGIN, 0.24, f"{reads}, numbered in order. Rights left down to each entry: r read, w write, x execute, "
                     f"u user. {flags}", fontsize=_FONT - 0.5, color=_FAINT, va="center_baseline")


def _status_text(status: Status) -> str:
    """Return the name of a failure."""
    return {Status.PAGE_FAULT: "#PF", Status.NON_CANONICAL: "#GP"}.get(status) or nested_title(status)
