# SPDX-License-Identifier: Apache-2.0
"""TLB hierarchies in plain Python, one entry at a time: what the compiled ones must agree with."""

from collections import Counter

KINDS, PAGES = ("load", "store", "fetch"), ("4k", "2m", "1g")
ROOT = {"32": 2, "pae": 2, "4l": 4, "5l": 5}


def shift_of(page, mode):
    return {"4k": 12, "2m": 22 if mode == "32" else 21, "1g": 30}[page]


class Entries:
    """One set-associative structure. An entry is (page number, size, space, pcid or None where global)."""

    def __init__(self, level, seed):
        self.level, self.random = level, seed
        self.sets = [[None] * level.ways for _ in range(level.sets)]
        self.trees = [{} for _ in range(level.sets)]
        self.ordered = level.policy in ("lru", "fifo")

    def where(self, entry):
        number = entry[0] % self.level.sets
        return number, self.sets[number]

    def use(self, entry):
        number, ways = self.where(entry)
        if entry not in ways:
            return False
        if self.level.policy == "lru":
            ways.remove(entry)
            ways.insert(0, entry)
        elif self.level.policy == "plru":
            self.turn(number, ways.index(entry))
        return True

    def turn(self, number, way):
        """Each half that has the way on its path: the other one is next."""
        low, high = 0, self.level.ways
        while high - low > 1:
            middle = low + (high - low + 1) // 2
            self.trees[number][low, high] = "right" if way < middle else "left"
            low, high = (low, middle) if way < middle else (middle, high)

    def next_way(self, number):
        low, high = 0, self.level.ways
        while high - low > 1:
            middle = low + (high - low + 1) // 2
            low, high = (middle, high) if self.trees[number].get((low, high), "left") == "right" else (low, middle)
        return low

    def insert(self, entry):
        number, ways = self.where(entry)
        assert entry not in ways
        if self.ordered:
            ways.insert(0, entry)
            return ways.pop()
        if None in ways:
            way = ways.index(None)
        elif self.level.policy == "plru":
            way = self.next_way(number)
        else:
            self.random = (self.random * 6364136223846793005 + 1442695040888963407) % 2**64
            way = (self.random >> 33) % len(ways)
        victim, ways[way] = ways[way], entry
        if self.level.policy == "plru":
            self.turn(number, way)
        return victim

    def drop_if(self, condition):
        for ways in self.sets:
            for way, entry in enumerate(ways):
                if entry is not None and condition(entry):
                    ways[way] = None
            if self.ordered:
                ways.sort(key=lambda entry: entry is None)          # stable: empty ways go to the end

    def drop(self, wanted):
        self.drop_if(lambda entry: entry == wanted)


class Seen:
    """What a level was asked for, and a fully associative LRU list of as many entries that is asked for the same."""

    def __init__(self, entries):
        self.entries, self.held, self.removed, self.ever = entries, [], set(), set()

    def ask(self, entry):
        """Why a miss would be one."""
        why = ("compulsory" if entry not in self.ever else "removed" if entry in self.removed
               else "conflict" if entry in self.held else "capacity")
        if entry in self.held:
            self.held.remove(entry)
        self.held = [entry, *self.held][:self.entries]
        self.ever.add(entry)
        self.removed.discard(entry)
        return why

    def drop_if(self, condition):
        self.removed |= {entry for entry in self.ever if condition(entry)}
        self.held = [entry for entry in self.held if not condition(entry)]


