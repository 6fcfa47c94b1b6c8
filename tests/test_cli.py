import json
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_model
from PIL import Image
from typer.testing import CliRunner

import fastrcnn
from fastrcnn import Detector
from fastrcnn.cli import app
from fastrcnn.data.rendered_cells import render_cells
from fastrcnn.weights import save
from fastrcnn.zoo.recipes import NAMES

CLASSES = ["red", "white", "platelet"]


def run(*arguments, status: int = 0):
    """Runs the command, checks its exit status, and returns what it printed."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == status, result.output + repr(result.exception)
    assert "Traceback" not in result.output
    return result.output


def tiny(profile="mmdet"):
    model = tiny_model(profile=profile, min_size=96, max_size=128)
    model.class_names = CLASSES
    return model


@pytest.fixture(scope="module", params=["mmdet", "torchvision"])
def weights(request, tmp_path_factory):
    return save(tiny(request.param), tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture
def folder(tmp_path):
    """Three pictures, one of them damaged, and a text file."""
    path = tmp_path / "photos"
    path.mkdir()
    for i, name in enumerate(("a.jpg", "b.png", "c.jpg")):
        Image.fromarray(render_cells(i, 96 + 8 * i, 128)[0]).save(path / name)
    data = (path / "c.jpg").read_bytes()
    (path / "c.jpg").write_bytes(data[: len(data) // 2])
    (path / "notes.txt").write_text("not a picture")
    return path


def content_of(out: Path) -> dict:
    return json.loads((out / "detections.json").read_text())


def test_detect_goes_on_after_a_damaged_image(weights, folder, tmp_path):
    out = tmp_path / "out"
    printed = run("detect", folder, "--weights", weights, "--out", out, "--score", 0.3, status=1)
    assert sorted(p.name for p in out.iterdir()) == ["a.jpg", "b.png", "detections.json"]
    assert "2 of 3 images" in printed and "1 unreadable" in printed and f"See {out}/" in printed
    assert "skipped" in printed and str(folder / "c.jpg") in printed
    content = content_of(out)
    assert [i["id"] for i in content["images"]] == [1, 2]
    assert [i["file_name"] for i in content["images"]] == [str(folder / "a.jpg"), str(folder / "b.png")]
    assert [(i["width"], i["height"]) for i in content["images"]] == [(128, 96), (128, 104)]
    assert content["categories"] == [dict(id=i + 1, name=name) for i, name in enumerate(CLASSES)]
    rows = content["annotations"]
    assert len(rows) > 5 and [r["id"] for r in rows] == list(range(1, len(rows) + 1))
    detector = Detector(str(weights), device="cpu", score_threshold=0.3)
    for image, name in ((1, "a.jpg"), (2, "b.png")):
        (found,) = detector(folder / name)
        ours = [{k: r[k] for k in ("image_id", "category_id", "bbox", "score")} for r in rows if r["image_id"] == image]
        assert ours == found.to_coco(image)
        assert (np.array(Image.open(out / name)) != np.array(Image.open(folder / name))).any()
    assert {r["category_id"] for r in rows} <= {1, 2, 3} and all(r["iscrowd"] == 0 for r in rows)
    assert all(r["area"] == r["bbox"][2] * r["bbox"][3] for r in rows)
    for name in CLASSES:  # the closing line counts what the file holds
        number = sum(CLASSES[r["category_id"] - 1] == name for r in rows)
        assert f"{number} {name}" in printed if number else name not in printed.splitlines()[-1]


def test_detect_ends_well_when_all_is_well(weights, folder, tmp_path):
    out = tmp_path / "out"
    printed = run("detect", folder / "a.jpg", folder / "b*.png", "--weights", weights, "--out", out, "--batch", 2)
    assert "2 of 2 images" in printed and "unreadable" not in printed


def test_the_score_and_the_classes_select(weights, folder, tmp_path):
    def rows(*options):
        run("detect", folder / "a.jpg", "--weights", weights, "--out", tmp_path / "out", *options)
        return content_of(tmp_path / "out")["annotations"]

    low = rows("--score", 0.2)
    limit = sorted(r["score"] for r in low)[len(low) // 2]
    strip = lambda r: {k: v for k, v in r.items() if k != "id"}  # noqa: E731
    high = rows("--score", limit + 1e-5)
    assert [strip(r) for r in high] == [strip(r) for r in low if r["score"] > limit + 1e-5]
    assert 0 < len(high) < len(low)
    white = rows("--score", 0.2, "--classes", "white, platelet")
    assert [strip(r) for r in white] == [strip(r) for r in low if r["category_id"] in (2, 3)] and white


def test_an_unknown_class_is_named_with_the_known_ones(weights, folder, tmp_path):
    printed = run("detect", folder, "--weights", weights, "--classes", "red,blue", "--out", tmp_path / "out", status=1)
    assert "unknown blue" in printed and "red, white, platelet" in printed
    assert not (tmp_path / "out").exists()


def test_no_pictures_when_none_are_wanted(weights, folder, tmp_path):
    run("detect", folder / "a.jpg", "--weights", weights, "--out", tmp_path / "out", "--no-pictures")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["detections.json"]


def test_sources_are_never_overwritten(weights, folder, tmp_path):
    (tmp_path / "other").mkdir()
    Image.fromarray(render_cells(8, 96, 128)[0]).save(tmp_path / "other" / "a.jpg")
    Image.open(folder / "a.jpg").save(folder / "a.bmp")
    before = {p: p.read_bytes() for p in [*folder.iterdir(), tmp_path / "other" / "a.jpg"]}
    sources = folder / "a.jpg", tmp_path / "other" / "a.jpg", folder / "a.bmp"
    run("detect", *sources, "--weights", weights, "--out", folder)
    assert all(p.read_bytes() == data for p, data in before.items())
    new = {p.name for p in folder.iterdir()} - {p.name for p in before}
    assert new == {"a_2.jpg", "a_3.jpg", "a.png", "detections.json"}


def test_no_images(weights, tmp_path):
    printed = run("detect", tmp_path, tmp_path / "*.jpg", "--weights", weights, "--out", tmp_path / "out", status=1)
    assert "no images found" in printed and str(tmp_path) in printed
    assert not (tmp_path / "out").exists()


def test_an_image_that_is_not_there_and_an_address_that_fails(weights, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("urllib.request.OpenerDirector.open", fail)
    address = "https://example.com/street.jpg"
    options = "--weights", weights, "--out", tmp_path / "out"
    printed = run("detect", address, tmp_path / "none.jpg", *options, status=1)
    assert "0 of 2 images" in printed and "nothing" in printed
    assert address in printed and "no route to host" in printed and "none.jpg" in printed
    assert content_of(tmp_path / "out")["images"] == []


@pytest.mark.parametrize("options", [(), ("--model", "r50_fpn"), ("--weights", "https://example.com/model.pth")])
def test_weights_that_cannot_be_fetched_are_one_line(folder, tmp_path, monkeypatch, options):
    def fail(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("urllib.request.OpenerDirector.open", fail)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    printed = run("detect", folder, *options, "--out", tmp_path / "out", status=1)
    lines = [line for line in printed.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("fastrcnn: cannot download https://")
    assert "no route to host" in lines[0] and "--weights" in lines[0]


@pytest.mark.parametrize(
    "options, message",
    [
        (("--weights", "nowhere.pth"), "nowhere.pth"),
        (("--model", "r51_fpn", "--weights", "nowhere.pth"), "r51_fpn"),
        (("--precision", "fp12", "--weights", "nowhere.pth"), "precision"),
        (("--device", "tpu", "--weights", "nowhere.pth"), "tpu"),
    ],
)
def test_bad_options_are_one_line(folder, tmp_path, options, message):
    printed = run("detect", folder, *options, "--out", tmp_path / "out", status=1)
    assert message in printed and len([line for line in printed.splitlines() if line.strip()]) == 1


def test_an_interrupted_run_keeps_what_it_has(weights, folder, tmp_path, monkeypatch):
    original = Detector.stream

    def interrupted(self, images, batch_size=None):
        yield next(original(self, images, batch_size))
        raise KeyboardInterrupt

    monkeypatch.setattr(Detector, "stream", interrupted)
    result = CliRunner().invoke(app, ["detect", str(folder), "--weights", str(weights), "--out", str(tmp_path / "out")])
    assert result.exit_code == 130 and "--resume goes on from there" in result.output
    assert [i["file_name"] for i in content_of(tmp_path / "out")["images"]] == [str(folder / "a.jpg")]


def test_info_tells_versions_devices_and_operators():
    facts = json.loads(run("info", "--json"))
    assert facts["fastrcnn"] == fastrcnn.__version__ and facts["torch"] == torch.__version__
    assert facts["devices"][0].startswith("cpu") and len(facts["devices"]) == 1 + torch.cuda.device_count()
    assert {"nms", "roi_align", "conv_bn_relu"} <= set(facts["ops"])
    for row in facts["ops"].values():
        assert set(row) == {"cpu", "cuda"} and set(row.values()) <= {"kernel", "reference"}
    assert facts["dtypes"]["float32"] == facts["ops"] and set(facts["dtypes"]["float64"]) == set(facts["ops"])
    assert facts["dtypes"]["float64"]["conv_bn_relu"]["cpu"] == "reference"  # oneDNN has no double
    assert set(facts["reasons"]) == {"cpu", "cuda"}
    printed = run("info")
    assert all(op in printed for op in facts["ops"]) and torch.__version__ in printed


def test_models_lists_every_name():
    printed = run("models")
    assert all(name in printed for name in NAMES)
    line = next(line for line in printed.splitlines() if "r50_fpn_v2" in line)
    assert "43.66 M" in line


def test_demo_finds_cells_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.OpenerDirector.open", lambda *a, **k: pytest.fail("it went to the network"))
    printed = run("demo", "--out", tmp_path / "out", "--device", "cpu")
    assert (tmp_path / "out" / "demo.jpg").is_file()
    content = content_of(tmp_path / "out")
    found = content["annotations"]
    assert len(found) >= 5 and f"{len(found)} cells found" in printed
    assert {c["name"] for c in content["categories"]} == {"RBC", "WBC", "Platelets"}
    assert all(0 < r["bbox"][2] < content["images"][0]["width"] for r in found)


@pytest.fixture
def dataset(tmp_path):
    """Two rendered pictures in COCO's format."""
    (tmp_path / "images").mkdir()
    images, annotations = [], []
    for n in (1, 2):
        picture, boxes, labels = render_cells(n, 96, 128)
        Image.fromarray(picture).save(tmp_path / "images" / f"{n}.png")
        images.append(dict(id=n, file_name=f"{n}.png", width=128, height=96))
        for (x1, y1, x2, y2), label in zip(boxes.tolist(), labels.tolist()):
            box = dict(bbox=[x1, y1, x2 - x1, y2 - y1], area=(x2 - x1) * (y2 - y1), iscrowd=0)
            annotations.append(dict(id=len(annotations), image_id=n, category_id=label + 1, **box))
    categories = [dict(id=i + 1, name=name) for i, name in enumerate(CLASSES)]
    path = tmp_path / "train.json"
    path.write_text(json.dumps(dict(images=images, annotations=annotations, categories=categories)))
    return path


