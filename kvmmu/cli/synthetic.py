"""Tables that tell of a replay on page tables made for a trace."""

from kvmmu.replay.result import SyntheticReport
from kvmmu.replay.terminal import printable
from kvmmu.report.tables import Table

__all__ = ["size_text", "synthetic_tables"]

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")
_MODES = {"32": "32-bit", "pae": "PAE", "4l": "4-level", "5l": "5-level"}


def size_text(count: int) -> str:
    """A number of bytes in the largest unit of which there is at least one."""
    unit = min(max(count.bit_length() - 1, 0) // 10, len(_UNITS) - 1)
    return f"{count:,} bytes" if not unit else f"{count / (1 << 10 * unit):,.1f} {_UNITS[unit]}"


def synthetic_tables(report: SyntheticReport) -> list[Table]:
    """A report as tables: a list of (title, column names, rows of text)."""
    summary: list[tuple[str, ...]] = [
        ("accesses", f"{report.accesses:,}"),
        ("of them into the next page", f"{report.crossings:,}"),
        ("pages touched", f"{report.pages_touched:,}"),
        ("touched, in pages of 4K", size_text(report.touched_bytes)),
        ("mapped", size_text(report.mapped_bytes)),
        ("page tables", f"{report.table_pages:,} ({size_text(4096 * report.table_pages)})"),
        ("walks", f"{report.walks:,}"),
        ("references per walk", f"{report.refs_per_walk:.3f} ({report.refs:,} in all)"),
        ("rate", f"{report.rate / 1e6:.1f} M accesses/s ({report.seconds:.2f} s)"),
        ("waited for the file", f"{report.waited:.2f} s"),
    ]
    if report.first_touch_faults is not None:
        summary.insert(3, ("first-touch faults", f"{report.first_touch_faults:,}"))
    if report.mmio:
        summary.insert(1, ("accesses to MMIO", f"{report.mmio:,}"))
    if report.unchecked_gpas:
        summary.append(("recorded physical addresses", "not checked: the page tables are made"))
    if not report.complete:
        summary.insert(0, ("stopped early, after", f"{report.accesses:,} accesses"))
    summary += [(f"passed over: {printable(kind)}", f"{count:,}") for kind, count in report.skipped.items()]
    made = f"{_MODES[report.mode]} paging, {report.page} pages, {report.frames} frames"
    paged = ", demand paging" if report.first_touch_faults is not None else ""
    sizes = sorted({**report.page_sizes, **report.mapped}, key=["4K", "2M", "4M", "1G"].index)
    tables: list[Table] = [
        (printable(f"{report.name} ({report.source}): {made}{paged}"), ("", ""), summary),
        ("Accesses by kind", ("kind", "accesses"), [(kind, f"{count:,}") for kind, count in report.kinds.items()]),
        ("By page size", ("page", "accesses", "pages mapped"),
         [(size, f"{report.page_sizes.get(size, 0):,}", f"{report.mapped.get(size, 0):,}") for size in sizes]),
    ]
    if report.walk_faults:
        tables.append(("Walks that fail", ("error code or status", "accesses"),
                       [(code, f"{count:,}") for code, count in sorted(report.walk_faults.items())]))
    return tables