class Model:
    """A hierarchy, as TlbHierarchy documents it."""

    def __init__(self, levels, psc=None, seed=0):
        self.levels = [Entries(level, (seed + i) % 2**64) for i, level in enumerate(levels)]
        self.psc = {number: Entries(cache, (seed + 16 + number) % 2**64) for number, cache in (psc or {}).items()}
        self.hits, self.walks, self.psc_hits, self.replaced = Counter(), Counter(), Counter(), Counter()
        self.refs = self.cached_refs = self.unmapped = 0
        self.seen = [Seen(level.sets * level.ways) for level in levels]
        self.misses, self.walks_by_refs, self.pages, self.ips = Counter(), Counter(), Counter(), Counter()
        self.space = self.pcid = 0
        self.mode = "4l"

    def sharing(self, number, page, before):
        """Levels before or behind one that have the page size and a kind of access in common with it."""
        me = self.levels[number].level
        numbers = range(number) if before else range(number + 1, len(self.levels))
        return [i for i in numbers if page in self.levels[i].level.pages and set(me.kinds) & set(self.levels[i].level.kinds)]

    def fill(self, number, entry):
        victim = self.levels[number].insert(entry)
        if victim is None:
            return
        self.replaced[number] += 1
        if self.levels[number].level.inclusion == "inclusive":
            for i in self.sharing(number, victim[1], True):
                self.levels[i].drop(victim)
        behind = self.sharing(number, victim[1], False)
        if behind and self.levels[behind[0]].level.inclusion == "exclusive" and not self.levels[behind[0]].use(victim):
            self.fill(behind[0], victim)

    def access(self, gva, kind, user, page, is_global, ip=0):
        """(number of the level or None, references)."""
        if page is None:
            self.unmapped += 1
            return None, 0
        gva %= 2**57
        entry = (gva >> shift_of(page, self.mode), page, self.space, None if is_global else self.pcid)
        asked = [i for i, level in enumerate(self.levels) if kind in level.level.kinds and page in level.level.pages]
        hit = None
        for i in asked:
            if self.levels[i].use(entry):
                hit = i
                break
        missed = asked if hit is None else asked[:asked.index(hit)]
        for i in asked[:len(missed) + 1]:
            why = self.seen[i].ask(entry)
            if i in missed:
                self.misses[i, why] += 1
        if hit is not None and missed and self.levels[hit].level.inclusion == "exclusive":
            self.levels[hit].drop(entry)
        for i in reversed(missed):
            if self.levels[i].level.inclusion != "exclusive":
                self.fill(i, entry)
        if hit is not None:
            self.hits[hit, kind, user, page] += 1
            return hit, 0
        self.walks[kind, user, page] += 1
        read = self.walk(gva, PAGES.index(page) + 1)
        self.refs += read
        self.cached_refs += ROOT[self.mode] - PAGES.index(page) - read if page != "1g" or ROOT[self.mode] > 2 else 0
        self.walks_by_refs[read] += 1
        self.pages[entry[0], page] += 1
        self.ips[ip] += 1
        return None, read

    def walk(self, gva, leaf):
        bits, read, upper = 10 if self.mode == "32" else 9, 1, []
        for level in range(leaf + 1, ROOT[self.mode] + 1):
            entry = (gva >> (12 + bits * (level - 1)), "4k", self.space, self.pcid)
            if level in self.psc and self.psc[level].use(entry):
                self.psc_hits[level] += 1
                break
            read += 1
            upper.append((level, entry))
        for level, entry in reversed(upper):
            if level in self.psc:
                self.psc[level].insert(entry)
        return read

    # ---- invalidation ---------------------------------------------------------------------------------------------------

    def drop_if(self, condition):
        for level in [*self.levels, *self.psc.values(), *self.seen]:
            level.drop_if(condition)

    def drop_page(self, gva, pcid):
        gva %= 2**57
        for level in [*self.levels, *self.seen]:
            level.drop_if(lambda entry: entry[2:] == (self.space, pcid) and entry[0] == gva >> shift_of(entry[1], self.mode))

    def drop_upper(self, pcid):
        for cache in self.psc.values():
            cache.drop_if(lambda entry: entry[2:] == (self.space, pcid))

    def mov_cr3(self, pcid, keep):
        self.pcid = pcid
        if not keep:
            self.drop_if(lambda entry: entry[2:] == (self.space, pcid))

    def invlpg(self, gva):
        self.drop_page(gva, self.pcid)
        self.drop_page(gva, None)
        self.drop_upper(self.pcid)

    def invpcid(self, type, pcid, gva):
        if type == 0:
            self.drop_page(gva, pcid)
            self.drop_upper(pcid)
        elif type == 1:
            self.drop_if(lambda entry: entry[2:] == (self.space, pcid))
        else:
            self.drop_if(lambda entry: entry[2] == self.space and (type == 2 or entry[3] is not None))

    def page_fault(self, gva):
        self.drop_page(gva, self.pcid)
        bits = 10 if self.mode == "32" else 9
        for level, cache in self.psc.items():
            cache.drop((gva % 2**57 >> (12 + bits * (level - 1)), "4k", self.space, self.pcid))

    def flush_space(self, space):
        self.drop_if(lambda entry: entry[2] == space)

    def flush(self):
        self.drop_if(lambda entry: True)