def with_content(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


def test_eval_prints_what_detect_finds(weights, dataset, tmp_path):
    """AP of the very boxes that the model finds is 100, under other names of the classes 0."""
    (tmp_path / "images" / "2.png").unlink()
    (found,) = Detector(str(weights), device="cpu", score_threshold=0.05)(tmp_path / "images" / "1.png")
    assert len(found) > 20

    def theirs(content):
        content["images"] = content["images"][:1]
        content["annotations"] = [
            dict(r, category_id=9 - r["category_id"], area=100, iscrowd=0) for r in found.to_coco(1)
        ]
        content["categories"] = [dict(id=9 - i, name=name) for i, name in enumerate(CLASSES, 1)]

    printed = run("eval", with_content(dataset, theirs), "--weights", weights, "--device", "cpu")
    assert printed.splitlines()[0].split() == ["AP", "100.0"] and printed.splitlines()[3].split() == ["APs", "100.0"]
    names = lambda content: [c.update(name=f"x{c['id']}") for c in content["categories"]]  # noqa: E731
    printed = run("eval", with_content(dataset, names), "--weights", weights, "--device", "cpu", status=1)
    assert "x6, x7, x8 are none of the model's 3 classes: red, white, platelet" in printed


@pytest.mark.parametrize("command, options", [("train", ("--out", "nowhere")), ("eval", ("--weights", "nowhere.pth"))])
def test_a_file_that_is_not_cocos_is_one_line(tmp_path, command, options):
    (tmp_path / "a.json").write_text("{}")
    printed = run(command, tmp_path / "a.json", *options, status=1)
    assert "not a COCO annotation file" in printed and len(printed.strip().splitlines()) == 1
