"""A comparison as one figure. Needs matplotlib."""

import textwrap
from os import PathLike
from typing import Any

from kvmmu.report.address_space import bytes_text
from kvmmu.report.comparison_data import (
    COLOURS,
    KIND_NAMES,
    PAGE_HEIGHTS,
    cost_bars,
    curves,
    drawn,
    exits_over_time,
    faults_over_time,
    groups_of,
    kind_of,
    refs_bars,
    refs_shares,
)
from kvmmu.report.figure import check_figure_path, matplotlib_or_error, save_figure

__all__ = ["plot_comparison"]

# Line styles for who sees no colours
_STYLES = ("-", "--", ":", "-.", (0, (4, 4)), (0, (1, 3)), (0, (12, 3)), (0, (6, 2, 2, 2, 2, 2)))
_LEGEND = 64                                    # letters of a line of a legend
_ROW = 0.24                                     # inches per bar


def plot_comparison(data: dict[str, Any], path: str | PathLike[str] | None = None) -> Any:
    """Draw a comparison.

    Parameters
    ----------
    data : dict
        Of `Comparison.data()`.
    path : str or path-like, optional
        Save the figure there; the suffix chooses the format (.png, .svg, .pdf).

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
    matplotlib = matplotlib_or_error()
    if path is not None:
        check_figure_path("path", path)
    maps = [(page, *groups_of(regions)) for page, regions in data["regions"].items() if regions][:1]
    bars = 0.9 + _ROW * len(data["designs"])
    map_rows = max((len(groups) for _, groups, _ in maps), default=0)
    heights = [bars, 3.4, 3.4] + ([1.0 + _ROW * map_rows] if maps else [])
    figure = matplotlib.figure.Figure(figsize=(13, sum(heights) + 1.2), dpi=110, layout="constrained")
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    figure.suptitle(f"{data['name']}: {data['accesses']:,} accesses under {len(data['designs'])} designs", fontsize=12)
    costs = cost_bars(data)
    _bars(figure.add_subplot(grid[0, 0] if costs else grid[0, :]), "References of page walks", "entries read per 1,000 accesses",
          *refs_bars(data))
    if costs:
        _bars(figure.add_subplot(grid[0, 1]), f"Cycles per access ({data['cost']['name']})", "cycles per access", *costs)
    axes = figure.add_subplot(grid[1, 0])
    _lines(axes, "Misses over TLB size", "TLB entries (fully associative LRU)", "misses per 1,000 accesses", curves(data))
    axes.set_xlim(left=1)                               # a curve of one access has no place on a scale of logarithms
    axes.set_xscale("log", base=2)
    _lines(figure.add_subplot(grid[1, 1]), "References per walk", "entries read by a walk", "share of walks, percent",
           refs_shares(data))
    _lines(figure.add_subplot(grid[2, 0]), "Exits over time", "accesses", "exits until then", exits_over_time(data))
    _lines(figure.add_subplot(grid[2, 1]), "Faults over time", "accesses", "page faults until then", faults_over_time(data))
    for page, groups, left_out in maps:
        _map(figure.add_subplot(grid[3, :]), page, groups, left_out, matplotlib)
    if path is not None:
        save_figure(figure, path)
    return figure


def _bars(axes: Any, title: str, label: str, names: list[str], stacks: list[tuple[str, list[float]]]) -> None:
    start = [0.0] * len(names)
    for place, (name, values) in enumerate(stacks):
        axes.barh(range(len(names)), values, left=start, color=COLOURS[place], label=name, height=0.7)
        start = [one + value for one, value in zip(start, values, strict=True)]
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(label, fontsize=9)
    if len(stacks) > 1:
        axes.legend(fontsize=8)


def _lines(axes: Any, title: str, x_label: str, y_label: str, series: list[tuple[str, list[list[float]]]]) -> None:
    lines, rest = drawn(series)
    for place, (name, points) in enumerate(lines):
        axes.step([point[0] for point in points], [point[1] for point in points], where="post",
                  label=textwrap.fill(name, _LEGEND), color=COLOURS[place % len(COLOURS)],
                  linestyle=_STYLES[place % len(_STYLES)])
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x_label, fontsize=9)
    axes.set_ylabel(y_label, fontsize=9)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if series:
        note = f"not drawn: {len(rest)} more, which the HTML page names" if rest else None
        axes.legend(fontsize=7, title=note, title_fontsize=7)


def _map(axes: Any, page: str, groups: list[list[list[int]]], left_out: int, matplotlib: Any) -> None:
    for at, group in enumerate(groups):
        start, span = group[0][0], group[-1][0] + group[-1][1] - group[0][0]
        for place, size, level, kinds in group:
            height = 0.9 * PAGE_HEIGHTS[level]
            axes.broken_barh([((place - start) / span, max(size / span, 0.001))], (at + 0.45 - height, height),
                             facecolor=COLOURS[kind_of(kinds)], linewidth=0)
    names = [f"{group[0][0]:#x}, {bytes_text(group[-1][0] + group[-1][1] - group[0][0])}" for group in groups]
    axes.set_yticks(range(len(groups)), names, fontsize=7, family="monospace")
    axes.set_xlim(0, 1)
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.set_xticks([0.05, 0.95], ["first address", "last address"], fontsize=8)
    axes.set_title(f"Address space, {page} pages; taller: larger pages"
                   + (f" ({left_out} smaller parts left out)" if left_out else ""), fontsize=10)
    axes.legend(handles=[matplotlib.patches.Patch(color=COLOURS[place], label=name) for place, name in enumerate(KIND_NAMES)],
                fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.12 if len(groups) > 6 else -0.3), frameon=False)
