# SPDX-License-Identifier: Apache-2.0
"""TLB hierarchies against a model in plain Python, by hand, and their configuration."""

import gc
import os
import random
import threading
import time

import numpy as np
import pytest
from tlb_model import KINDS, PAGES, Model

from kvmmu import Access, TlbHierarchy, TlbLevel
from kvmmu.tlb._hierarchy import TlbLevels
from kvmmu.tlb.counters import MISS_CLASSES

HIERARCHIES = int(os.environ.get("KVMMU_TLB_HIERARCHIES", "300"))
ACCESS = {"load": Access.READ, "store": Access.WRITE, "fetch": Access.FETCH}


def some(rng, names):
    return tuple(name for name in names if rng.random() < 0.6) or (rng.choice(names),)


def random_level(rng, name, before, simple):
    policy = "lru" if simple else rng.choice(["lru", "fifo", "plru", "random"])
    ways = rng.choice([1, 2, 3, 4, 5, 7, 8, 12, 16, 18])
    kinds, pages = some(rng, KINDS), some(rng, PAGES)
    inclusion = "none" if simple else rng.choice(["none", "none", "inclusive", "exclusive"])
    if inclusion == "exclusive" and not all(any(kind in level.kinds and page in level.pages for level in before)
                                            for kind in kinds for page in pages):
        inclusion = "none"
    return TlbLevel(name, rng.choice([1, 2, 3, 4, 5, 8, 12]), ways, policy, kinds, pages, inclusion)


def random_hierarchy(rng):
    levels = []
    simple = rng.random() < 0.4                         # LRU alone has a way of its own
    for i in range(rng.randrange(1, 6)):
        levels.append(random_level(rng, f"l{i}", levels, simple))
    psc = {number: TlbLevel("psc", rng.choice([1, 2, 3]), rng.choice([1, 2, 4]), rng.choice(["lru", "fifo", "plru", "random"]))
           for number in (2, 3, 4, 5) if rng.random() < 0.5}
    seed = rng.getrandbits(64)
    return TlbHierarchy(levels, psc=psc, seed=seed, details=rng.random() < 0.5), Model(levels, psc, seed)


def some_rows(rng, count, space, globals_are):
    """(gva, kind, user, page, is_global) rows that come back to the same pages often."""
    kinds, bases = rng.choices(KINDS, k=3), [rng.getrandbits(64) for _ in range(3)]
    rows = []
    for _ in range(count):
        page = rng.choice([*PAGES, *PAGES, *PAGES, None])
        gva = (rng.choice(bases) + rng.randrange(space) * 4096 * rng.choice([1, 1, 1, 512, 1 << 18])) % 2**64
        rows.append((gva, rng.choice(kinds), rng.random() < 0.5, page, rng.random() < globals_are, rng.randrange(4)))
        while rng.random() < 0.4:                       # the same page again, and again
            rows.append(((rows[-1][0] & ~0xFFF) + rng.randrange(4096), *rows[-1][1:]))
    return rows


def run(tlb, rows, how):
    """(level, refs) of each row."""
    gva = np.array([row[0] for row in rows], np.uint64)
    access = np.array([ACCESS[row[1]] | (Access.USER if row[2] else 0) for row in rows], np.uint8)
    level = np.array([0 if row[3] is None else PAGES.index(row[3]) + 1 for row in rows], np.uint8)
    out = {"level": np.empty(len(rows), np.uint8), "refs": np.empty(len(rows), np.uint8)}
    is_global = np.array([row[4] for row in rows], bool)
    ip = np.array([row[5] for row in rows], np.uint64)
    if how is not None:
        tlb._core.run(gva, access, level, is_global.view(np.uint8), out["level"], out["refs"], how, ip)
    else:
        tlb.access(gva, access, level, is_global=is_global if is_global.any() else None, ip=ip, out=out)
    return list(zip((None if number == 255 else number for number in out["level"].tolist()), out["refs"].tolist(), strict=True))


