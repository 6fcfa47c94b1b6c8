"""evaluation/report.py: a page that is whole, safe and pleasant in a real browser, whatever is in a run's folder."""

import csv
import io
import json
import math
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from PIL import Image

from fastrcnn.data.rendered_cells import render_cells
from fastrcnn.evaluation import plots
from fastrcnn.evaluation.report import tag, training_report

pytestmark = pytest.mark.charts
HOSTILE = "<img src=x onerror=alert(1)>\"'&$\\frac{ \udcff\u202e</title></style><script>alert(2)</script>"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EPOCHS, STEPS = 3, 240
PNG = b"\x89PNG"  # in the place of a chart, which takes a second


@pytest.fixture
def run(tmp_path):
    """A training's folder as the trainer leaves it, with hostile names where names come from outside."""
    run = tmp_path / "a <b> & c"
    (run / "samples").mkdir(parents=True)
    (run / "config.json").write_text(
        json.dumps(dict(model="r50_fpn", classes=[HOSTILE], recipe=dict(lr=0.02), ema=None))
    )
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(("epoch", "loss", "val_loss", "AP", "AP50", "AP75", "lr"))
    for n in range(1, EPOCHS + 1):
        writer.writerow((n, 1 / n, "", 20.25 * n if n != 2 else 60.75, 90.5, "nan", 0.01))
    (run / "results.csv").write_text(table.getvalue())
    rows = [
        dict(step=i, loss=9 / i if i else math.inf, loss_cls=4 / (i + 1), lr=0.01, memory=300) | {"images/s": 12.5}
        for i in range(STEPS)
    ]
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 240, "lo')  # killed
    (run / "metrics.json").write_text(
        json.dumps(dict(best=dict(epoch=2, AP=60.75, APs=None), last=dict(epoch=3, AP=60.75)))
    )
    for i in range(2):
        Image.fromarray(render_cells(i, 96, 128)[0]).save(run / "samples" / f"{i}.jpg")
    (run / "samples" / "x<script>alert(3)<.jpg").write_bytes((run / "samples" / "0.jpg").read_bytes())
    (run / "samples" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    return run


class Page(HTMLParser):
    """Tags, what they refer to, and the text of a page."""

    def __init__(self, markup: str):
        super().__init__()
        self.tags, self.sources, self.said = [], [], []
        self.feed(markup)

    def handle_starttag(self, name, attributes):
        self.tags.append(name)
        self.sources += [value for key, value in attributes if key in ("src", "href", "srcset", "data", "action")]
        assert not [key for key, _ in attributes if key.startswith("on")]

    def handle_data(self, data):
        self.said.append(data)


def test_a_page_has_what_the_folder_has_and_nothing_else(run):
    path = training_report(run)
    page = Page(path.read_text("utf-8"))
    text = " ".join(page.said)
    assert page.tags.count("img") == 4  # the curves and three samples that can be read
    assert page.sources and all(source.startswith("data:") for source in page.sources)
    assert "script" not in page.tags and "a <b> & c" in text and "x<script>alert(3)<.jpg" in text
    assert plots.drawable(json.dumps([HOSTILE], ensure_ascii=False)) in text and "\u202e" not in text
    for value in ("60.8", "90.5", "300", "12.5", "best epoch", "0.3333", "recipe"):  # percent with one digit
        assert value in text, value
    assert "60.75" not in text
    assert Image.open(run / "curves.png").size[0] > 1000
    assert sorted(p.name for p in run.iterdir()) == ["config.json", "curves.png", "log.jsonl", "metrics.json",
                                                     "report.html", "results.csv", "samples"]  # fmt: skip


def test_of_equal_epochs_the_first_is_the_best_as_its_weights_are_kept(run):
    (run / "results.csv").write_text("epoch,AP\n1,20\n2,61.5\n3,61.5\n")
    said = Page(training_report(run).read_text("utf-8")).said
    assert said[said.index("best epoch") - 1] == "2"


@pytest.mark.parametrize("name", ["config.json", "results.csv", "log.jsonl", "metrics.json", "samples", "all"])
@pytest.mark.parametrize("damage", ["missing", "empty", "not text", "another shape", "a folder"])
def test_what_is_missing_or_damaged_is_left_out(run, monkeypatch, name, damage):
    monkeypatch.setattr("fastrcnn.evaluation.plots.training_curves", lambda *columns: PNG if any(columns) else None)
    for path in [p for p in run.iterdir() if name in (p.name, "all")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        if damage == "a folder":
            path.mkdir()
        elif damage != "missing":
            path.write_bytes(
                {"empty": b"", "not text": b"\xff\x00\xfe,\x00\nx", "another shape": b'[1, {"a": [2]}]\n"'}[damage]
            )
    page = Page(training_report(run).read_text("utf-8"))
    assert page.tags.count("img") == dict(samples=1, all=0).get(name, 4)
    assert page.tags.count("section") == {"all": 0, "log.jsonl": 6}.get(name, 5)


def test_without_matplotlib_there_is_a_page_that_says_so(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = Page(training_report(run).read_text("utf-8"))
    assert page.tags.count("img") == 3 and "fastrcnn[plots]" in " ".join(page.said)
    assert not (run / "curves.png").exists()


def test_a_page_that_cannot_be_written_is_an_error_and_the_old_one_stays(run):
    before = training_report(run).read_text()
    (run / "curves.png").unlink()
    (run / "curves.png").mkdir()
    with pytest.raises(OSError, match=r"curves\.png: cannot be written"):
        training_report(run)
    assert (run / "report.html").read_text() == before


def test_text_is_escaped_and_markup_is_not():
    assert tag("p", "<b>", tag("b", "&"), None, 0.12345, [1, "<"], class_='"') == (
        '<p class="&quot;">&lt;b&gt;<b>&amp;</b>-0.1235[1, &quot;&lt;&quot;]</p>'
    )
    assert tag("td", math.nan) == "<td>-</td>"


def browse(page, tmp_path) -> tuple[str, list[str]]:
    """The document as Chromium made it, and what it wrote on its console."""
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--virtual-time-budget=5000",
    ]
    command = [CHROMIUM, *options, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode(), [line for line in done.stderr.decode().splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_opens_it_without_an_error_and_shows_every_picture(run, tmp_path):
    path = training_report(run)
    document, console = browse(path, tmp_path)
    assert not console and "Every setting" in document
    # The same page with a script in it: the page's own policy forbids it, which the console says.
    script = "<script>document.title = [...document.images].map(i => i.naturalWidth)</script></body>"
    probe = path.with_name("probe.html")
    probe.write_text(path.read_text("utf-8").replace("</body>", script), "utf-8")
    assert any("Content Security Policy" in line for line in browse(probe, tmp_path)[1])
    probe.write_text(probe.read_text("utf-8").replace("Content-Security-Policy", "none"), "utf-8")
    document, console = browse(probe, tmp_path)
    widths = document.split("<title>")[1].split("</title>")[0].split(",")
    assert not console and len(widths) == 4 and all(int(width) >= 128 for width in widths)
