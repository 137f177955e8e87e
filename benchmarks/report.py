"""Tables and plots of a run of the benchmarks.

    python benchmarks/report.py RUN.json [DOCS]

Prints one table of ratios against the bars. With a directory DOCS it also writes the results into DOCS/performance.md,
between the two marks there, and the plots beside it.
"""

import argparse
import json
import platform
import sys
from pathlib import Path

GROUPS = ("Batch", "Modes", "Two stages", "Cliffs", "Threads", "Traces", "Replay", "Scalar", "Calls", "Machine", "Embedding",
          "Images", "Mappings", "Copies", "Peers", "TLB hierarchy", "Footprint", "Replay footprint",
          "Machine footprint", "Slots", "Batch size")
HEADINGS = ("", "case", "against", "ours ns", "theirs ns", "ratio", "quartiles", "bar", "")
LEAF_TABLES = "bytes of leaf tables"
PLOTS = (("Footprint", LEAF_TABLES, "footprint.svg"), ("Replay footprint", LEAF_TABLES, "replay_footprint.svg"),
         ("Machine footprint", LEAF_TABLES, "machine_footprint.svg"), ("Slots", "slots", "slots.svg"),
         ("Batch size", "rows", "batch_size.svg"), ("Threads", "threads", "threads.svg"))
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
COMMAND = "make bench"


class Row:
    """One race of a run."""

    def __init__(self, info):
        self.group, self.case, self.against = info["group"], info["case"], info["against"]
        self.ours, self.theirs, self.ratio = info["ours_ns"], info["theirs_ns"], info["ratio"]
        self.low, self.high, self.gain = info["low"], info["high"], info["gain"]
        self.bars, self.x = info["bars"], info["x"]
        self.kind = self.case.rpartition(", ")[0]           # which line of a plot

    @property
    def rate(self):
        """Millions of translations a second."""
        return 1e3 / self.ours

    def meets(self, bar):
        """Whether a bar is met."""
        kind, value = bar
        return {"at most": self.ratio <= value, "at least": self.ratio >= value, "rate": self.rate >= value}[kind]

    def bar_text(self, bar):
        kind, value = bar
        return f"at least {value:.3g} M/s ({self.rate:.3g})" if kind == "rate" else f"{kind} {value:g}"

    def cells(self):
        """The texts of the columns."""
        digits = 2 if self.ratio < 100 else 0
        unit = " x as fast" if self.gain else ""
        verdict = "" if not self.bars else "yes" if all(map(self.meets, self.bars)) else "NO"
        return (self.group, self.case, self.against, f"{self.ours:,.1f}", f"{self.theirs:,.1f}",
                f"{self.ratio:,.{digits}f}{unit}", f"{self.low:,.{digits}f} to {self.high:,.{digits}f}",
                ", ".join(map(self.bar_text, self.bars)), verdict)


def groups_of(rows):
    """All groups of a run in the order of the report, those that GROUPS does not know last."""
    return [*GROUPS, *sorted({row.group for row in rows} - set(GROUPS))]


def read(path):
    """(rows in the order of their groups, the whole file). Benchmarks that failed have none."""
    run = json.loads(Path(path).read_text())
    rows = [Row(info) for info in (benchmark["extra_info"] for benchmark in run["benchmarks"]) if "group" in info]
    order = groups_of(rows)
    return sorted(rows, key=lambda row: order.index(row.group)), run


def skipped_lines(run):
    return [f"not run: {row['group']}, {row['case']} against {row['against']}: {row['reason']}" for row in run["skipped"]]


def about(run):
    """Lines on machine, versions and command."""
    machine, cpu = run["machine_info"], run["machine_info"].get("cpu", {})
    versions = ", ".join(f"{name} {version}" for name, version in run["run"]["versions"].items())
    commit = run["commit_info"]
    changed = " with changes" if commit.get("dirty") else ""
    command = ("BENCH_QUICK=1 " if run["run"]["quick"] else "") + (
        "KVMMU_LINUX_DATA=... " if run["run"]["linux_data"] else "") + COMMAND
    load = run["run"].get("load")
    busy = "" if load is None else f" Load of others before the run: {load:.1f}."
    return [
        f"Command: `{command}`; commit {str(commit.get('id'))[:12]}{changed}; {run['datetime'][:10]}.",
        f"Machine: {cpu.get('brand_raw', machine['processor'] or platform.machine())}, {cpu.get('count', '?')} CPUs, "
        f"{machine['system']} {machine['release']}.{busy}",
        f"Versions: {versions}.",
        f"{run['run']['rows']:,} rows a round and {run['run']['rounds']} rounds where nothing else is said."]


