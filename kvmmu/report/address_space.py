"""An address space for people: its ranges as text, in the order of the top-level table, and as a picture."""

from collections.abc import Iterator
from os import PathLike
from typing import Any

import numpy as np

from kvmmu.arch._bits import Acc
from kvmmu.report.figure import check_figure_path, matplotlib_or_error, save_figure
from kvmmu.walk.mapped import Mapping, Mappings

__all__ = ["mapping_lines", "plot_mappings", "summary"]

_UNITS = ((1 << 40, "T"), (1 << 30, "G"), (1 << 20, "M"), (1 << 10, "K"))
_GROUP_SHIFTS = {2: 30, 3: 30, 4: 39, 5: 48}            # what one entry of the top-level table maps; 32-bit: what PAE has
_GAP = 1 << 26                                          # bytes between ranges that are drawn in rows of their own
_ROWS = 40                                              # of a picture
_COLOURS = (("writable and executable", "#d62728"), ("executable", "#2ca02c"), ("writable", "#1f77b4"), ("read-only", "#9e9e9e"))
_HEIGHTS = {0: 0.9, 1: 0.35, 2: 0.6, 3: 0.9}


def bytes_text(size: int) -> str:
    """Return a size with the largest unit that it has one of: 4K, 2.5M."""
    for unit, letter in _UNITS:
        if size >= unit:
            return f"{size // unit}{letter}" if size % unit == 0 else f"{size / unit:.1f}{letter}"
    return f"{size}B"


def summary(mappings: Mappings) -> str:
    """Return how much is mapped, and how much of it with which rights, on one line."""
    kinds: dict[str, int] = {}
    rights = mappings.rights
    for kind in np.unique(rights).tolist():
        kinds[kind] = int(mappings.size[rights == kind].sum())
    parts = [f"{kind} {bytes_text(size)}" for kind, size in sorted(kinds.items(), key=lambda item: -item[1])]
    count = len(mappings)
    total = f"{count:,} range{'' if count == 1 else 's'}, {bytes_text(sum(kinds.values()))}"
    return f"{total}: {', '.join(parts)}" if parts else total


def page_text(level: int, is_32_bit: bool) -> str:
    """Return the size of the page of a leaf."""
    return {0: "-", 1: "4K", 2: "4M" if is_32_bit else "2M", 3: "1G"}[level]


def mapping_lines(mappings: Mappings, root_level: int) -> Iterator[str]:
    """Yield mappings as lines, under a line for each part of the address space.

    root_level: of the page tables, 2 to 5; 0 with paging off.
    """
    if not len(mappings):
        yield "  nothing is mapped"
        return
    shift = _GROUP_SHIFTS.get(root_level, 39)
    groups = mappings.gva >> np.uint64(shift)
    starts: list[int] = np.flatnonzero(np.diff(groups, prepend=groups[:1] + np.uint64(1)) != 0).tolist()
    stops = dict(zip(starts, [*starts[1:], len(mappings)], strict=True))
    for i, mapping in enumerate(mappings):
        if i in stops:
            total = int(mappings.size[i:stops[i]].sum())
            yield f"{int(groups[i]) << shift:#018x}  {stops[i] - i:,} range{'s' if stops[i] - i > 1 else ''}, {bytes_text(total)}"
        yield f"  {_line(mapping, root_level == 2)}"


def _line(m: Mapping, is_32_bit: bool) -> str:
    flags = "".join(letter if flag else "-" for letter, flag in (("A", m.accessed), ("D", m.dirty), ("G", m.global_)))
    key = f"  key {m.pkey}" if m.pkey else ""
    below = f"  ngpa {m.ngpa:#x}" if m.ngpa != m.gpa else ""
    page = page_text(m.level, is_32_bit)
    return (f"{m.gva:#018x}-{m.gva + m.size - 1:#018x} {bytes_text(m.size):>7} {page:>3} {m.rights} {flags}"
            f"  -> {m.gpa:#x}{below}{key}")


