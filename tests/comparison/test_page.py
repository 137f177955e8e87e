# SPDX-License-Identifier: Apache-2.0
"""The HTML page of a comparison: complete in itself, its numbers those of the comparison, and drawn by a browser."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

import kvmmu
from kvmmu import Design
from kvmmu.cli import main
from kvmmu.comparison.design import HOSTS, PAGE_POLICIES
from kvmmu.report.comparison_data import alike, drawn, groups_of, kind_of
from kvmmu.report.comparison_page import comparison_page
from kvmmu.report.comparison_terms import terms_html
from kvmmu.report.svg_charts import line_chart, ticks
from kvmmu.traces import Header, Trace, bundled

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
NEEDS_BROWSER = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed (Debian: apt install chromium)")
VOID = {"meta", "br"}


@pytest.fixture(scope="module")
def found():
    return kvmmu.compare(bundled("lackey"), [Design(host=host, page=page, tlb=tlb) for page in ("4k", "2m") for tlb in (
        "skylake", "zen3") for host in ("ept", "shadow")], cost="estimate")


class Reader(HTMLParser):
    """Cells of tables, links, and whether tags are balanced."""

    def __init__(self):
        super().__init__()
        self.open, self.cells, self.links, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)


def test_page(found, tmp_path):
    """One file without links, with the numbers of the comparison, as text and as JSON."""
    page = found.to_html(tmp_path / "out.html")
    assert (tmp_path / "out.html").read_text(encoding="utf-8") == page
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    assert reader.links == []
    assert not re.search(r"https?://|@import|url\(", page)
    for result in found.results:
        at = reader.cells.index(result.design.name)
        row = reader.cells[at:at + 9]
        assert (row[2], row[4], row[5], row[7]) == tuple(
            f"{count:,}" for count in (result.walks, result.guest_refs, result.host_refs, result.host.total))
    text = re.search(r'<script type="application/json" id="comparison">(.*?)</script>', page, re.DOTALL)[1]
    assert json.loads(text) == json.loads(json.dumps(found.to_dict()))
    for title in ("Cycles per access", "References of page walks", "Misses over TLB size", "References per walk",
                  "Exits over time", "Faults over time", "Address space, 4k pages", "Address space, 2m pages"):
        assert title in reader.text
    assert found._repr_html_().count("<tr>") == len(found.results) + 1


def test_terms(found):
    """The page says what its words mean: each column, and the hosts, page policies and TLBs that are in it."""
    reader = Reader()
    reader.feed(found.to_html())
    terms = set(reader.text[reader.text.index("Terms"):])
    assert {"design", "later TLB hits", "page walks", "guest refs", "host refs", "refs per walk", "exits",
            "cycles per access"} <= terms
    assert {"host ept", "host shadow", "pages 4k", "pages 2m", "TLB skylake", "TLB zen3"} <= terms
    assert not {"host native", "pages thp", "TLB zen4"} & terms
    assert any("STLB 128x12" in text for text in terms)
    unpriced = kvmmu.compare(bundled("lackey"), [Design(host=host, page=page) for host in HOSTS for page in ("4k", "thp")
                                                 if not host.startswith("nested")])
    reader = Reader()
    reader.feed(unpriced.to_html())
    assert "cycles per access" not in reader.text
    assert "host native" in reader.text
    assert "pages thp" in reader.text


def test_every_host_and_page_policy_has_a_meaning():
    data = {"designs": [{"host": host, "page": page} for host in HOSTS for page in PAGE_POLICIES], "tlbs": {}}
    text = terms_html(data)
    assert all(f"<dt>host {host}</dt>" in text for host in HOSTS)
    assert all(f"<dt>pages {page}</dt>" in text for page in PAGE_POLICIES)


def test_who_made_a_page(found, tmp_path, capsys):
    """Version and date; the command line where there was one, as text."""
    made = rf"<p>Made by kvmmu {re.escape(kvmmu.__version__)}, \d{{4}}-\d\d-\d\d \d\d:\d\d UTC"
    assert re.search(made + r"\.</p>", found.to_html())
    page = tmp_path / "a <b>.html"
    assert main(["compare", "bundled-lackey", "--html", str(page)]) == 0
    capsys.readouterr()
    shown = re.escape(f": kvmmu compare bundled-lackey --html &#x27;{tmp_path}/a &lt;b&gt;.html&#x27;</p>")
    assert re.search(made + shown, page.read_text(encoding="utf-8"))


def test_no_design_is_hidden():
    """Legends name all designs whose lines are one, and the lines beyond those that have a colour."""
    rows = 4096 * np.arange(40, dtype=np.uint64)
    trace = Trace(Header(registers=(), name="x"), [{
        "op": np.zeros(40, np.uint8), "addr": rows, "access": np.zeros(40, np.uint8)}])
    same = kvmmu.compare(trace, [Design(f"design {i}") for i in range(6)])
    assert ", ".join(f"design {i}" for i in range(6)) in same.to_html()
    data = same.data()
    for i, design in enumerate(data["designs"] * 2):
        data["designs"] = [*data["designs"][:i], design | {"name": f"line {i}", "walks_by_refs": [0, 1, i + 1]}]
    assert len(data["designs"]) == 12
    page = comparison_page(data | {"made_by": ""})
    assert "Not drawn are 4 more lines: line 8; line 9; line 10; line 11." in page
    assert drawn([(str(i), []) for i in range(9)]) == ([(str(i), []) for i in range(8)], ["8"])


def test_names_are_text():
    """What a trace or a design is called is text, no markup, even in the JSON."""
    name = "</script><b>&\""
    trace = Trace(Header(registers=(), name=name), [{
        "op": np.zeros(1, np.uint8), "addr": np.zeros(1, np.uint64), "access": np.zeros(1, np.uint8)}])
    page = kvmmu.compare(trace, [Design(name)]).to_html()
    assert "<b>" not in page
    assert page.count("</script>") == 1
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    assert name in reader.cells


def test_axes():
    """Axes begin at 0, and their last mark is beyond all values."""
    for top in (0.003, 0.7, 1, 3, 9.99, 10, 1234, 5e9):
        marks = ticks(top)
        assert marks[0] == 0
        assert marks[-1] >= top * 0.999999
        assert 3 <= len(marks) <= 8
        assert np.allclose(np.diff(marks), marks[1])
    chart = line_chart("a title", "x of it", "y of it", [("one", [[0, 0], [5, 10], [10, 20]])])
    for part in ("<title>a title</title>", "x of it", "y of it", ">20<", ">10<", ">0<"):
        assert part in chart
    points = re.search(r'd="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"', chart).groups()
    x0, y0, x1, y1, x2, y2 = map(float, points)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert y0 > y2


def test_series():
    assert alike([("a", [[0, 1]]), ("b", [[0, 2]]), ("c", [[0, 1]])]) == [("a, c", [[0, 1]]), ("b", [[0, 2]])]
    assert [kind_of(kinds) for kinds in (1, 2, 3, 4, 5, 6, 7)] == [0, 1, 1, 2, 2, 3, 3]
    groups, left_out = groups_of([[0, 4096, 1, 1], [8192, 4096, 1, 1], [1 << 40, 4096, 1, 1]])
    assert ([len(group) for group in groups], left_out) == ([2, 1], 0)
    assert groups_of([[i << 40, 4096 * (i + 1), 1, 1] for i in range(30)])[1] == 6


# ---- in a browser ------------------------------------------------------------------------------------------------------

def run_browser(tmp_path, page, *options):
    return subprocess.run([BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
                           f"--user-data-dir={tmp_path / 'profile'}", *options, page.as_uri()],
                          check=True, capture_output=True, timeout=120).stdout


def pixels(path):
    """A PNG as an array (height, width, 3) of 0 to 255."""
    image = pytest.importorskip("matplotlib.image", reason="matplotlib is not installed (extra plot)")
    return (255 * image.imread(path)[:, :, :3] + 0.5).astype(np.uint8)


@NEEDS_BROWSER
def test_in_a_browser(found, tmp_path):
    """The numbers that a browser shows are those of the comparison; light, dark and phone width are drawn."""
    page = tmp_path / "out.html"
    found.to_html(page)
    shown = run_browser(tmp_path, page, "--dump-dom").decode()
    reader = Reader()
    reader.feed(shown)
    for result in found.results:
        at = reader.cells.index(result.design.name)
        assert reader.cells[at + 2] == f"{result.walks:,}"
    pictures = {}
    for name, options in (("light", ("--blink-settings=preferredColorScheme=1", "--window-size=1200,700")),
                          ("dark", ("--blink-settings=preferredColorScheme=0", "--window-size=1200,700")),
                          ("phone", ("--blink-settings=preferredColorScheme=1", "--window-size=500,900"))):
        run_browser(tmp_path, page, f"--screenshot={tmp_path / name}.png", *options)
        pictures[name] = pixels(tmp_path / f"{name}.png")
    paper = {name: picture[2, 2].tolist() for name, picture in pictures.items()}
    assert paper["light"] == paper["phone"] == [255, 255, 255]
    assert max(paper["dark"]) < 64
    for picture in pictures.values():
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20          # there is text, and more
