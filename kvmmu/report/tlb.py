"""Tables that tell what accesses met in a TLB hierarchy."""

from kvmmu.report.tables import Table
from kvmmu.tlb.counters import KINDS, MISS_CLASSES, PAGES, TlbStats

__all__ = ["tlb_tables"]

_TOP = 10


def tlb_tables(stats: TlbStats) -> list[Table]:
    """Return the counters of a hierarchy as tables: a list of (title, column names, rows of text)."""
    walks = int(stats.walks.sum())
    tables = [_levels(stats, walks), ("Page walks", ("", ""), _walks(stats, walks))]
    if stats.details is not None:
        rows = [(name, *(f"{count:,}" for count in misses))
                for name, misses in zip(stats.names, stats.details.misses.tolist(), strict=True)]
        tables.append(("Misses of each level", ("level", *MISS_CLASSES), rows))
        tables.append(("Pages with the most page walks", ("page", "size", "walks"), [
            (f"{page['gva']:#x}", page["page"].upper(), f"{page['walks']:,}") for page in stats.details.top_pages(_TOP)]))
        top = stats.details.top_ips(_TOP)
        if top is not None:
            tables.append(("Instructions with the most page walks", ("ip", "walks"),
                           [(f"{row['ip']:#x}", f"{row['walks']:,}") for row in top]))
    return tables


def _levels(stats: TlbStats, walks: int) -> Table:
    total = max(stats.accesses, 1)
    rows: list[tuple[str, ...]] = [
        (name, f"{int(hits.sum()):,}", f"{100 * int(hits.sum()) / total:.2f}%")
        for name, hits in zip(stats.names, stats.hits, strict=True)]
    rows.append(("page walks", f"{walks:,}", f"{100 * walks / total:.2f}%"))
    return "TLB: where accesses hit", ("level", "accesses", "share"), rows


def _walks(stats: TlbStats, walks: int) -> list[tuple[str, ...]]:
    def read(count: int) -> str:
        return f"{count:,}" + (f" ({count / walks:.3f} per walk)" if walks else "")

    rows: list[tuple[str, ...]] = [
        ("guest entries read", read(stats.guest_refs)),
        ("served by paging-structure caches", f"{stats.cached_refs:,}")]
    if stats.walks_by_all_refs is not None:
        rows.append(("host entries read", read(stats.host_refs)))
    rows += [(f"walks of a {kind}", f"{int(count):,}") for kind, count in zip(KINDS, stats.walks.sum(axis=(1, 2)), strict=True)]
    rows += [(f"walks by {mode}", f"{int(count):,}")
             for mode, count in zip(("the supervisor", "the user"), stats.walks.sum(axis=(0, 2)), strict=True)]
    rows += [(f"walks to {page.upper()} pages", f"{int(count):,}")
             for page, count in zip(PAGES, stats.walks.sum(axis=(0, 1)), strict=True) if count]
    if stats.details is not None:
        rows += [(f"walks of {number} entries", f"{count:,}")
                 for number, count in enumerate(stats.details.walks_by_refs.tolist()) if count]
    if stats.unmapped:
        rows.append(("accesses without a page", f"{stats.unmapped:,}"))
    return rows