def plot_mappings(mappings: Mappings, path: str | PathLike[str] | None = None, *, title: str = "") -> Any:
    """Draw an address space: one row for each group of ranges, colours for rights, heights for the size of pages.

    Parameters
    ----------
    mappings : Mappings
    path : str or path-like, optional
        Save the figure there; the suffix chooses the format (.png, .svg, .pdf).
    title : str

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
    if not isinstance(mappings, Mappings):
        raise TypeError(f"mappings: want a Mappings, got {type(mappings).__name__}")
    matplotlib = matplotlib_or_error()
    if path is not None:
        check_figure_path("path", path)
    rows = _groups(mappings)
    left_out = max(0, len(rows) - _ROWS)
    if left_out:
        rows = sorted(sorted(rows, key=lambda row: row[0] - row[1])[:_ROWS])
    figure = matplotlib.figure.Figure(figsize=(11, 1.6 + 0.32 * max(len(rows), 1)), dpi=120)
    axes = figure.add_axes((0.3, 0.8 / figure.get_figheight(), 0.68, 1 - 1.3 / figure.get_figheight()))
    for at, (first, stop) in enumerate(rows):
        start, span = int(mappings.gva[first]), _end(mappings, stop - 1) - int(mappings.gva[first])
        for colour, level, bars in _bars(mappings, first, stop, start, span):
            axes.broken_barh(bars, (at - _HEIGHTS[level] / 2, _HEIGHTS[level]), facecolor=colour, linewidth=0)
    spans = [(int(mappings.gva[first]), _end(mappings, stop - 1)) for first, stop in rows]
    axes.set_yticks(range(len(rows)), [f"{start:#x}, {bytes_text(end - start)}" for start, end in spans], fontsize=7,
                    family="monospace")
    axes.set_xlim(0, 1)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xticks([0.06, 0.94], ["first address", "last address"], fontsize=7)
    axes.set_title(title + (f" ({left_out} smaller groups left out)" if left_out else ""), fontsize=9)
    axes.legend(handles=[matplotlib.patches.Patch(color=colour, label=label) for label, colour in _COLOURS], fontsize=7, ncols=4,
                loc="upper center", bbox_to_anchor=(0.4, -0.5 / figure.get_figheight()), frameon=False)
    if path is not None:
        save_figure(figure, path)
    return figure


def _end(mappings: Mappings, i: int) -> int:
    return int(mappings.gva[i]) + int(mappings.size[i])


def _groups(mappings: Mappings) -> list[tuple[int, int]]:
    """Return (first row, row behind the last) of ranges without a large gap between them."""
    if not len(mappings):
        return []
    gaps = mappings.gva[1:] - (mappings.gva[:-1] + mappings.size[:-1])
    starts = [0, *(np.flatnonzero(gaps > _GAP) + 1).tolist()]
    return list(zip(starts, [*starts[1:], len(mappings)], strict=True))


def _bars(mappings: Mappings, first: int, stop: int, start: int, span: int) -> Iterator[tuple[str, int, Any]]:
    """Yield colour, level, and (position, width) of the ranges of one row, within 0 to 1."""
    part = slice(first, stop)
    rights = mappings.pte_access[part] & (mappings.second_access[part] | np.uint8(Acc.USER))
    writes, runs = rights & np.uint8(Acc.WRITE) != 0, rights & np.uint8(Acc.EXEC) != 0
    kinds = (writes & runs, ~writes & runs, writes & ~runs, ~writes & ~runs)
    at = (mappings.gva[part] - np.uint64(start)).astype(float) / span
    width = mappings.size[part].astype(float) / span
    for (_, colour), chosen in zip(_COLOURS, kinds, strict=True):
        for level in _HEIGHTS:
            these = chosen & (mappings.level[part] == level)
            if these.any():
                yield colour, level, np.column_stack((at[these], width[these]))
