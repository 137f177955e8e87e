"""Charts as SVG text for a page: lines, bars and ranges, with colours and widths that the page's style sheet sets."""

import math
from collections.abc import Sequence
from html import escape

__all__ = ["SERIES", "bar_chart", "legend", "line_chart", "map_chart", "ticks"]

# A colour of the page (class s0 to s7, after Okabe and Ito) and a dash pattern each: lines differ without colours, too
SERIES = 8
DASHES = ("", "7 3", "2 2", "9 3 2 3", "4 4", "1 3", "12 3", "6 2 2 2 2 2")
_WIDTH, _HEIGHT = 460, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 22, 12, 46
_LETTER = 6.4                                   # width of a letter of the labels
Series = tuple[str, Sequence[Sequence[float]]]


def number(value: float) -> str:
    """Return a number for an axis: 0, 250, 1.5k, 20M."""
    for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.4g}{letter}"
    return f"{value:.4g}"


def ticks(top: float, count: int = 5) -> list[float]:
    """Return round numbers from 0 up, the last one not below top."""
    if top <= 0:
        return [0.0, 1.0]
    raw = top / count
    step = 10.0 ** math.floor(math.log10(raw))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if factor * step >= raw * 0.999999)
    return [step * i for i in range(math.ceil(top / step - 1e-9) + 1)]


def _frame(parts: list[str], title: str, height: int = _HEIGHT) -> str:
    return (f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title, True)}">'
            f"<title>{escape(title)}</title>{''.join(parts)}</svg>")