def check_counters(tlb, model):
    stats = tlb.stats()
    for number in range(len(tlb.levels)):
        for k, kind in enumerate(KINDS):
            for user in (False, True):
                for p, page in enumerate(PAGES):
                    assert model.hits[number, kind, user, page] == stats.hits[number, k, int(user), p]
                    assert model.walks[kind, user, page] == stats.walks[k, int(user), p]
    assert (model.refs, model.cached_refs, model.unmapped) == (stats.guest_refs, stats.cached_refs, stats.unmapped)
    if stats.details is not None:
        check_details(stats.details, model)
    assert {number: model.psc_hits[number] for number in tlb.psc} == stats.psc_hits
    assert tuple(model.replaced[number] for number in range(len(tlb.levels))) == stats.replaced


def check_details(details, model):
    for number in range(len(model.levels)):
        assert {why: model.misses[number, why] for why in MISS_CLASSES} == dict(zip(
            MISS_CLASSES, details.misses[number].tolist(), strict=True))
    assert [model.walks_by_refs[read] for read in range(6)] == details.walks_by_refs.tolist()
    assert sorted(count for (_, _), count in model.pages.items()) == sorted(details.pages[:, 2].tolist())
    assert sorted(PAGES.index(page) for (_, page) in model.pages) == sorted(details.pages[:, 1].tolist())
    if details.ips is not None:
        assert model.ips == dict(details.ips.tolist())
        assert details.ips[:, 1].tolist() == sorted(details.ips[:, 1].tolist(), reverse=True)
    else:
        assert not model.ips


def invalidate(rng, both, rows):
    """One operation, the same on both."""
    gva, pcid = rng.choice(rows)[0], rng.randrange(3)
    operation = rng.randrange(7)
    for tlb in both:
        state = random.Random(gva + pcid)
        if operation == 0:
            tlb.invlpg(gva)
        elif operation == 1:
            tlb.invpcid(state.randrange(4), pcid, gva)
        elif operation == 2:
            tlb.mov_cr3(pcid, keep=state.random() < 0.6)
        elif operation == 3:
            tlb.flush_space(state.randrange(3))
        elif operation == 4 and state.random() < 0.3:
            tlb.flush()
        else:
            space, mode = state.randrange(3), state.choice(["32", "pae", "4l", "5l"])
            if isinstance(tlb, Model):
                tlb.space, tlb.pcid, tlb.mode = space, pcid, mode
            else:
                tlb.use(space, pcid, mode)


def test_random_hierarchies():
    """All policies, inclusions, tags, sizes, invalidations: every access meets the same as in the model."""
    first = int(os.environ.get("KVMMU_TLB_SEED", "0"))
    for seed in range(first, first + HIERARCHIES):
        rng = random.Random(seed)
        tlb, model = random_hierarchy(rng)
        how = rng.choice([None, None, "portable", "scalar"])
        globals_are = rng.choice([0, 0.2])
        rows = []
        for _ in range(rng.randrange(1, 8)):
            rows = some_rows(rng, rng.randrange(1, 120), rng.choice([4, 16, 64, 300]), globals_are)
            assert [model.access(*row) for row in rows] == run(tlb, rows, how), seed
            invalidate(rng, (tlb, model), rows)
        check_counters(tlb, model)


