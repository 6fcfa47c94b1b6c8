"""evaluation/results.py, plots.py and contact_sheet.py: what an evaluation leaves, whatever the classes are called."""

import io
import json
import math
import sys

import numpy as np
import pytest
import torch
from coco_judge import Fixed, crowded, judge, write
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from test_report import CHROMIUM, HOSTILE, Page, browse

from fastrcnn.data import CocoDataset
from fastrcnn.evaluation import contact_sheet, measure, plots, predict, results, write_evaluation
from fastrcnn.evaluation.diagnosis import Looked
from fastrcnn.evaluation.report import CHARTS, training_report

pytestmark = pytest.mark.charts
IDS = [0, 3, 7, 12]


def evaluated(folder, seed=6, found_on=lambda rows: rows):
    """A dataset with hostile class names, and what was found on it."""
    content, rows = crowded(seed)
    for category in content["categories"]:
        category["name"] = f"{category['id']}{HOSTILE}" if category["id"] else "x" * 300
    dataset = CocoDataset(write(folder, json.loads(json.dumps(content))))
    rows = found_on(rows)
    return dataset, content, rows, predict(Fixed(rows, dataset.class_names), dataset)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(what `write_evaluation` gave, its folder, and `evaluated`)."""
    case = evaluated(tmp_path_factory.mktemp("data"))
    out = tmp_path_factory.mktemp("new") / "a" / "out"
    about = dict(weights="w<i>.pth", data="d&.json")
    return write_evaluation(out, case[0], case[3], about=about), out, *case


def test_the_folder_holds_what_was_found_and_measured(done):
    scores, out, dataset, content, rows, found = done
    assert {p.name for p in out.iterdir()} == {"predictions.json", "metrics.json", "report.html", *CHARTS}
    assert scores == measure(dataset, found)
    theirs = judge(content, rows, IDS)
    assert list(scores.values()) == pytest.approx([100 * v for v in theirs.stats], abs=1e-9)
    metrics = json.loads((out / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert {k: metrics[k] for k in scores} == scores and metrics["pictures"] == 12
    assert metrics["objects"] == sum(not a["iscrowd"] for a in content["annotations"])
    assert metrics["detections"] == len(found) == sum(map(len, rows))
    assert [row["name"] for row in metrics["classes"]] == dataset.class_names
    assert sum(row["objects"] for row in metrics["classes"]) == metrics["objects"]
    precision = theirs.eval["precision"]
    for k, row in enumerate(metrics["classes"][:3]):
        assert row["AP"] == pytest.approx(100 * precision[:, :, k, 0, -1].mean(), abs=1e-9)
    assert metrics["classes"][3]["AP"] is metrics["classes"][3]["VOC"] is None  # it has no object
    assert metrics["VOC"] == pytest.approx(np.mean([row["VOC"] for row in metrics["classes"][:3]]))
    matrix = np.array(metrics["confusion"]["matrix"])
    assert matrix.shape == (5, 5) and matrix[:4].sum() == metrics["objects"]


def test_pycocotools_comes_to_the_same_numbers_from_the_file(done, capsys):
    scores, out, dataset, *_ = done
    truth = COCO(str(dataset.path))
    evaluation = COCOeval(truth, truth.loadRes(str(out / "predictions.json")), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    capsys.readouterr()
    assert list(scores.values()) == pytest.approx([100 * v for v in evaluation.stats], abs=1e-9)


def test_the_page_shows_numbers_classes_and_pictures(done):
    scores, out = done[:2]
    page = Page((out / "report.html").read_text("utf-8"))
    text = " ".join(page.said)
    assert page.tags.count("img") == len(CHARTS) and "script" not in page.tags
    assert all(source.startswith("data:") for source in page.sources)
    for shown in (f"{scores['AP']:.1f}", "w<i>.pth", "d&.json", "x" * 300, plots.drawable(HOSTILE)):
        assert shown in text, shown
    for name in CHARTS:
        with Image.open(out / name) as image:
            image.load()
            assert 300 < image.width < 2000 and 200 < image.height < 4000, name
    # A training's page shows the evaluation that lies in its folder.
    (out.parent / "evaluation").symlink_to(out)
    page = Page(training_report(out.parent).read_text("utf-8"))
    assert page.tags.count("img") == len(CHARTS) and "x" * 300 in " ".join(page.said)


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_opens_the_page_without_an_error(done, tmp_path):
    document, console = browse(done[1] / "report.html", tmp_path)
    assert not console and "Where it fails" in document


def test_nothing_found_and_a_folder_that_was_used_before(tmp_path, monkeypatch):
    dataset, *_, found = evaluated(tmp_path, found_on=lambda rows: [[] for _ in rows])
    out = tmp_path / "out"
    out.mkdir()
    for name in CHARTS:
        (out / name).write_bytes(b"of another evaluation")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    dataset.picture(0).unlink()  # after it was looked at: the others are still shown
    scores = write_evaluation(out, dataset, found)
    assert scores["AP"] == 0 and json.loads((out / "predictions.json").read_text()) == []
    assert {p.name for p in out.iterdir()} == {"predictions.json", "metrics.json", "report.html", "worst.jpg"}
    assert "fastrcnn[plots]" in (out / "report.html").read_text()


def test_pairs_have_their_own_numbers_for_names(tmp_path):
    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    pairs = [(image, dict(boxes=torch.tensor([[5.0, 5, 25, 25]]), labels=torch.tensor([i]))) for i in (0, 1)]
    found = predict(Fixed([[[5, 5, 20, 20, 0.9, 0]], [[5, 5, 20, 20, 0.9, 0]]], ["one", "two"]), pairs)
    assert write_evaluation(tmp_path, pairs, found)["AP"] == pytest.approx(50)  # one class right, one not found
    rows = json.loads((tmp_path / "predictions.json").read_text())
    assert [(r["image_id"], r["category_id"], r["bbox"]) for r in rows] == [
        (0, 0, [5, 5, 20, 20]),
        (1, 0, [5, 5, 20, 20]),
    ]
    text = " ".join(Page((tmp_path / "report.html").read_text()).said)
    assert "picture 1" in text and "two" in text


def test_many_detections_are_written_in_pieces(tmp_path, monkeypatch, done):
    monkeypatch.setattr(results, "ROWS", 7)
    results.write_predictions(tmp_path / "p.json", done[2], done[5])
    assert json.loads((tmp_path / "p.json").read_text()) == json.loads((done[1] / "predictions.json").read_text())


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def test_charts_of_many_classes_and_of_none():
    matrix = np.diag(np.arange(82))
    matrix[3, 70] = matrix[80, 7] = 9  # two confusions among eighty classes
    few, many = (
        plots.confusion(np.zeros((2, 2), int), ["$\\frac{$"]),
        plots.confusion(matrix, [f"class {i}" for i in range(81)]),
    )
    assert pixels(few).shape[1] < 700 < pixels(many).shape[1] < 1500
    curves = {f"class {i}": np.linspace(1, i / 80, 101) for i in range(80)} | {"absent": np.full(101, math.nan)}
    for chart in (plots.precision_recall({}, {}), plots.precision_recall({"IoU": curves["class 3"]}, curves)):
        assert pixels(chart).std() > 0


def test_a_name_is_short_and_on_one_line():
    assert plots.short("a\nb\x1b[31m\u202e") == "a b [31m" and plots.short("\x00") == "?"
    assert (
        plots.short("class with a long name 17") == "class with…ong name 17"
        and len(plots.short("x" * 99)) <= plots.LETTERS
    )


def test_a_sheet_marks_right_wrong_and_missed():
    image = torch.full((3, 100, 200), 128, dtype=torch.uint8)
    boxes = np.array([[10.0, 40, 50, 80], [80, 40, 120, 80]])
    looked = Looked(0, boxes, np.array([0.9, 0.8]), np.array([0, 1]), np.array([True, False]),
                    np.array([[150.0, 40, 190, 80]]), np.array([0]))  # fmt: skip
    sheet = pixels(contact_sheet.contact_sheet([(image, looked, HOSTILE)] * 4, ["a", HOSTILE]))
    near = lambda colour: np.abs(sheet.astype(int) - colour).max(2) < 60  # noqa: E731
    scale = contact_sheet.CELL / 200
    for colour, x in ((contact_sheet.RIGHT, 10), (contact_sheet.WRONG, 80), (contact_sheet.MISSED, 150)):
        at = 8 + contact_sheet.LINE + round(60 * scale), 8 + round(x * scale)
        assert near(colour)[at[0] - 3 : at[0] + 4, at[1] - 3 : at[1] + 4].any(), colour
    assert sheet.shape[1] == 3 * (contact_sheet.CELL + 8) + 8
