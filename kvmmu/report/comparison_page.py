"""A comparison as one HTML page without a network: tables, charts, and its data as JSON."""

import json
from html import escape
from typing import Any

from kvmmu.report.address_space import bytes_text
from kvmmu.report.comparison_data import (
    COLOURS,
    KIND_NAMES,
    PAGE_HEIGHTS,
    Series,
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
from kvmmu.report.comparison_terms import terms_html
from kvmmu.report.svg_charts import bar_chart, legend, line_chart, map_chart
from kvmmu.report.tables import Table

__all__ = ["comparison_page", "table_of"]

# Parts of the data that are not in the page's JSON
_DRAWN = ("tables", "regions", "exits_over_time", "faults_over_time", "tlbs", "made_by")
# The same colours, lighter, for a dark page
_DARK = ("#56b4e9", "#ff9e4a", "#3fd0a4", "#e59ac4", "#f0e442", "#9ad0f5", "#c9a2ff", "#d0d0d0")
_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --faint: #555; --paper: #fff; --line: #d4d4d4; --band: #f3f5f7; LIGHT }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececec; --faint: #b4b4b4; --paper: #15181c; --line: #3c4249; --band: #1f242a; DARK } }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; background: var(--paper); color: var(--ink);
  font: 16px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0.4rem 0; } h2 { font-size: 1.15rem; margin: 0 0 0.3rem; }
p { margin: 0.3rem 0 0.7rem; color: var(--faint); max-width: 46rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 0.4rem 0; white-space: pre-line; }
th, td { padding: 0.25rem 0.7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
thead th { background: var(--band); } thead th:first-child { background: var(--band); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.6rem 2rem;
  margin-top: 1.6rem; }
figure { margin: 0; } figure > svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif; } svg text.mono { font: 10.5px ui-monospace, monospace; }
.grid { stroke: var(--line); } .axis { stroke: var(--faint); }
.line { fill: none; stroke-width: 2; } .fill { stroke: none; }
.terms { margin-top: 1.6rem; } dt { font-weight: 600; } dd { margin: 0 0 0.4rem; color: var(--faint); max-width: 46rem; }
.legend { list-style: none; margin: 0.4rem 0 0; padding: 0; font-size: 0.85rem; }
.legend svg { width: 30px; height: 12px; margin-right: 0.5rem; vertical-align: -1px; }
SERIES
"""


def comparison_page(data: dict[str, Any]) -> str:
    """Return the page. IN data: of `Comparison.data()`."""
    light, dark = (" ".join(f"--s{i}: {colour};" for i, colour in enumerate(colours)) for colours in (COLOURS, _DARK))
    series = "\n".join(f".line.s{i} {{ stroke: var(--s{i}); }} .fill.s{i} {{ fill: var(--s{i}); }}" for i in range(len(COLOURS)))
    style = _STYLE.replace("LIGHT", light).replace("DARK", dark).replace("SERIES", series)
    plain = {key: value for key, value in data.items() if key not in _DRAWN}
    text = json.dumps(plain).replace("<", "\\u003c")
    title = f"{data['name']}: {data['accesses']:,} accesses under {len(data['designs'])} designs"
    kinds = ", ".join(f"{count:,} {name}s" if name != "fetch" else f"{count:,} fetches" for name, count in data["kinds"].items())
    table = table_of([("", *table[1:]) for table in data["tables"]])
    stopped = "" if data["complete"] else "<p><strong>Stopped early: counters are of the accesses until then.</strong></p>"
    return (f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
            f"<style>{style}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n<p>{escape(kinds)}.</p>\n{stopped}"
            f'<div class="scroll">{table}</div>\n<div class="charts">\n{_charts(data)}</div>\n{terms_html(data)}'
            f'<p>{escape(data["made_by"])}</p>\n'
            f'<script type="application/json" id="comparison">{text}</script>\n</body>\n</html>\n')


def table_of(tables: list[Table]) -> str:
    """Return tables as HTML."""
    parts = []
    for title, names, rows in tables:
        head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
        body = "".join(f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
                       for row in rows)
        caption = f"<caption>{escape(title)}</caption>" if title else ""
        parts.append(f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
    return "".join(parts)


def _figure(title: str, note: str, chart: str, names: str = "") -> str:
    return f"<figure><h2>{escape(title)}</h2><p>{escape(note)}</p>{chart}{names}</figure>\n"


def _charts(data: dict[str, Any]) -> str:
    parts = []
    bars = cost_bars(data)
    if bars is not None:
        cost = data["cost"]
        parts.append(_figure("Cycles per access", f"By the cost model {cost['name']!r}. {cost['source']}.",
                             bar_chart("Cycles per access by design", "cycles per access", *bars)))
    names, stacks = refs_bars(data)
    parts.append(_figure("References of page walks", "Paging-structure entries that walks read, per 1,000 accesses.",
                         bar_chart("References per 1,000 accesses by design", "entries read per 1,000 accesses", names, stacks),
                         legend([label for label, _ in stacks], lines=False)))
    parts.append(_lines("Misses over TLB size", "Fully associative LRU TLBs of every size, from one pass (stack distances).",
                        "Misses by number of TLB entries", "TLB entries (logarithmic)", "misses per 1,000 accesses", curves(data),
                        log_x=True))
    lines = refs_shares(data)
    if lines:
        parts.append(_lines("References per walk", "Share of the page walks that read at most so many entries, in both stages.",
                            "Share of walks by entries read", "entries read by a walk", "walks, percent", lines))
    lines = exits_over_time(data)
    if lines:
        parts.append(_lines("Exits over time", "Exits for the host's page tables until each access, the first touches of pages.",
                            "Exits until each access", "accesses", "exits", lines))
    lines = faults_over_time(data)
    if lines:
        parts.append(_lines("Faults over time", "First touches of 4K pages are the faults of demand paging with such pages.",
                            "Page faults until each access", "accesses", "page faults", lines))
    for page, regions in data["regions"].items():
        if regions:
            parts.append(_map(page, regions))
    return "".join(parts)


def _lines(title: str, note: str, label: str, x_label: str, y_label: str, series: Series, *, log_x: bool = False) -> str:
    """Return a figure of lines. Those that are alike are one line, with all their names; others than the first are named."""
    lines, rest = drawn(series)
    note += f" Not drawn are {len(rest)} more lines: {'; '.join(rest)}." if rest else ""
    return _figure(title, note, line_chart(label, x_label, y_label, lines, log_x=log_x, steps=True),
                   legend([name for name, _ in lines]))


def _map(page: str, regions: list[list[int]]) -> str:
    groups, left_out = groups_of(regions)
    rows = []
    for group in groups:
        start, end = group[0][0], group[-1][0] + group[-1][1]
        ranges = [((at - start) / (end - start), size / (end - start), kind_of(kinds), PAGE_HEIGHTS[level])
                  for at, size, level, kinds in group]
        rows.append((f"{start:#x}, {bytes_text(end - start)}", ranges))
    note = ("Ranges that are accessed, one row for each part of the address space. Taller: larger pages."
            + (f" {left_out} smaller parts are left out." if left_out else ""))
    return _figure(f"Address space, {page} pages", note, map_chart(f"Address space with {page} pages", rows),
                   legend(KIND_NAMES, lines=False))
