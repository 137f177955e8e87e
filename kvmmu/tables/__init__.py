"""Makers of guest page tables: tables to order, for the addresses of a trace, and by demand paging."""
# Below: arch, memory
# Order: modes, rows, frames, _page_set, layout, _edit, _builder, page_tables, _filler, pager

from kvmmu.tables._page_set import PageSet
from kvmmu.tables.frames import FreeFrames
from kvmmu.tables.page_tables import PageTables
from kvmmu.tables.pager import Pager

__all__ = ["FreeFrames", "PageSet", "PageTables", "Pager"]