def print_table(rows, run):
    """On the terminal, with rich if it is installed."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(len(row[i]) for row in [HEADINGS, *(row.cells() for row in rows)]) for i in range(len(HEADINGS))]
        for cells in [HEADINGS, *(row.cells() for row in rows)]:
            print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
    else:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in HEADINGS:
            table.add_column(heading, justify="right" if heading in HEADINGS[3:7] else "left", no_wrap=True)
        last = rows[0].group if rows else ""
        for row in rows:
            if row.group != last:
                table.add_section()
            last = row.group
            cells = row.cells()
            table.add_row(*cells, style="red" if cells[-1] == "NO" else None)
        Console(width=None if sys.stdout.isatty() else 200).print(table)
    for line in [*skipped_lines(run), *about(run)]:
        print(line)
    judged = [row.cells()[-1] for row in rows if row.bars]
    print(f"{judged.count('yes')} of {len(judged)} bars met")


def markdown(rows, run, plots):
    """The results for performance.md."""
    lines = [BEGIN, "", *(f"{line}  " for line in about(run)), ""]
    for group in groups_of(rows):
        chosen = [row for row in rows if row.group == group]
        if not chosen:
            continue
        lines += [f"### {group}", "", "| case | against | ours, ns | theirs, ns | ratio | quartiles | bar | met |",
                  "|---|---|--:|--:|--:|--:|---|---|"]
        lines += [f"| {' | '.join(row.cells()[1:])} |" for row in chosen]
        lines.append("")
        if group in plots:
            lines += [f"![{group}]({plots[group]})", ""]
    lines += [f"{line}  " for line in skipped_lines(run)]
    return "\n".join([*lines, END])


def draw(rows, folder):
    """Save the plots; the file name of each by group. None without matplotlib."""
    try:
        import matplotlib
        matplotlib.use("svg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no plots: matplotlib is not installed (extra plot)")
        return {}
    matplotlib.rcParams.update({"svg.hashsalt": "kvmmu", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    plots = {}
    for group, label, name in PLOTS:
        chosen = sorted((row for row in rows if row.group == group), key=lambda row: row.x)
        if not chosen:
            continue
        figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
        axes.set_xlabel(label)
        if group == "Threads":
            axes.plot([1, *(row.x for row in chosen)], [1, *(row.ratio for row in chosen)], "o-")
            axes.set_ylabel("gain over one thread")
            axes.set_ylim(0)
            axes.set_xticks([1, *(row.x for row in chosen)])
        else:
            kinds = sorted({row.kind for row in chosen})
            lines = [[row for row in chosen if row.kind == kind] for kind in kinds]
            for kind, some in zip(kinds, lines, strict=True):
                axes.plot([row.x for row in some], [row.ours for row in some], "o-", label=f"kvmmu{kind and ', '}{kind}")
            some = max(lines, key=len)
            axes.plot([row.x for row in some], [row.theirs for row in some], "s--", label=some[0].against)
            axes.set(ylabel="ns per translation", xscale="log", yscale="log")
            if label == LEAF_TABLES:
                axes.set_xticks([row.x for row in some], [row.case.split(", ")[-1].split(" of ")[0] for row in some], fontsize=7)
                axes.minorticks_off()
            axes.legend(frameon=False)
        figure.savefig(folder / name, metadata={"Date": None})
        plt.close(figure)
        plots[group] = name
    return plots


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="what pytest --benchmark-json wrote")
    parser.add_argument("docs", nargs="?", type=Path, help="the directory of performance.md")
    args = parser.parse_args()
    rows, run = read(args.run)
    print_table(rows, run)
    plots = draw(rows, args.docs or Path(args.run).parent)
    if args.docs is None:
        print(f"plots: {', '.join(plots.values()) or 'none'} in {Path(args.run).parent}")
        return
    page = args.docs / "performance.md"
    text = page.read_text()
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        sys.exit(f"{page} lacks the marks {BEGIN} and {END}")
    page.write_text(before + markdown(rows, run, plots) + after)
    print(f"results: {page}")


if __name__ == "__main__":
    main()
