"""The words of a comparison's page: what its columns count, and what hosts, page policies and TLBs are."""

from html import escape
from typing import Any

__all__ = ["terms_html"]

_COLUMNS = (
    ("design", "A host, a page policy and TLBs. All designs run the same accesses."),
    ("later TLB hits", "Translations found in a TLB level behind the first one that an access asks, as a second-level TLB."),
    ("page walks", "Translations found in no TLB level: the page tables are walked. Per 1,000: of accesses."),
    ("guest refs", "Paging-structure entries of the guest's tables that walks read, without those that paging-structure caches "
                   "had. Without a host these are the only tables; under shadow paging the processor reads none of them."),
    ("host refs", "Entries of the host's tables that walks read: of the second stage, or of the shadow pages."),
    ("refs per walk", "Guest refs and host refs, by page walks."),
    ("exits", "VM exits for the host's tables, which are empty at the start."))
_COST = ("cycles per access", "Later hits, walks, refs and exits, each times the cycles of the cost model, by accesses.")
_HOSTS = {
    "native": "No host: one stage of page tables.",
    "ept": "Two-dimensional paging of Intel: the processor walks the guest's tables and the host's.",
    "npt": "Two-dimensional paging of AMD: the processor walks the guest's tables and the host's.",
    "shadow": "Shadow paging: the processor walks tables that the host makes of the guest's.",
    "nested-ept": "A guest hypervisor with EPT on a host with EPT.",
    "nested-npt": "A guest hypervisor with NPT on a host with NPT."}
_PAGES = {
    "own": "The page tables that the trace brings.", "4k": "Tables made for the trace, with pages of 4 KiB.",
    "2m": "Tables made for the trace, with pages of 2 MiB.", "1g": "Tables made for the trace, with pages of 1 GiB.",
    "thp": "Tables made for the trace, with pages of 2 MiB where half of their 4K pages are touched, else of 4 KiB."}


def terms_html(data: dict[str, Any]) -> str:
    """Return the terms that a page uses, as HTML. IN data: of `Comparison.data()`."""
    used = {key: list(dict.fromkeys(design[key] for design in data["designs"])) for key in ("host", "page")}
    terms = [*_COLUMNS, *([_COST] if "cost" in data else []),
             *((f"host {name}", _HOSTS[name]) for name in used["host"]),
             *((f"pages {name}", _PAGES[name]) for name in used["page"]),
             *((f"TLB {name}", f"Levels, each with sets x ways: {text}.") for name, text in data["tlbs"].items())]
    items = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in terms)
    return f'<section class="terms"><h2>Terms</h2><dl>{items}</dl></section>\n'
