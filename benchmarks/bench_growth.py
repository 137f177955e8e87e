"""How translations a second fall as the tables grow, and rise as the batch grows."""

import gc

import numpy as np
import pytest
from bench_batch import TAKE
from cases import SMALL, Batch, guest
from conftest import QUICK, ROUNDS, ROWS
from tables import Guest, accesses

FOOTPRINTS = [12, 16, 18, 20, 22, 24, 26] if QUICK else [12, 14, 16, 18, 20, 22, 24, 26, 28, 30]
BATCHES = [10 ** n for n in range(7 if QUICK else 8)]
UNITS = ("B", "KiB", "MiB", "GiB")


def size_text(size):
    unit = (size.bit_length() - 1) // 10
    return f"{size >> 10 * unit} {UNITS[unit]}"


@pytest.mark.parametrize("shift", FOOTPRINTS)
def bench_footprint(race, rng, shift):
    """Leaf tables of 2**shift bytes: 512 pages to 134 million."""
    rows = ROWS // 2
    batch = Batch(Guest((1 << shift) // 8), rng, rows)
    race("Footprint", f"{size_text(1 << shift)} of leaf tables", TAKE, batch.translate, batch.take, batch.fresh, rows=rows,
         between=batch.tables.chill, check=batch.check, x=1 << shift, rounds=3 if QUICK else min(ROUNDS, 7))
    del batch
    gc.collect()


@pytest.mark.parametrize("rows", BATCHES)
def bench_batch_size(race, rng, rows):
    """Batches of n rows over 32,768 pages, with all that a call from Python costs; several calls a round if they are small."""
    calls = max(1, (10_000 if QUICK else 20_000) // rows)
    tables = guest(SMALL)
    batch = Batch(tables, rng, rows)

    def fresh():
        columns = (tables.addresses(rng, calls * rows), accesses(rng, calls * rows))
        columns = (*columns, tables.leaf_index(columns[0]))
        return (list(zip(*(np.split(column, calls) for column in columns), strict=True)),)

    def translate(batches):
        for arguments in batches:
            batch.translate(*arguments)

    def take(batches):
        for arguments in batches:
            batch.take(*arguments)

    race("Batch size", f"{rows:,} row{'s' if rows > 1 else ''}", TAKE, translate, take, fresh, rows=rows * calls,
         between=tables.chill, x=rows, rounds=3 if QUICK or rows > 10**6 else ROUNDS)
