"""Batches of one kind against the plain case (1% faults, 5% large pages, 5% cold) over as many pages."""

import numpy as np
import pytest
from cases import MIDDLE, NAMES, SMALL, Batch, guest
from conftest import QUICK, ROUNDS, ROWS
from tables import RESERVED, WARM, A, Guest, Mix, P, U, accesses

from kvmmu import Regs, Status, Translation

BAR = ("at most", 2.0)
WP, SMEP, SMAP = 1 << 16, 1 << 20, 1 << 21
PAGES = [SMALL] if QUICK else [SMALL, MIDDLE]


def without(bit):
    return np.uint64(~np.uint64(bit))


def absent_leaf(name, entries):
    if name == "leaf":
        entries &= without(P)


def absent_upper(name, entries):
    if name == "upper":
        entries &= without(P)


def reserved(name, entries):
    if name == "leaf":
        entries |= np.uint64(RESERVED)


def supervisor(name, entries):
    if name == "leaf":
        entries &= without(U)


CLIFFS = {
    "all not present at the leaf": (Status.PAGE_FAULT, {"mix": WARM, "change": absent_leaf}),
    "all not present one level above": (Status.PAGE_FAULT, {"mix": WARM, "change": absent_upper}),
    "all with a reserved bit": (Status.PAGE_FAULT, {"mix": WARM, "change": reserved}),
    "all without the right": (Status.PAGE_FAULT, {"mix": WARM, "change": supervisor}),
    "all 2M pages": (Status.OK, {"mix": WARM, "leaf": "2M"}),
    "all 1G pages": (Status.OK, {"mix": WARM, "leaf": "1G"}),
    "no faults, no large pages, none cold": (Status.OK, {"mix": WARM}),
}


def against_plain(race, rng, case, tables, pages, *, translate=None, status=None, rows=ROWS, fresh=None, between=None,
                  rounds=ROUNDS, after=None):
    """Race a batch of tables against the plain case, each with addresses of its own."""
    batch, plain = Batch(tables, rng, rows), Batch(guest(pages), rng, rows)
    translate = translate or batch.translate

    def addresses():
        return tables.addresses(rng, rows), plain.tables.addresses(rng, rows), accesses(rng, rows)

    def check(gva, _, access):
        translate(gva, access)
        assert status is None or (batch.out.status == status).all()
        assert after is None or after()

    race("Cliffs", f"{case}, {NAMES[pages]}", "the plain case", lambda gva, _, access: translate(gva, access),
         lambda _, gva, access: plain.translate(gva, access), fresh or addresses, rows=rows, rounds=rounds,
         between=between or plain.tables.chill, check=check, bars=[BAR])


@pytest.mark.parametrize("pages", PAGES)
@pytest.mark.parametrize("case", CLIFFS)
def bench_all_alike(race, rng, case, pages):
    status, options = CLIFFS[case]
    count = 4096 if options.get("leaf") == "1G" else 60_000 if options.get("leaf") == "2M" and pages > 60_000 else pages
    against_plain(race, rng, case, Guest(count, **options), pages, status=status)


@pytest.mark.parametrize("pages", PAGES)
def bench_all_cold(race, rng, pages):
    """Every page once, each with its A bit clear."""
    tables = Guest(pages, mix=Mix(absent=0, large=0, cold=1))
    plain, rows = guest(pages), tables.span >> 12

    def fresh():
        theirs = plain.every_page(rng)[:rows]
        return tables.every_page(rng), theirs, accesses(rng, rows)

    def between():
        tables.chill()
        plain.chill()

    against_plain(race, rng, "all cold", tables, pages, rows=rows, fresh=fresh, between=between, status=Status.OK,
                  rounds=ROUNDS * (20 if pages == SMALL else 2), after=lambda: (tables.level(1) & np.uint64(A)).all())


def race_contexts(race, rng, tables, pages, sets):
    """A random one of the register sets for each row."""
    walk = tables.vcpu.gva_walk
    contexts, ctx, out = walk.prepare(sets), rng.integers(0, len(sets), ROWS, np.uint32), Translation.empty(ROWS)

    def translate(gva, access):
        walk.translate(gva, access, regs=contexts, ctx=ctx, out=out)

    def between():
        tables.chill()
        guest(pages).chill()

    against_plain(race, rng, f"{len(sets)} register sets, one per row", tables, pages, translate=translate, between=between)


@pytest.mark.parametrize("pages", PAGES)
def bench_mixed_contexts(race, rng, pages):
    """Eight register sets of four roles, one of them without paging: a random one for each row."""
    tables = Guest(pages)
    own = tables.vcpu.regs
    sets = [own, Regs(own.cr0, own.cr3, own.cr4 & ~(1 << 21), own.efer), Regs(own.cr0 & ~(1 << 16), own.cr3, own.cr4, own.efer),
            Regs(own.cr0, own.cr3 | 0x18, own.cr4, own.efer), Regs(own.cr0 & ~(1 << 31), 0, 0, 0)]
    sets += [own, own, sets[1]]
    race_contexts(race, rng, tables, pages, sets)


@pytest.mark.parametrize("pages", PAGES)
def bench_many_contexts(race, rng, pages):
    """512 register sets of eight roles, with other protection keys and CR3 flags: a random one for each row."""
    tables = Guest(pages)
    own = tables.vcpu.regs
    sets = [Regs(own.cr0 & ~(WP * (i & 1)), own.cr3 | (i >> 3 & 3) << 3, own.cr4 & ~(SMAP * (i >> 1 & 1) | SMEP * (i >> 2 & 1)),
                 own.efer, pkru=i >> 5 << 2) for i in range(512)]
    race_contexts(race, rng, tables, pages, sets)