def _axes(x_label: str, y_label: str, x_marks: list[tuple[float, str]], y_marks: list[tuple[float, str]]) -> list[str]:
    """Return grid lines, labels of marks (at SVG coordinates) and of both axes."""
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = [f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
             f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(text)}</text>' for y, text in y_marks]
    parts += [f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>'
              f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{escape(text)}</text>' for x, text in x_marks]
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>')
    middle = (_TOP + bottom) / 2
    parts.append(f'<text transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>')
    return parts


def line_chart(title: str, x_label: str, y_label: str, series: Sequence[Series], *, log_x: bool = False,
               steps: bool = False) -> str:
    """Return lines over a common axis; y begins at 0.

    Parameters
    ----------
    title, x_label, y_label : str
    series : sequence of (name, points)
        Points are (x, y), ascending. At most `SERIES` of them.
    log_x : bool
        x is logarithmic, with marks at powers of 4; points below 1 are left out.
    steps : bool
        y stays until the next point.
    """
    kept = [(name, [point for point in points if not log_x or point[0] >= 1]) for name, points in series]
    xs = [point[0] for _, points in kept for point in points] or [1.0]
    ys = [point[1] for _, points in kept for point in points] or [0.0]
    marks = ticks(max(ys))
    low, high = (1.0, max(max(xs), 4.0)) if log_x else (0.0, ticks(max(xs))[-1])
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def x_of(x: float) -> float:
        share = math.log(x / low) / math.log(high / low) if log_x else (x - low) / (high - low)
        return _LEFT + share * (right - _LEFT)

    def y_of(y: float) -> float:
        return bottom - y / marks[-1] * (bottom - _TOP)

    at = [float(4 ** i) for i in range(1 + int(math.log(high, 4) + 1e-9))] if log_x else ticks(max(xs), 4)
    parts = _axes(x_label, y_label, [(x_of(x), number(x)) for x in at], [(y_of(y), number(y)) for y in marks])
    for place, (name, points) in enumerate(kept):
        if not points:
            continue
        path = [f"M{x_of(points[0][0]):.1f} {y_of(points[0][1]):.1f}"]
        for x, y in points[1:]:
            path.append(f"H{x_of(x):.1f}V{y_of(y):.1f}" if steps else f"L{x_of(x):.1f} {y_of(y):.1f}")
        dash = DASHES[place % SERIES]
        parts.append(f'<path class="line s{place % SERIES}" d="{"".join(path)}"'
                     f'{f""" stroke-dasharray="{dash}" """ if dash else ""}><title>{escape(name)}</title></path>')
    return _frame(parts, title)


def bar_chart(title: str, x_label: str, names: Sequence[str], stacks: Sequence[tuple[str, Sequence[float]]]) -> str:
    """Return a horizontal bar per name, stacked, with its total in figures; the axis begins at 0."""
    totals = [sum(values[row] for _, values in stacks) for row in range(len(names))]
    marks = ticks(max(totals, default=0.0), 4)
    left = min(170, 14 + max((len(name) for name in names), default=0) * _LETTER)
    right, row_height = _WIDTH - 56, 22
    height = _TOP + row_height * len(names) + _BOTTOM

    def x_of(value: float) -> float:
        return left + value / marks[-1] * (right - left)

    bottom = height - _BOTTOM
    parts = [f'<line class="grid" x1="{x_of(x):.1f}" x2="{x_of(x):.1f}" y1="{_TOP}" y2="{bottom}"/>'
             f'<text x="{x_of(x):.1f}" y="{bottom + 17}" text-anchor="middle">{number(x)}</text>' for x in marks]
    for row, name in enumerate(names):
        y, start = _TOP + row * row_height, 0.0
        parts.append(f'<text x="{left - 6:.0f}" y="{y + 15}" text-anchor="end">{escape(name)}</text>')
        for place, (label, values) in enumerate(stacks):
            value = values[row]
            parts.append(f'<rect class="fill s{place % SERIES}" x="{x_of(start):.1f}" y="{y + 3}" height="{row_height - 7}" '
                         f'width="{max(0.0, x_of(start + value) - x_of(start)):.1f}"><title>{escape(name)}: {escape(label)} '
                         f"{value:,.6g}</title></rect>")
            start += value
        parts.append(f'<text x="{x_of(totals[row]) + 5:.1f}" y="{y + 15}">{number(totals[row])}</text>')
    parts.append(f'<text x="{(left + right) / 2:.0f}" y="{height - 8}" text-anchor="middle">{escape(x_label)}</text>')
    return _frame(parts, title, height)


def map_chart(title: str, rows: Sequence[tuple[str, Sequence[tuple[float, float, int, float]]]]) -> str:
    """Return rows of ranges. Each range is (start, width, series, height), all but the series within 0 to 1."""
    row_height, left = 26, 178
    height = _TOP + row_height * len(rows) + 24
    right = _WIDTH - _RIGHT
    parts = []
    for place, (name, ranges) in enumerate(rows):
        y = _TOP + place * row_height
        parts.append(f'<text x="{left - 6}" y="{y + 16}" text-anchor="end" class="mono">{escape(name)}</text>'
                     f'<line class="grid" x1="{left}" x2="{right}" y1="{y + 22}" y2="{y + 22}"/>')
        for start, width, series, tall in ranges:
            wide = max(0.6, width * (right - left))
            parts.append(f'<rect class="fill s{series % SERIES}" x="{left + start * (right - left):.2f}" '
                         f'y="{y + 22 - 18 * tall:.1f}" width="{wide:.2f}" height="{18 * tall:.1f}"/>')
    parts.append(f'<text x="{left}" y="{height - 7}">first address</text>'
                 f'<text x="{right}" y="{height - 7}" text-anchor="end">last address</text>')
    return _frame(parts, title, height)


def legend(names: Sequence[str], *, lines: bool = True) -> str:
    """Return the names of series, each beside a piece of its line or colour."""
    items = []
    for place, name in enumerate(names):
        dash = DASHES[place % SERIES]
        mark = (f'<path class="line s{place % SERIES}" d="M1 6H29"{f""" stroke-dasharray="{dash}" """ if dash else ""}/>' if lines
                else f'<rect class="fill s{place % SERIES}" x="8" y="1" width="14" height="10"/>')
        items.append(f'<li><svg viewBox="0 0 30 12" aria-hidden="true">{mark}</svg>{escape(name)}</li>')
    return f'<ul class="legend">{"".join(items)}</ul>'
