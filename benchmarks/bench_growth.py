"""How translations a second fall as the tables grow and lie in more slots, and rise as the batch grows."""

import gc
import itertools
import os

import numpy as np
import pytest
from bench_batch import TAKE
from bench_machine import NPT, SHADOW, machine
from cases import SMALL, Batch, guest
from conftest import QUICK, ROUNDS, ROWS
from tables import MAXPHYADDR, MIX, PAGE, WARM, Guest, accesses

import kvmmu
from kvmmu import Access, Accesses, CpuModel, GuestMemory, Vcpu
from kvmmu.traces import Op

FOOTPRINTS = [12, 16, 18, 20, 22, 24, 26] if QUICK else [12, 14, 16, 18, 20, 22, 24, 26, 28, 30]
LARGEST = [] if QUICK else [32]                         # on top of them, where there is memory
MACHINE_FOOTPRINTS = [12, 16, 20, 22] if QUICK else [12, 14, 16, 18, 20, 22, 24]
SLOTS = [1, 64, 4096] if QUICK else [1, 4, 16, 64, 256, 1024, 4096, 16384]
BATCHES = [10 ** n for n in range(7 if QUICK else 8)]
UNITS = ("B", "KiB", "MiB", "GiB")


def size_text(size):
    unit = (size.bit_length() - 1) // 10
    return f"{size >> 10 * unit} {UNITS[unit]}"


@pytest.mark.parametrize("shift", FOOTPRINTS + LARGEST)
def bench_footprint(race, rng, shift):
    """Leaf tables of 2**shift bytes: 512 pages to 537 million."""
    rows = ROWS // 2
    # while they are made there are four arrays of the size
    if os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 5 << shift:
        pytest.skip(f"a machine of less than {5 << shift >> 30} GiB")
    batch = Batch(Guest((1 << shift) // 8, mix=WARM if shift in LARGEST else MIX), rng, rows)
    race("Footprint", f"{size_text(1 << shift)} of leaf tables", TAKE, batch.translate, batch.take, batch.fresh, rows=rows,
         between=batch.tables.chill, check=batch.check, x=1 << shift, rounds=3 if QUICK else min(ROUNDS, 7))
    del batch
    gc.collect()


@pytest.mark.parametrize("shift", [shift for shift in FOOTPRINTS if shift <= 26])
def bench_footprint_of_two_stages(race, rng, shift):
    """The same of L2, behind EPT of 4K pages, which has as many leaf tables of its own."""
    rows = ROWS // 2
    batch = Batch(Guest((1 << shift) // 8, stage=("ept", "4K")), rng, rows)
    race("Footprint", f"two stages, {size_text(1 << shift)} of leaf tables", TAKE, batch.translate, batch.take, batch.fresh,
         rows=rows, between=batch.tables.chill, check=batch.check, x=1 << shift, rounds=3 if QUICK else min(ROUNDS, 7))
    del batch
    gc.collect()


@pytest.mark.parametrize("shift", FOOTPRINTS)
def bench_replay_footprint(race, rng, shift):
    """A trace in memory, walked in order on leaf tables of 2**shift bytes."""
    gc.collect()
    rows = ROWS // 2
    batch = Batch(Guest((1 << shift) // 8), rng, rows)

    def fresh():
        gva, access, index = batch.fresh()
        op = np.where(access & np.uint8(Access.FETCH), Op.FETCH, access & np.uint8(Access.WRITE) != 0).astype(np.uint8)
        return {"op": op, "addr": gva, "access": access, "size": np.ones(rows, np.uint8)}, index

    def replay(chunk, _):
        assert kvmmu.replay([chunk], batch.tables.vcpu).accesses == rows

    race("Replay footprint", f"{size_text(1 << shift)} of leaf tables", TAKE, replay,
         lambda _, index: batch.take(None, None, index), fresh, rows=rows, between=batch.tables.chill, x=1 << shift,
         rounds=3 if QUICK else min(ROUNDS, 5))


@pytest.mark.parametrize(("name", "host"), [("NPT", NPT), ("shadow", SHADOW)])
@pytest.mark.parametrize("shift", MACHINE_FOOTPRINTS)
def bench_machine_footprint(race, rng, name, host, shift):
    """Random accesses to pages that the machine has mapped, in leaf tables of 2**shift bytes of the guest's and of the host's."""
    rows, pages = ROWS // 2, (1 << shift) // 8
    _, vcpu, gva = machine(host, pages=pages)
    vcpu.access(gva, Access.WRITE)
    out, taken, leaves = Accesses.empty(rows), np.empty(rows, np.uint64), gva.copy()

    def check(rows_of, index):
        vcpu.access(rows_of, 0, out=out)
        assert (out.gpa == rows_of).all()
        assert not out.exits.any()

    def fresh():
        index = rng.integers(0, pages, rows)
        return gva[index], index

    race("Machine footprint", f"{name}, {size_text(1 << shift)} of leaf tables", TAKE,
         lambda rows_of, _: vcpu.access(rows_of, 0, out=out), lambda _, index: leaves.take(index, out=taken, mode="clip"), fresh,
         rows=rows, check=check, x=1 << shift, rounds=3 if QUICK else min(ROUNDS, 5))


@pytest.mark.parametrize("slots", SLOTS)
def bench_slots(race, rng, slots):
    """One page in each of 32,768 leaf tables, which lie in so many slots."""
    tables = guest(SMALL, spread=True)
    batch = Batch(tables, rng, ROWS)
    data = tables.memory.view(np.uint8)
    pages = data.size // PAGE
    edges = [pages * i // slots * PAGE for i in range(slots)] + [data.size]
    memory = GuestMemory(data[:edges[1]])
    for start, end in itertools.pairwise(edges[1:]):
        memory.add_slot(start, data[start:end])
    vcpu = Vcpu(memory, cpu=CpuModel(maxphyaddr=MAXPHYADDR))
    vcpu.set_regs(tables.vcpu.regs)
    batch.walk = vcpu.gva_walk
    race("Slots", f"{slots:,} slot{'s' if slots > 1 else ''}", TAKE, batch.translate, batch.take, batch.fresh, rows=ROWS,
         between=tables.chill, check=batch.check, x=slots, rounds=3 if QUICK else min(ROUNDS, 7))


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
