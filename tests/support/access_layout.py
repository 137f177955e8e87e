# SPDX-License-Identifier: Apache-2.0
"""Access-matrix cases side by side in one memory, so that a whole batch is translated at once.

    layout(cases, base=0x1000000) -> Layout
    image_after(layout, expected) -> pages as they must be after every case was run

Every case has entries of its own at the levels 1 to 3 (PAE: 1 and 2), so the cases may run in any order.  Table pages
and the entries above are shared; the latter have A set and never change.  Up to CAPACITY[levels] cases of a mode share
one root, so `cr3` is the same for all cases of a mode in a batch of that size; more cases get more roots.  PAE cases
whose PDPTE is not present use the fourth PDPTE register and have no entries in memory.
"""

from dataclasses import dataclass

import numpy as np

PAGE = 0x1000
CAPACITY = {2: 1024, 3: 3 * 512, 4: 512 * 512, 5: 512 * 512 * 512}
TABLES_END = 0x40000000
SHARED = 0x27
U = np.uint64


@dataclass
class Layout:
    """A batch in memory.

    `gva`, `cr3`, `gpa` (where the address leads if nothing faults): uint64[n].  `pdptrs`: uint64[n, 4], the PDPTE
    registers of PAE cases, else 0.  `entry_gpa`: uint64[n, 5], where the entry of level i+1 lies; 0 where a case has
    none in memory.  `page_gpas` uint64[m], `pages` uint64[m, 512]: all table pages, ascending and contiguous.
    """

    gva: np.ndarray
    cr3: np.ndarray
    gpa: np.ndarray
    pdptrs: np.ndarray
    entry_gpa: np.ndarray
    page_gpas: np.ndarray
    pages: np.ndarray
    levels: np.ndarray


class _Builder:
    """Allocates pages and collects entries."""

    def __init__(self, cases, base):
        n = len(cases)
        self.cases = cases
        self.base = base
        self.next = base
        self.gva = np.zeros(n, U)
        self.cr3 = np.zeros(n, U)
        self.pdptrs = np.zeros((n, 4), U)
        self.entry_gpa = np.zeros((n, 5), U)
        self.address = np.zeros((n, 5), U)
        self.shared = []

    def allocate(self, count):
        """`count` pages; their addresses."""
        gpas = U(self.next) + U(PAGE) * np.arange(count, dtype=U)
        self.next += PAGE * count
        return gpas

    def share(self, gpas, values):
        """8-byte entries that belong to no single case."""
        self.shared.append((np.atleast_1d(gpas), np.atleast_1d(values)))

    def own(self, rows, level, gpas, address):
        """The private entry of `level` of the cases `rows`, and what it points to."""
        self.entry_gpa[rows, level - 1] = gpas
        self.address[rows, level - 1] = address

    def leaf_or(self, rows, table):
        """What a PDE points to: its page or the PTE table."""
        return np.where(self.cases.large[rows], self.cases.frame[rows], table)


