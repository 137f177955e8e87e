"""Two stages, 4 levels on 4, against one stage over the same guest tables."""

import pytest
from cases import BIG, NAMES, SMALL, Batch, guest
from conftest import QUICK, ROUNDS, ROWS


@pytest.mark.parametrize("size", ["2M", "4K"])
@pytest.mark.parametrize("kind", ["ept", "npt"])
@pytest.mark.parametrize("pages", [BIG, SMALL])
def bench_two_stage(race, rng, pages, kind, size):
    """L2's tables and all they map behind a second stage of 2M or of 4K pages."""
    rows = ROWS // 2
    batch, one = Batch(guest(pages, stage=(kind, size)), rng, rows), Batch(guest(pages), rng, rows)

    def between():
        batch.tables.chill()
        one.tables.chill()

    race("Two stages", f"{kind.upper()} of {size} pages, {NAMES[pages]}", "one stage", batch.translate, one.translate,
         batch.fresh, rows=rows, between=between, check=batch.check, bars=[("at most", 3.0)],
         rounds=3 if QUICK else min(ROUNDS, 9))
