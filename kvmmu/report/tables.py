"""Tables for the terminal: with rich where it is installed (extra `cli`), in plain text without it."""

import io
import sys
from typing import TextIO

from kvmmu.replay.result import Report
from kvmmu.replay.terminal import has_boxes, printable, say

__all__ = ["Table", "plain_text", "replay_tables", "show_tables"]

Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]


def replay_tables(report: Report) -> list[Table]:
    """Return a replay Report as tables: a list of (title, column names, rows of text). Text from files is made printable."""
    share = 100 * report.verified / report.accesses if report.accesses else 100.0
    summary: list[tuple[str, ...]] = [
        ("accesses", f"{report.accesses:,}"),
        ("verified against recorded addresses", f"{report.verified:,} ({_percent(share, report)})"),
        ("mismatches", f"{report.mismatches:,}"),
        ("rate", f"{report.rate / 1e6:.1f} M accesses/s ({report.seconds:.2f} s)"),
        ("table writes applied", f"{report.table_writes:,}"),
        ("register contexts", f"{report.contexts:,}"),
        ("accesses to MMIO", f"{report.mmio:,}"),
    ]
    if report.unchecked:
        summary.insert(2, ("without a recorded address", f"{report.unchecked:,}"))
    if not report.complete:
        summary.insert(0, ("stopped early, after", f"{report.accesses:,} accesses"))
    if report.waited:
        summary.append(("walk waited for rows", f"{report.waited:.2f} s"))
    summary += [(f"passed over: {printable(kind)}", f"{count:,}") for kind, count in report.skipped.items()]
    titles = (report.name, report.phase and f"{report.phase} phase", f"mode {report.mode}")
    tables: list[Table] = [
        (printable(", ".join(filter(None, titles))), ("", ""), summary),
        ("Accesses by kind", ("kind", "accesses"), [(kind, f"{count:,}") for kind, count in report.kinds.items()]),
    ]
    if report.page_sizes:
        tables.append(("By page size", ("page", "accesses"), [(size, f"{count:,}") for size, count in report.page_sizes.items()]))
    if report.walk_faults:
        tables.append(("Walks that fail, without a recorded address", ("error code or status", "accesses"),
                       [(code, f"{count:,}") for code, count in sorted(report.walk_faults.items())]))
    if report.faults:
        rows: list[tuple[str, ...]] = [
            (code, f"{count:,}", f"{report.faults_reproduced.get(code, 0):,}" if report.faults_checked else "not checkable")
            for code, count in sorted(report.faults.items())]
        tables.append(("Page faults by error code", ("error code", "recorded", "reproduced"), rows))
    return tables


def _percent(share: float, report: Report) -> str:
    """Return a share in percent; it is 100% only if nothing is missing."""
    return "100%" if report.verified == report.accesses else f"{min(share, 99.9999):.4f}%"


def show_tables(tables: list[Table], file: TextIO | None = None) -> None:
    """Print tables, with rich if it is there. Their text is text, not markup."""
    file = sys.stdout if file is None else file
    try:
        import rich.box
        import rich.console
        import rich.table
        import rich.text
        has_rich = True
    except ImportError:
        has_rich = False
    if not has_rich or file is None:
        say(plain_text(tables), file)
        return
    terminal = rich.console.Console(file=file)
    text = io.StringIO()                    # written at once below: rich itself would exit with status 1 if the reader is gone
    console = rich.console.Console(file=text, width=terminal.width, force_terminal=terminal.is_terminal)
    box = rich.box.HEAVY_HEAD if has_boxes(file) else rich.box.ASCII2
    for title, names, rows in tables:
        table = rich.table.Table(show_header=any(names), box=box)
        for column, name in enumerate(names):
            table.add_column(rich.text.Text(name), justify="right" if column else "left")
        for row in rows:
            table.add_row(*map(rich.text.Text, row))
        console.print(rich.text.Text(title), highlight=False, soft_wrap=True)       # a path is not cut in two
        console.print(table, highlight=False)
    say(text.getvalue().removesuffix("\n"), file)


def plain_text(tables: list[Table]) -> str:
    """Return tables as text."""
    lines = []
    for title, names, rows in tables:
        table = [names, *rows] if any(names) else rows
        widths = [max(len(line[column]) for line in table) for column in range(len(names))] if table else []
        lines.append(title)
        for line in table:
            cells = [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
            lines.append(("  " + "  ".join(cells)).rstrip())
        lines.append("")
    return "\n".join(lines)
