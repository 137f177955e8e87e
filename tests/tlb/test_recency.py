# SPDX-License-Identifier: Apache-2.0
"""Stack distances against fully associative LRU lists of every size, with removals."""

import random

import numpy as np
import pytest

from kvmmu import Access, TlbHierarchy, TlbLevel
from kvmmu.tlb._recency import Recency

SIZES = 40


class Lists:
    """LRU lists of 1 to 40 entries."""

    def __init__(self):
        self.lists = [[] for _ in range(SIZES)]

    def use(self, key):
        """The sizes whose list has the key."""
        found = [size for size, held in enumerate(self.lists, 1) if key in held]
        for size, held in enumerate(self.lists, 1):
            if key in held:
                held.remove(key)
            held.insert(0, key)
            del held[size:]
        return found

    def remove_if(self, condition):
        for held in self.lists:
            held[:] = [key for key in held if not condition(key)]


@pytest.mark.parametrize("seed", range(60))
def test_every_size(seed):
    """A list of n entries has the key exactly if its distance is at most n; a key that was removed has none."""
    rng = random.Random(seed)
    recency, lists, used, removed = Recency(), Lists(), set(), set()
    keys = [rng.getrandbits(64) | 1 for _ in range(rng.choice([3, 20, 60, 300]))]
    removals = rng.choice([0, 0.02, 0.2])
    for _ in range(1500):
        key = rng.choice(keys[:rng.randrange(1, len(keys) + 1)])
        if rng.random() < removals:
            if rng.random() < 0.2:
                mask = rng.choice([0, 2, 6, 0xFF << 56])
                recency.remove_all(mask, key & mask)
                lists.remove_if(lambda other, mask=mask, key=key: other & mask == key & mask)
                removed |= {other for other in used if other & mask == key & mask}
            else:
                recency.remove(key)
                lists.remove_if(lambda other, key=key: other == key)
                removed |= {key} & used
            continue
        distance = recency.use(key)
        assert (distance == 0) == (key not in used)
        assert (distance == -1) == (key in removed)
        assert lists.use(key) == list(range(distance, SIZES + 1)) * (distance > 0)
        used.add(key)
        removed.discard(key)


def test_many_keys():
    """Slots are numbered anew, tables grow; distances of a cycle are its length."""
    recency = Recency()
    assert [recency.use(key) for key in range(1, 20_001)] == [0] * 20_000
    assert {recency.use(key) for _ in range(3) for key in range(1, 20_001)} == {20_000}
    recency.remove_all(1, 1)
    assert {recency.use(key) for key in range(1, 20_001, 2)} == {-1}
    assert recency.use(2) == 20_000                     # the odd ones took the empty places, in front of it


def test_key_0():
    with pytest.raises(ValueError, match="key: want 1 or more"):
        Recency().use(0)


def test_curve():
    """The misses of all sizes at once are those of hierarchies of one fully associative level each."""
    rng = np.random.default_rng(5)
    gva = rng.zipf(1.3, 4000).astype(np.uint64) % np.uint64(90) << np.uint64(12)
    level = (gva >> np.uint64(12) & np.uint64(7) == 0).astype(np.uint8) + 1
    wanted = []
    for entries in range(1, 60):
        one = TlbHierarchy([TlbLevel("only", 1, entries)])
        for part in (slice(0, 1500), slice(1500, 4000)):
            one.access(gva[part], Access.READ, level[part])
            one.invlpg(int(gva[7]))
        wanted.append(int(one.stats().walks.sum()))
    tlb = TlbHierarchy([], curve=True)
    for part in (slice(0, 1500), slice(1500, 4000)):
        tlb.access(gva[part], Access.READ, level[part])
        tlb.invlpg(int(gva[7]))
    curve = tlb.stats().details.curve().tolist()
    assert curve[0] == 4000
    assert wanted == [curve[min(entries, len(curve) - 1)] for entries in range(1, 60)]
    with pytest.raises(ValueError, match="curve=True"):
        TlbHierarchy([], details=True).stats().details.curve()
