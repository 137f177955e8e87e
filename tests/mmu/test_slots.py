# SPDX-License-Identifier: Apache-2.0
"""Memslots and lists of SPTEs by themselves."""

import numpy as np
import pytest
from internals import memslot, pte_lists

M2, G1 = 512, 512 * 512


def allowed(first, npages, gfn, level):
    """Whether a page of the level around gfn lies in the slot with all of it."""
    size = {1: 1, 2: M2, 3: G1}[level]
    start = gfn - gfn % size
    return first <= start and start + size <= first + npages


@pytest.mark.parametrize(("first", "npages"), [
    (0, 1), (0, M2), (0, M2 + 1), (1, M2), (M2 - 1, 2), (M2, 3 * M2), (5, 3 * G1), (G1, G1), (G1 + 7, 2 * G1), (3 * G1, 1)])
def test_slot_edges_limit_large_pages(first, npages):
    """No page reaches over an edge of its slot."""
    slot = memslot(first, npages)
    frames = {first, first + npages - 1} | {
        gfn for k in range(4) for size in (M2, G1)
        for gfn in (first + k * size, first + k * size - first % size, first + npages - k * size)}
    for gfn in sorted(frame for frame in frames if first <= frame < first + npages):
        for limit in (1, 2, 3):
            want = max(level for level in range(1, limit + 1)
                       if all(allowed(first, npages, gfn, at) for at in range(1, level + 1)))
            assert want == slot.max_mapping_level(gfn, limit), f"{gfn:#x} limit {limit}"


@pytest.mark.parametrize("backing", [1, 2, 3])
def test_host_backing_limits_large_pages(backing):
    assert backing == memslot(0, 2 * G1, backing).max_mapping_level(G1 + 5)


def test_host_frames_agree_with_guest_frames_where_huge_pages_may_map():
    slot = memslot(G1 + 77, 3 * G1, pfn=12345)
    assert [slot.pfn(gfn) % G1 for gfn in (G1 + 77, 2 * G1, 4 * G1)] == [77, 0, 0]
    assert slot.pfn(G1 + 77) >= 12345
    assert 12345 == memslot(77, 10, backing=1, pfn=12345).pfn(77)


def test_reasons_against_large_pages_add_up():
    """Two tables in one 2M page: both must go before it may be large again."""
    slot = memslot(0, 4 * G1)
    slot.disallow_lpage(M2 + 3)
    slot.disallow_lpage(M2 + 9)
    assert 1 == slot.max_mapping_level(M2)
    assert 2 == slot.max_mapping_level(0)                       # the other 2M pages of that gigabyte
    assert 3 == slot.max_mapping_level(G1)
    slot.disallow_lpage(M2 + 3, -1)
    assert 1 == slot.max_mapping_level(M2)
    slot.disallow_lpage(M2 + 9, -1)
    assert 3 == slot.max_mapping_level(M2)


def test_write_tracking_counts():
    slot = memslot(0, G1)
    slot.track_writes(5)
    slot.track_writes(5)
    slot.track_writes(5, -1)
    assert slot.is_write_tracked(5)
    assert not slot.is_write_tracked(6)
    assert 1 == slot.max_mapping_level(6)
    slot.track_writes(5, -1)
    assert not slot.is_write_tracked(5)
    assert 3 == slot.max_mapping_level(6)


def test_lists_hold_what_a_list_holds():
    """Random additions and removals against Python lists; descriptors are used again."""
    rng = np.random.default_rng(7)
    lists = pte_lists(4)
    model = [[] for _ in range(4)]
    for step in range(30_000):
        i = int(rng.integers(4))
        if rng.random() < (0.6 if step % 2000 < 1000 else 0.3):
            sptep = int(rng.integers(1 << 40))
            assert len(model[i]) == lists.add(i, sptep)
            model[i].append(sptep)
        elif model[i]:
            sptep = model[i][int(rng.integers(len(model[i])))]
            assert lists.remove(i, sptep)
            model[i].remove(sptep)
        else:
            assert not lists.remove(i, 3)
        if step % 50 == 0:
            assert sorted(model[i]) == sorted(lists.entries(i))
    peak = lists.descriptors
    for i in range(4):
        for sptep in list(model[i]):
            assert lists.remove(i, sptep)
            assert not lists.remove(i, sptep)
        assert [] == lists.entries(i)
    for sptep in range(100):
        lists.add(0, sptep)
    assert list(range(100)) == lists.entries(0)                 # in order
    assert peak == lists.descriptors


def test_entry_number_zero_is_an_entry():
    lists = pte_lists(1)
    lists.add(0, 0)
    assert [0] == lists.entries(0)
    lists.add(0, 1)
    assert lists.remove(0, 0)
    assert [1] == lists.entries(0)
