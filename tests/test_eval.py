"""cli/eval.py: numbers as JSON and as a folder, and what is wrong in one line before the work begins."""

import json
import math
import re
import sys

import pytest
from conftest import picture, tiny_model
from PIL import Image
from typer.testing import CliRunner

from fastrcnn import Detector
from fastrcnn.cli import app
from fastrcnn.data import open_dataset
from fastrcnn.evaluation import evaluate
from fastrcnn.weights import save

CLASSES = ["red", "<b>", "platelet"]


def run(*arguments, status=0):
    """What the command wrote to standard output, and to standard error."""
    result = CliRunner().invoke(app, ["eval", *map(str, arguments), "--device", "cpu"])
    assert result.exit_code == status, result.output + repr(result.exception)
    assert "Traceback" not in result.output
    return result.stdout, result.stderr


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    model = tiny_model()
    model.class_names = CLASSES
    return save(model, tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture
def folder(tmp_path, weights):
    """A folder whose training set is empty and whose validation set is what the model finds, every second box of it."""
    detector, annotations = Detector(str(weights), device="cpu"), []
    for split in ("train", "valid"):
        (tmp_path / split).mkdir()
        for n in (1, 2):
            Image.fromarray(picture(seed=n).permute(1, 2, 0).numpy()).save(tmp_path / split / f"{n}.png")
    for n in (1, 2):
        annotations += detector(tmp_path / "valid" / f"{n}.png")[0].to_coco(n)[::2]
    images = [dict(id=n, file_name=f"{n}.png", width=96, height=64) for n in (1, 2)]
    content = dict(images=images, categories=[dict(id=i + 1, name=name) for i, name in enumerate(CLASSES)])
    rows = [dict(a, id=k, area=a["bbox"][2] * a["bbox"][3], iscrowd=0) for k, a in enumerate(annotations)]
    for split, part in (("train", []), ("valid", rows)):
        (tmp_path / split / "_annotations.coco.json").write_text(json.dumps(content | dict(annotations=part)))
    return tmp_path


def test_json_is_percent_and_nothing_else_is_printed(folder, weights):
    printed, _ = run(folder, "--weights", weights, "--json")  # of a folder with splits the validation set
    scores = json.loads(printed, parse_constant=pytest.fail)
    expected = evaluate(Detector(str(weights), device="cpu"), open_dataset(folder / "valid"))
    assert list(scores) == list(expected) and len(printed.splitlines()) == 1
    for name, value in scores.items():
        assert value is None if math.isnan(expected[name]) else value == pytest.approx(expected[name], abs=1e-9), name
    assert 1 < scores["AP"] < 100
    lines = [line.split() for line in run(folder, "--weights", weights, "--batch", 2)[0].splitlines()]
    assert lines == [[name, f"{value:.1f}"] for name, value in expected.items()]
    fewer = json.loads(run(folder, "--weights", weights, "--json", "--max-dets", "3,1")[0])
    assert "AR3" in fewer and "AR100" not in fewer and fewer["AP"] < scores["AP"]


@pytest.mark.charts
def test_a_folder_holds_the_report(folder, weights):
    out = folder / "new" / "out"
    printed, _ = run(folder, "--weights", weights, "--out", out, "--json")
    metrics = json.loads((out / "metrics.json").read_text())
    scores = json.loads(printed)
    assert {k: metrics[k] for k in scores} == scores
    assert metrics["data"] == f"{folder} (val)" and metrics["weights"] == str(weights)
    for name in ("report.html", "predictions.json", "confusion.png", "worst.jpg"):
        assert (out / name).stat().st_size > 1000, name
    page = (out / "report.html").read_text()
    assert "&lt;b&gt;" in page and "<b></" not in page


def test_the_recall_of_a_proposal_network_has_its_page(folder):
    network = save(tiny_model("rpn_r50_fpn"), folder / "rpn.safetensors")
    (folder / "out").mkdir()
    (folder / "out" / "errors.png").write_bytes((folder / "valid" / "1.png").read_bytes())  # of another evaluation
    printed, _ = run(folder / "valid", "--weights", network, "--out", folder / "out", "--json", "--max-dets", "5,50")
    scores = json.loads(printed)
    assert list(scores) == ["AR@5", "AR@50", "ARs@50", "ARm@50", "ARl@50"]
    page = (folder / "out" / "report.html").read_text()
    assert f"{scores['AR@50']:.1f}" in page and "<img" not in page


@pytest.mark.parametrize("options, spoil, message", [
    (("--out", "valid/1.png"), None, "1.png"),
    (("--max-dets", "1,many"), None, "--max-dets: .*1,many"),
    (("--max-dets", "0"), None, "max_dets: "),
    (("--split", "test"), lambda f: (f / "valid").rename(f / "other"), "no test split"),
    (("--split", "train"), None, "no object is annotated"),
    (("--weights", "nowhere.pth"), None, "nowhere.pth"),
    ((), lambda f: (f / "valid" / "2.png").unlink(), "2.png"),
    ((), lambda f: (f / "valid" / "2.png").write_bytes(b"no picture"), "2.png"),
    ((), lambda f: rename_class(f), "blue are none of the model's 3 classes"),
])  # fmt: skip
def test_what_is_wrong_is_one_line_before_the_first_picture(folder, weights, monkeypatch, options, spoil, message):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(Detector, "_results", lambda *a: pytest.fail("it has begun"))
    if spoil:
        spoil(folder)
    printed, said = run(folder, "--weights", weights, "--json", *options, status=1)
    assert not printed and len(said.strip().splitlines()) == 1
    assert re.search(message, said), said


def test_a_batch_of_nothing_is_a_wrong_use(folder, weights):
    assert "--batch" in run(folder, "--weights", weights, "--batch", 0, status=2)[1]


def rename_class(folder):
    path = folder / "valid" / "_annotations.coco.json"
    path.write_text(path.read_text().replace('"red"', '"blue"'))


def test_hotcoco_is_asked_for_first(folder, weights, monkeypatch):
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    assert "fastrcnn[eval]" in run(folder, "--weights", weights, status=1)[1]