def stream(rng, rows):
    """Addresses of which some streams have many, some few repetitions."""
    kind = rng.integers(6)
    page = [lambda: rng.integers(0, 40, rows), lambda: rng.integers(0, 1 << 20, rows),
            lambda: np.arange(rows) + rng.integers(1 << 30),
            lambda: np.repeat(rng.integers(0, 200, rows // 7 + 1), 7)[:rows], lambda: np.arange(rows) // 600,
            lambda: np.where(rng.random(rows) < 0.03, rng.integers(0, 30, rows), np.arange(rows) % 3)][kind]()
    return page.astype(np.uint64) << np.uint64(12) | rng.integers(0, 4096, rows, np.uint64)


def sizes_of(rng, rows):
    """Levels of leaves: one for all, each its own, or in long runs; 0 is no page."""
    kind = rng.integers(4)
    if kind == 0:
        return rng.integers(0, 4, rows).astype(np.uint8)
    if kind == 1:
        return np.repeat(rng.integers(0, 4, rows // 700 + 1), 700)[:rows].astype(np.uint8)
    return np.full(1, 1, np.uint8)


@pytest.mark.parametrize("seed", range(36))
def test_long_streams(seed):
    """Blocks with vectors, blocks without, and one access at a time agree; one class of accesses, or many."""
    rng, levels = np.random.default_rng(seed), []
    for i in range(rng.integers(1, 5)):
        level = random_level(random.Random(f"{seed} {i}"), f"l{i}", levels, True)
        levels.append(TlbLevel(f"l{i}", level.sets, level.ways) if seed % 3 else level)         # of all kinds and sizes
    psc = {2: TlbLevel("pde", 2, 4)} if seed % 2 else {}
    hierarchies = {how: TlbHierarchy(levels, psc=psc) for how in (None, "portable", "scalar")}
    for part in range(6):
        rows = int(rng.integers(1, 6000))
        gva = stream(rng, rows)
        access = np.full(1, Access.WRITE, np.uint8) if part % 2 else rng.choice(
            np.array([Access.READ, Access.WRITE | Access.USER, Access.FETCH], np.uint8), rows)
        leaf = sizes_of(rng, rows)
        is_global = (rng.random(rows) < 0.2).astype(np.uint8) if rng.random() < 0.4 else None
        seen = {}
        for how, tlb in hierarchies.items():
            columns = np.full(rows, 7, np.uint8), np.full(rows, 7, np.uint8)
            tlb._core.run(gva, access, leaf, is_global, *columns, how)
            seen[how] = [column.tolist() for column in columns]
        assert seen[None] == seen["scalar"] == seen["portable"]
    counters = {how: tlb.stats().to_dict() for how, tlb in hierarchies.items()}
    assert counters[None] == counters["scalar"] == counters["portable"]
    for number in range(len(levels)):
        assert np.array_equal(hierarchies[None]._core.keys(number), hierarchies["scalar"]._core.keys(number))


def two_levels():
    return TlbHierarchy([TlbLevel("l1", 1, 2), TlbLevel("l2", 2, 2)], psc={2: TlbLevel("pde", 1, 2)})


def test_by_hand():
    """Five pages through two ways and two sets of two: worked out on paper."""
    tlb = two_levels()
    out = {"level": np.empty(8, np.uint8), "refs": np.empty(8, np.uint8)}
    # 2 and 0 fill set 0 of l2; 0 is used again, so that 4 replaces 2
    pages = np.array([0, 1, 1, 2, 0, 1, 4, 0], np.uint64)
    tlb.access(pages << np.uint64(12), out=out)
    assert out["level"].tolist() == [255, 255, 0, 255, 1, 1, 255, 1]
    # the first walk reads four entries, the others one: their PDE is cached
    assert out["refs"].tolist() == [4, 1, 0, 1, 0, 0, 1, 0]
    stats = tlb.stats()
    assert (stats.accesses, int(stats.walks.sum()), stats.guest_refs, stats.psc_hits) == (8, 4, 7, {2: 3})
    assert stats.to_dict()["levels"][0]["hits"] == 1
    assert stats.to_dict()["levels"][1]["hits"] == 3
    assert "page walks" in str(stats)


def test_an_invalidated_large_page_goes_whole():
    tlb = TlbHierarchy([TlbLevel("l1", 16, 4)])
    tlb.access([0x200000, 0x3FF000], level=2)
    assert int(tlb.stats().walks.sum()) == 1
    tlb.invlpg(0x212345)
    tlb.access([0x200000], level=2)
    assert int(tlb.stats().walks.sum()) == 2


def test_global_pages_outlive_mov_to_cr3():
    tlb = TlbHierarchy([TlbLevel("l1", 16, 4)])
    tlb.access([0x1000, 0x2000], is_global=[True, False])
    tlb.mov_cr3(0)
    tlb.access([0x1000, 0x2000], is_global=[True, False])
    assert (int(tlb.stats().walks.sum()), int(tlb.stats().hits.sum())) == (3, 1)
    tlb.clear_stats()
    tlb.invpcid(2)
    tlb.access([0x1000], is_global=[True])
    assert int(tlb.stats().walks.sum()) == 1


def test_a_hierarchy_without_levels_walks_always():
    tlb = TlbHierarchy([])
    tlb.access([0, 0, 0])
    assert (int(tlb.stats().walks.sum()), tlb.stats().guest_refs, tlb.stats().hits.shape) == (3, 12, (0, 3, 2, 3))


def test_no_rows():
    tlb = two_levels()
    tlb.access([])
    assert tlb.stats().accesses == 0


@pytest.mark.parametrize(("options", "message"), [
    ({"sets": 0}, "sets: want 1 to"), ({"ways": 1 << 25}, "ways: want 1 to"),
    ({"sets": 1 << 20, "ways": 32}, "at most 16777216 entries"),
    ({"policy": "mru"}, "policy: want 'lru'"), ({"policy": "plru", "ways": 65}, "at most 64"), ({"kinds": ()}, "got none"),
    ({"pages": ("8k",)}, "pages: want '4k'"), ({"name": ""}, "name: want a text"), ({"inclusion": 1}, "inclusion: want 'none'")])
def test_levels_that_cannot_be(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        TlbLevel(**{"name": "x", "sets": 4, "ways": 4} | options)


def test_hierarchies_that_cannot_be():
    level = TlbLevel("a", 1, 1, pages="4k")
    with pytest.raises(ValueError, match="2 have the name 'a'"):
        TlbHierarchy([level, level])
    with pytest.raises(ValueError, match="is exclusive, and no level before it has load of 2m"):
        TlbHierarchy([level, TlbLevel("b", 1, 1, pages=("2m",), inclusion="exclusive")])
    with pytest.raises(ValueError, match="at most 16"):
        TlbHierarchy([TlbLevel(str(i), 1, 1) for i in range(17)])
    with pytest.raises(TypeError, match="want TlbLevels"):
        TlbHierarchy([(1, 1)])
    with pytest.raises(ValueError, match="psc: want 2, 3, 4 or 5"):
        TlbHierarchy([level], psc={1: level})


@pytest.mark.parametrize(("arguments", "message"), [
    (([1, 2], [2, 2, 2]), "access: want 1 row or 2, got 3"),
    (([-1],), "gva: want 0 to"), (([1], 1, [300]), "level: want 0 to 255"),
    (([1.5],), "gva")])
def test_columns_that_cannot_be(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        two_levels().access(*arguments)


def test_out_is_checked():
    for column in (np.empty(2, np.uint8), np.empty(3, np.uint16), np.empty(6, np.uint8)[::2], [0, 0, 0]):
        with pytest.raises(ValueError, match="want a writable contiguous array of uint8 of 3 rows"):
            two_levels().access([1, 2, 3], out={"level": column})
    with pytest.raises(ValueError, match="out: want 'level' or 'refs'"):
        two_levels().access([1], out={"hit": np.empty(1, np.uint8)})


@pytest.mark.parametrize("how", ["level over access", "level over leaf", "refs over leaf", "level a row behind access",
                                 "refs over gva"])
def test_out_that_shares_memory_with_an_argument(how):
    """Counters and details are those of the arguments as they were passed."""
    rng = np.random.default_rng(3)
    gva = rng.integers(0, 40, 3000, np.uint64) << np.uint64(12)
    room = np.zeros(3001, np.uint8)
    access, leaf = room[:3000], np.ones(3000, np.uint8)
    access[:] = rng.choice(np.array([0, 2, 4, 16], np.uint8), 3000)
    wanted, found = (TlbHierarchy([TlbLevel("i", 4, 2, kinds="fetch"), TlbLevel("d", 4, 2, kinds=("load", "store"))],
                                  details=True) for _ in range(2))
    wanted.access(gva.copy(), access.copy(), leaf.copy())
    found.access(gva, access, leaf, out={
        "level over access": {"level": access}, "level over leaf": {"level": leaf}, "refs over leaf": {"refs": leaf},
        "level a row behind access": {"level": room[1:]}, "refs over gva": {"refs": gva.view(np.uint8)[8:3008]}}[how])
    assert found.stats().hits.tolist() == wanted.stats().hits.tolist()
    assert found.stats().details.misses.tolist() == wanted.stats().details.misses.tolist()
    assert found.stats().details.pages.tolist() == wanted.stats().details.pages.tolist()


def test_out_twice_the_same_memory():
    column = np.empty(3, np.uint8)
    with pytest.raises(ValueError, match="share memory"):
        two_levels().access([1, 2, 3], out={"level": column, "refs": column})


def test_toml(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text('seed = 3\n[[level]]\nname = "d"\nsets = 3\nways = 2\npages = ["4k"]\n'
                    '[[level]]\nname = "s"\nsets = 128\nways = 12\ninclusion = "inclusive"\n[psc.2]\nsets = 1\nways = 32\n')
    tlb = TlbHierarchy.from_toml(path)
    assert tlb.levels == (TlbLevel("d", 3, 2, pages=("4k",)), TlbLevel("s", 128, 12, inclusion="inclusive"))
    assert tlb.psc[2].entries == 32


@pytest.mark.parametrize(("text", "message"), [
    ("[[level", "not TOML"), ("levels = 1", "key: want 'level'"), ("level = 3", r"want \[\[level\]\]"),
    ('[[level]]\nname = "a"\nsets = 1', "level 0: has no ways"),
    ('[[level]]\nname = "a"\nsets = 1\nways = 1\nassoc = 2', "level 0: key"),
    ("[psc.9]\nsets = 1\nways = 1", "psc.9: want 2 to 5"), ('[[level]]\nname = "a"\nsets = -1\nways = 1', "sets: want 1 to")])
def test_toml_that_cannot_be(tmp_path, text, message):
    path = tmp_path / "a.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        TlbHierarchy.from_toml(path)
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize("text", ["", "seed = 3", "level = []", "[psc.2]\nsets = 1\nways = 4"])
def test_toml_without_levels(tmp_path, text):
    """It is a file that somebody forgot to fill; a hierarchy without levels is made in Python."""
    path = tmp_path / "a.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"a\.toml: has no level; want one or more \[\[level\]\] tables with name"):
        TlbHierarchy.from_toml(path)
    path.write_text('[[level]]\nname = "a"\nsets = 1\nways = 1\n[nested]')
    with pytest.raises(ValueError, match=r"a\.toml: nested: has no level"):
        TlbHierarchy.from_toml(path)
    assert TlbHierarchy([]).levels == ()


@pytest.mark.parametrize("path", [0, True, b"a.toml", None])
def test_toml_of_no_path(path):
    """An integer is no descriptor of a file that is open."""
    with pytest.raises(TypeError, match=f"path: want a path as str or path-like, got {type(path).__name__}"):
        TlbHierarchy.from_toml(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_toml_of_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "f.toml")
    with pytest.raises(ValueError, match=r"f\.toml: is a FIFO; allowed is a regular file"):
        TlbHierarchy.from_toml(tmp_path / "f.toml")
    with pytest.raises(ValueError, match="is a directory; allowed is a regular file"):
        TlbHierarchy.from_toml(tmp_path)
    with pytest.raises(ValueError, match="path: is empty"):
        TlbHierarchy.from_toml("")


@pytest.mark.parametrize("name", TlbHierarchy.presets())
def test_presets(name):
    """Each is read, and says where its figures are from."""
    tlb = TlbHierarchy.preset(name)
    tlb.access(np.arange(10_000, dtype=np.uint64) << np.uint64(12))
    assert tlb.stats().accesses == 10_000


def test_an_unknown_preset():
    with pytest.raises(ValueError, match="name: want .*skylake"):
        TlbHierarchy.preset("z80")


def test_too_many_tags():
    tlb = TlbHierarchy([TlbLevel("a", 1, 1)])
    for space in range(8):
        for pcid in range(4096):
            if (space, pcid) != (0, 0):
                tlb.use(space, pcid)
    with pytest.raises(ValueError, match="more than 32768"):
        tlb.use(9, 0)
    tlb.use(3, 5)


@pytest.mark.parametrize("arguments", [
    ([], {100000: (1, 1, 0)}), ([], {1: (1, 1, 0)}), ([(4, 4, 9, 0, 7, 7)], {}), ([(4, 100, 2, 0, 7, 7)], {}),
    ([(0, 4, 0, 0, 7, 7)], {}), ([(4, 4, 0, 5, 7, 7)], {}), ([(1 << 20, 1 << 20, 0, 0, 7, 7)], {})])
def test_the_compiled_levels_check_their_shape(arguments):
    with pytest.raises(ValueError, match="want|none|at most"):
        TlbLevels(*arguments, 0)


@pytest.fixture
def threads_change_in_collections():
    """Each collection of garbage, and there are many, lets another thread run: no step of many allocations is one step."""
    def yield_thread(_phase, _info):
        time.sleep(0)

    thresholds = gc.get_threshold()
    gc.callbacks.append(yield_thread)
    gc.set_threshold(20, 10, 1000)
    yield
    gc.set_threshold(*thresholds)
    gc.callbacks.remove(yield_thread)


def use_spaces_while(tlb, act, spaces):
    """Have a thread use spaces that are new, and act until it has."""
    stop = threading.Event()

    def use():
        for space in range(spaces):
            tlb.use(space)
        stop.set()

    thread = threading.Thread(target=use)
    thread.start()
    while not stop.is_set():
        act()
    thread.join()


def test_spaces_are_flushed_while_others_come_into_use():
    tlb = TlbHierarchy([TlbLevel("a", 4, 2)])
    use_spaces_while(tlb, lambda: tlb.flush_space(1), 20_000)


@pytest.mark.usefixtures("threads_change_in_collections")
def test_a_hierarchy_is_saved_while_spaces_come_into_use():
    tlb = TlbHierarchy([TlbLevel("a", 4, 2)])
    use_spaces_while(tlb, tlb._saved, 3000)


# What CPUID tells: leaf 18H of Intel's processors, 80000005H, 80000006H and 80000019H of AMD's. (level, entries)
ENTRIES = {
    "skylake": {"ITLB 4K": 128, "DTLB 4K": 64, "DTLB 2M": 32, "DTLB 1G": 4, "STLB": 1536, "STLB 1G": 16},
    "icelake": {"DTLB 4K loads": 64, "DTLB 2M loads": 32, "DTLB 1G loads": 8, "DTLB stores": 16, "STLB": 2048},
    "zen3": {"L1 ITLB": 64, "L1 DTLB": 64, "L2 ITLB": 512, "L2 DTLB": 2048, "L2 DTLB 1G": 64},
    "zen4": {"L1 ITLB": 64, "L1 DTLB": 72, "L2 ITLB": 512, "L2 DTLB": 3072, "L2 DTLB 1G": 64},
}


@pytest.mark.parametrize("name", ENTRIES)
def test_entries_of_presets(name):
    levels = {level.name: level.entries for level in TlbHierarchy.preset(name).levels}
    assert levels | ENTRIES[name] == levels


@pytest.mark.parametrize("name", ["zen3", "zen4"])
def test_pages_of_1g_in_the_second_level(name):
    """65 pages of 1G in turn: the first level of Zen 3 has 64, its second one as many; Zen 4's first level holds them all."""
    tlb = TlbHierarchy.preset(name)
    pages = np.arange(65, dtype=np.uint64) << np.uint64(30)
    tlb.access(np.concatenate([pages, pages[::-1]]), level=3)
    stats = tlb.stats()
    first = {"zen3": 64, "zen4": 65}[name]
    assert [int(hits.sum()) for hits in stats.hits] == [0, first, 0, 0, 0]
    assert int(stats.walks.sum()) == 130 - first
