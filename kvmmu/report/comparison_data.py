"""The data of a comparison's pictures: series that are alike are drawn once, and long maps are cut."""

from typing import Any

__all__ = ["COLOURS", "KIND_NAMES", "PAGE_HEIGHTS", "Series", "cost_bars", "curves", "drawn", "exits_over_time",
           "faults_over_time", "groups_of", "kind_of", "refs_bars", "refs_shares"]

Points = list[list[float]]
Series = list[tuple[str, Points]]
# Okabe and Ito's palette, darker where a colour is faint on white
COLOURS = ("#0072b2", "#c24e00", "#00795a", "#a34a80", "#7a6a00", "#2a7fb8", "#8a2be2", "#404040")
KIND_NAMES = ("loads", "stores (and loads)", "fetches", "fetches and stores")
PAGE_HEIGHTS = {0: 0.25, 1: 0.4, 2: 0.7, 3: 1.0}        # of a range, by the level of its pages
_GAP = 1 << 26                                          # bytes between ranges that are drawn in rows of their own
_ROWS = 24
_MOST_SERIES = 8


def alike(series: Series) -> Series:
    """Return the series, those of the same points as one with all their names."""
    found: list[tuple[list[str], Points]] = []
    for name, points in series:
        same = next((names for names, others in found if others == points), None)
        if same is None:
            found.append(([name], points))
        else:
            same.append(name)
    return [(", ".join(names), points) for names, points in found]


def drawn(series: Series) -> tuple[Series, list[str]]:
    """Return the series that have a colour of their own, and the names of the others."""
    return series[:_MOST_SERIES], [name for name, _ in series[_MOST_SERIES:]]


def curves(data: dict[str, Any]) -> Series:
    """Return misses per 1,000 accesses by number of TLB entries, by page policy."""
    total = max(data["accesses"], 1)
    return alike([(f"{page} pages", [[size, 1000 * misses / total] for size, misses in points])
                  for page, points in data["miss_curves"].items()])


def exits_over_time(data: dict[str, Any]) -> Series:
    """Return exits until each access, by host and page policy."""
    series: Series = []
    for design in data["designs"]:
        points = data["exits_over_time"].get(design["name"])
        if points:
            series.append((f"{design['host']} {design['page']}", [[0, 0], *points, [data["accesses"], points[-1][1]]]))
    return alike(list(dict(series).items()))


def faults_over_time(data: dict[str, Any]) -> Series:
    """Return page faults until each access, by what takes them."""
    return [(name, [[0, 0], *points, [data["accesses"], points[-1][1]]]) for name, points in data["faults_over_time"].items()]


def refs_shares(data: dict[str, Any]) -> Series:
    """Return the share of walks (percent) that read at most so many entries."""
    series: Series = []
    for design in data["designs"]:
        counts, points, sum_ = design["walks_by_refs"], [], 0
        total = sum(counts)
        for refs, count in enumerate(counts):
            sum_ += count
            points.append([refs, 100 * sum_ / total if total else 0])
        last = max((refs for refs, count in enumerate(counts) if count), default=0)
        series.append((design["name"], points[:last + 2]))
    return alike([one for one in series if one[1]])


def refs_bars(data: dict[str, Any]) -> tuple[list[str], list[tuple[str, list[float]]]]:
    """Return references of walks per 1,000 accesses, by design: the guest's entries and the host's."""
    total = max(data["accesses"], 1)
    names = [design["name"] for design in data["designs"]]
    return names, [(label, [1000 * design[key] / total for design in data["designs"]])
                   for label, key in (("guest entries", "guest_refs"), ("host entries", "host_refs"))]


def cost_bars(data: dict[str, Any]) -> tuple[list[str], list[tuple[str, list[float]]]] | None:
    """Return cycles per access by design; None without a cost model."""
    if "cost" not in data:
        return None
    return ([design["name"] for design in data["designs"]],
            [("cycles per access", [design["cycles_per_access"] for design in data["designs"]])])


def kind_of(kinds: int) -> int:
    """Return the place in KIND_NAMES of kinds of accesses: 1 loads, 2 stores, 4 fetches."""
    if kinds & 4:
        return 3 if kinds & 2 else 2
    return 1 if kinds & 2 else 0


def groups_of(regions: list[list[int]]) -> tuple[list[list[list[int]]], int]:
    """Return the regions in groups without large gaps, the largest ones, in order; and how many groups are left out."""
    groups: list[list[list[int]]] = []
    for region in regions:
        if groups and region[0] - (groups[-1][-1][0] + groups[-1][-1][1]) < _GAP:
            groups[-1].append(region)
        else:
            groups.append([region])
    kept = sorted(groups, key=lambda group: -sum(region[1] for region in group))[:_ROWS]
    return sorted(kept), len(groups) - len(kept)
