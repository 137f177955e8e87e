"""Array walks of one stage: against numpy.take of the leaf entries, and of one paging mode against another."""

import pytest
from cases import BIG, MIDDLE, NAMES, SMALL, Batch, guest
from conftest import QUICK, ROWS
from tables import accesses

TAKE = "numpy.take of the leaf entries"
BARS = {SMALL: ("at most", 2.5), BIG: ("at most", 1.5)}


@pytest.mark.parametrize("pages", [BIG, SMALL])
def bench_4_level(race, rng, pages):
    """1% faults, 5% large pages, 5% cold: the plain case."""
    batch = Batch(guest(pages), rng, ROWS)
    race("Batch", f"4-level, {NAMES[pages]}", TAKE, batch.translate, batch.take, batch.fresh, rows=ROWS,
         between=batch.tables.chill, check=batch.check, bars=[BARS[pages]])


def bench_spread(race, rng):
    """32,768 pages over 64 GiB: no two share a table of any level but the highest two."""
    batch = Batch(guest(SMALL, spread=True), rng, ROWS)
    race("Batch", "4-level, 32,768 pages spread over 64 GiB", TAKE, batch.translate, batch.take, batch.fresh, rows=ROWS,
         between=batch.tables.chill, check=batch.check, bars=[("at most", 3.5)])


def bench_cold_rows(race, rng):
    """A batch as large as the tables: 5% of its rows are cold, not of the entries alone."""
    rows = SMALL
    batch = Batch(guest(SMALL), rng, rows)
    race("Batch", "4-level, 32,768 pages, as many rows", TAKE, batch.translate, batch.take, batch.fresh, rows=rows,
         between=batch.tables.chill, check=batch.check, rounds=50 if QUICK else 300)


@pytest.mark.parametrize(("mode", "pages", "bar"), [
    ("5-level", BIG, 1.3), ("5-level", SMALL, 1.3), ("PAE", MIDDLE, 1.0), ("PAE", SMALL, 1.0), ("2-level", MIDDLE, 1.0),
    ("2-level", SMALL, 1.0)])
def bench_modes(race, rng, mode, pages, bar):
    """Another mode against 4-level paging over as many pages."""
    batch, other = Batch(guest(pages, mode), rng, ROWS), Batch(guest(pages), rng, ROWS)
    batch.check(*batch.fresh())

    def fresh():
        gva = [side.tables.addresses(rng, ROWS) for side in (batch, other)]
        return (*gva, accesses(rng, ROWS))

    def between():
        batch.tables.chill()
        other.tables.chill()

    race("Modes", f"{mode}, {NAMES[pages]}", "4-level", lambda gva, _, access: batch.translate(gva, access),
         lambda _, gva, access: other.translate(gva, access), fresh, rows=ROWS, between=between, bars=[("at most", bar)])