def layout(cases, base=0x1000000):
    """Lay `cases` out from `base` (page aligned) on; see Layout."""
    build = _Builder(cases, base)
    places = {2: _place_two_level, 3: _place_pae, 4: _place_long, 5: _place_long}
    for levels, place in places.items():
        rows = np.flatnonzero(cases.levels == levels)
        if len(rows):
            place(build, rows, levels)
    if build.next > TABLES_END:
        raise ValueError("too many cases: the tables would reach into the mapped pages")

    page_gpas = U(base) + U(PAGE) * np.arange((build.next - base) // PAGE, dtype=U)
    pages = np.zeros((len(page_gpas), 512), U)
    for gpas, values in build.shared:
        pages.reshape(-1)[(gpas - U(base)) >> U(3)] = values
    _add_entries(pages, base, cases.levels, build.entry_gpa, cases.entries | build.address)

    offset = (np.arange(len(cases), dtype=U) * U(8)) & U(PAGE - 1)
    gva = build.gva | offset
    large_offset = np.where(cases.levels == 2, U(0x3FFFFF), U(0x1FFFFF))
    gpa = cases.frame | (gva & np.where(cases.large, large_offset, U(PAGE - 1)))
    return Layout(gva, build.cr3, gpa, build.pdptrs, build.entry_gpa, page_gpas, pages, cases.levels)


def image_after(placed, expected):
    """The pages after all cases were run: the A/D bits of `expected` (an ExpectedArray) set."""
    pages = placed.pages.copy()
    _add_entries(pages, int(placed.page_gpas[0]), placed.levels, placed.entry_gpa, expected.ad)
    return pages


def _add_entries(pages, base, levels, entry_gpa, values):
    """OR values[n, 5] into the entries at entry_gpa[n, 5] that are private to their case."""
    eight = pages.reshape(-1)
    four = pages.view(np.uint32).reshape(-1)
    for index in range(3):
        wide = (entry_gpa[:, index] != 0) & (levels > 2)
        eight[(entry_gpa[wide, index] - U(base)) >> U(3)] |= values[wide, index]
        narrow = (entry_gpa[:, index] != 0) & (levels == 2)
        four[(entry_gpa[narrow, index] - U(base)) >> U(2)] |= values[narrow, index].astype(np.uint32)


def _place_two_level(build, rows, levels):
    """Per root one page directory and one page table; case k uses slot k of both."""
    number = np.arange(len(rows), dtype=U)
    root, slot = np.divmod(number, U(CAPACITY[levels]))
    roots = build.allocate(int(root[-1]) + 1)
    tables = build.allocate(len(roots))
    build.cr3[rows] = roots[root]
    build.own(rows, 2, roots[root] + U(4) * slot, build.leaf_or(rows, tables[root]))
    build.own(rows, 1, tables[root] + U(4) * slot, build.cases.frame[rows])
    build.gva[rows] = slot << U(22) | slot << U(12)


def _place_pae(build, rows, levels):
    """Per root three page directories, each with one page table; the fourth PDPTE is not present."""
    present = build.cases.entries[rows, 2] & U(1) != 0
    walking = rows[present]
    number = np.arange(len(walking), dtype=U)
    root, inside = np.divmod(number, U(CAPACITY[levels]))
    quarter, slot = np.divmod(inside, U(512))
    roots = build.allocate(int(root[-1]) + 1 if len(root) else 1)
    directories = build.allocate(3 * len(roots)).reshape(-1, 3)
    tables = build.allocate(3 * len(roots)).reshape(-1, 3)
    pdptes = np.zeros((len(roots), 4), U)
    pdptes[:, :3] = directories | U(1)
    build.share((roots[:, None] + U(8) * np.arange(4, dtype=U)).reshape(-1), pdptes.reshape(-1))

    build.own(walking, 2, directories[root, quarter] + U(8) * slot, build.leaf_or(walking, tables[root, quarter]))
    build.own(walking, 1, tables[root, quarter] + U(8) * slot, build.cases.frame[walking])
    build.gva[walking] = quarter << U(30) | slot << U(21) | slot << U(12)
    build.cr3[walking] = roots[root]
    build.pdptrs[walking] = pdptes[root]
    absent = rows[~present]
    build.gva[absent] = U(3 << 30) | (np.arange(len(absent), dtype=U) % U(512)) << U(21)
    build.cr3[absent] = roots[0]
    build.pdptrs[absent] = pdptes[0]


def _place_long(build, rows, levels):
    """512 cases share a PDPT, a page directory and a page table; case k uses slot k % 512 of each.

    Such groups hang below PML4 entries one by one; with 5 levels below PML5 entries first, each with its PML4 table.
    """
    number = np.arange(len(rows), dtype=U)
    group, slot = np.divmod(number, U(512))
    groups = int(group[-1]) + 1
    pdpts, directories, tables = build.allocate(3 * groups).reshape(3, -1)
    all_groups = np.arange(groups, dtype=U)
    if levels == 4:
        root, pml4_slot = np.divmod(all_groups, U(512))
        pml4s = build.allocate(int(root[-1]) + 1)
        build.cr3[rows] = pml4s[root[group]]
        build.share(pml4s[root] + U(8) * pml4_slot, pdpts | U(SHARED))
        linear = pml4_slot << U(39)
    else:
        root, inside = np.divmod(all_groups, U(512 * 512))
        pml4_slot, pml5_slot = np.divmod(inside, U(512))
        pml5s = build.allocate(int(root[-1]) + 1)
        table_number = root * U(512) + pml5_slot
        pml4s = build.allocate(int(table_number.max()) + 1)
        build.cr3[rows] = pml5s[root[group]]
        build.share(pml5s[root] + U(8) * pml5_slot, pml4s[table_number] | U(SHARED))
        build.share(pml4s[table_number] + U(8) * pml4_slot, pdpts | U(SHARED))
        linear = pml5_slot << U(48) | pml4_slot << U(39)
    top = U(47 if levels == 4 else 56)
    linear = np.where(linear >> top, linear | ~((U(2) << top) - U(1)), linear)

    build.own(rows, 3, pdpts[group] + U(8) * slot, directories[group])
    build.own(rows, 2, directories[group] + U(8) * slot, build.leaf_or(rows, tables[group]))
    build.own(rows, 1, tables[group] + U(8) * slot, build.cases.frame[rows])
    build.gva[rows] = linear[group] | slot << U(30) | slot << U(21) | slot << U(12)
