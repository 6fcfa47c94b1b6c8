"""assets/serve.html in a real browser: drop a picture, move the threshold, click classes, see the right boxes."""

import io
import json

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("websockets")

from browser import CHROMIUM, Browser
from conftest import tiny_model
from PIL import Image
from serving import encoded, running

from fastrcnn import Detector

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
NAMES = ["<img src=x onerror=alert(1)>", "white", "a long name " * 20]
BOXES = """[...document.querySelectorAll('#boxes .box')].map(b => {
  const r = b.getBoundingClientRect(), f = document.getElementById('picture').getBoundingClientRect();
  return {text: b.textContent, at: [r.left - f.left, r.top - f.top, r.right - f.left, r.bottom - f.top].map(
    (v, i) => v / [f.width, f.height][i % 2])}})"""


@pytest.fixture(scope="module")
def client():
    model = tiny_model()
    model.class_names = NAMES
    with running(Detector(model, device="cpu", score_threshold=0.05), max_pixels=300_000) as client:
        yield client


@pytest.fixture(scope="module")
def browser(client, tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def page(browser, client):
    browser.do("Page.navigate", url=str(client.base_url))
    browser.wait("document.readyState === 'complete' && document.getElementById('shell').textContent")
    browser.events.clear()
    return browser


@pytest.fixture
def dropped(page, client, tmp_path):
    """A page that a picture was dropped on, and what the server finds in it."""
    data = encoded(3, height=300, width=450)
    (tmp_path / "cells.png").write_bytes(data)
    page.drop("#drop", tmp_path / "cells.png")
    page.wait("document.querySelectorAll('#boxes .box').length")
    return page, client.post("/detect", content=data).json()["detections"]


def shown(page) -> list[str]:
    """What stands at the boxes, best first."""
    return [box["text"] for box in page.js(BOXES)[::-1]]


def titles(found: list[dict]) -> list[str]:
    return [f"{o['name']} {o['score']:.2f}" for o in found]


def test_boxes_stand_where_the_server_says(dropped):
    page, found = dropped
    sure = [o for o in found if o["score"] >= 0.5]
    assert 3 < len(sure) < len(found) and shown(page) == titles(sure)
    for box, o in zip(page.js(BOXES)[::-1], sure):
        where = [v / side for v, side in zip(o["box"], (450, 300, 450, 300))]
        assert all(abs(a - b) < 0.004 for a, b in zip(box["at"], where))  # a pixel of the screen
    assert page.js("document.getElementById('message').textContent") == f"{len(sure)} of {len(found)} objects shown."
    cells = page.js("[...document.querySelectorAll('#rows tr')].map(r => [...r.cells].map(c => c.textContent))")
    assert [(row[0], row[1]) for row in cells] == [(o["name"], f"{o['score']:.3f}") for o in sure]
    assert not page.complaints() and all(url.startswith(("http://127.0.0.1", "blob:")) for url in page.fetched())


def test_the_threshold_moves_with_keys_and_mouse(dropped):
    page, found = dropped
    page.click("#score")
    page.press("Home")
    assert shown(page) == titles(found)
    for steps in (20, 30):
        page.press("ArrowRight", steps)
        least = float(page.js("document.getElementById('value').textContent"))
        assert shown(page) == titles([o for o in found if o["score"] >= least])
    assert least == 0.5
    page.press("End")
    assert shown(page) == [] and page.js("document.getElementById('message').textContent").startswith("0 of")


def test_classes_are_clicked_away_and_back(dropped):
    page, found = dropped
    sure = [o for o in found if o["score"] >= 0.5]
    labels = sorted({o["label"] for o in found})
    assert len(labels) == 3
    counts = page.js("[...document.querySelectorAll('#classes button')].map(b => b.textContent)")
    assert counts == [f"{NAMES[k]} {sum(o['label'] == k for o in sure)}" for k in labels]
    page.click("#classes button:nth-child(1)")
    page.click("#classes button:nth-child(2)")
    assert shown(page) == titles([o for o in sure if o["label"] == labels[2]])
    pressed = "[...document.querySelectorAll('#classes button')].map(b => b.getAttribute('aria-pressed'))"
    assert page.js(pressed) == ["false", "false", "true"]
    page.click("#classes button:nth-child(1)")
    assert shown(page) == titles([o for o in sure if o["label"] != labels[1]])


def test_a_file_can_be_chosen_and_the_next_picture_replaces_the_last(dropped, client, tmp_path):
    page, _ = dropped
    data = encoded(8, "JPEG", height=200, width=300)
    (tmp_path / "other.jpg").write_bytes(data)
    node = page.do("DOM.querySelector", nodeId=page.do("DOM.getDocument")["root"]["nodeId"], selector="#file")["nodeId"]
    page.do("DOM.setFileInputFiles", nodeId=node, files=[str(tmp_path / "other.jpg")])
    page.wait("document.getElementById('picture').naturalWidth === 300")
    found = client.post("/detect", content=data).json()["detections"]
    assert shown(page) == titles([o for o in found if o["score"] >= 0.5])


def test_what_the_server_refuses_is_said_and_what_the_browser_cannot_show_is_listed(page, tmp_path):
    (tmp_path / "notes.png").write_text("hello")
    page.drop("#drop", tmp_path / "notes.png")
    page.wait("document.getElementById('message').className === 'bad'")
    assert "not an image" in page.js("document.getElementById('message').textContent")
    assert page.js("document.getElementById('results').hidden")
    file = io.BytesIO()
    Image.open(io.BytesIO(encoded(3))).save(file, "TIFF")
    (tmp_path / "cells.tif").write_bytes(file.getvalue())
    page.drop("#drop", tmp_path / "cells.tif")
    page.wait("!document.getElementById('unshown').hidden && document.querySelectorAll('#rows tr').length")
    assert page.js("document.getElementById('stage').hidden")


def test_a_reader_of_screens_and_a_keyboard_find_everything(dropped):
    page, _ = dropped
    page.js("document.querySelector('details').open = true")
    nodes = page.do("Accessibility.getFullAXTree")["nodes"]
    named = {(n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes if not n["ignored"]}
    roles = {role for role, _ in named}
    assert {"main", "heading", "slider", "status", "table", "columnheader", "group"} <= roles
    assert ("slider", "Score at least 0.50") in named or any(r == "slider" and "Score at least" in n for r, n in named)
    assert any(role == "button" and name.startswith("white ") for role, name in named)
    assert ("image", "cells.png") in named
    assert all(name for role, name in named if role in ("button", "slider", "image", "link", "heading"))
    seen = []
    page.js("document.activeElement.blur()")
    for _ in range(8):
        page.press("Tab")
        seen.append(page.js("document.activeElement.id || document.activeElement.tagName"))
    assert seen == ["file", "score", "BUTTON", "BUTTON", "BUTTON", "SUMMARY", "TR", "TR"]
    assert page.js("document.querySelectorAll('.dim .chosen').length") == 1  # the row in focus shows its box


@pytest.mark.parametrize("width, height, scheme", [(1000, 800, "light"), (360, 740, "dark")])
def test_nothing_leaves_the_window_and_text_stands_out(dropped, width, height, scheme):
    page, _ = dropped
    page.do("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
    page.do("Emulation.setEmulatedMedia", features=[dict(name="prefers-color-scheme", value=scheme)])
    try:
        assert page.js("document.documentElement.scrollWidth") <= width
        page.wait(NAMES_INSIDE)
        ratios = json.loads(page.js(CONTRAST))
        assert len(ratios) > 15 and min(ratios.values()) >= 4.5, ratios
    finally:
        page.do("Emulation.setDeviceMetricsOverride", width=1000, height=800, deviceScaleFactor=1, mobile=False)
        page.do("Emulation.setEmulatedMedia", features=[])


NAMES_INSIDE = """[...document.querySelectorAll('.box span')].every(s => {
  const r = s.getBoundingClientRect(), f = document.getElementById('picture').getBoundingClientRect();
  return r.left > f.left - 3 && r.top > f.top - 3 && r.right < f.right + 3})"""
# WCAG's contrast of every text with what lies behind it.
CONTRAST = """(() => {
  const parse = s => s.match(/[\\d.]+/g).map(Number);
  const light = c => c.slice(0, 3).map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = e => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] > 0) return c; } return [255, 255, 255]; };
  const out = {};
  for (const e of document.querySelectorAll('main *'))
    if (e.checkVisibility() && [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())) {
      const [a, b] = [light(parse(getComputedStyle(e).color)), light(behind(e))].sort((x, y) => y - x);
      out[e.tagName + ' ' + e.textContent.slice(0, 30)] = (a + 0.05) / (b + 0.05);
    }
  return JSON.stringify(out); })()"""
