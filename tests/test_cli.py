import json
import math
import sys
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
from fastrcnn.models import faster_rcnn
from fastrcnn.models.base_detector import BaseDetector
from fastrcnn.weights import infer_model, save
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
    assert result.exit_code != 0
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


SHORT = "--model", "r18_fpn", "--epochs", 1, "--batch", 1, "--min-size", 64, "--max-size", 96, "--device", "cpu"


def with_content(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


def test_training_writes_weights_that_detect_and_eval_take(dataset, tmp_path):
    def other_ids(content):  # as labelling tools write them, with a number for a name
        for row in (*content["categories"], *content["annotations"]):
            key = "category_id" if "category_id" in row else "id"
            row[key] = {1: 0, 2: 7, 3: 3}[row[key]]
        content["categories"][1]["name"] = 5

    with_content(dataset, other_ids)
    names = ["red", "platelet", "5"]
    outs = [tmp_path / "runs" / f"{n}.{kind}" for n, kind in ((1, "safetensors"), (2, "pth"))]
    for out in outs:
        printed = run("train", dataset, "--out", out, "--val", dataset, *SHORT)
        assert "epoch 1/1" in printed and "AP50" in printed and "2 images" in printed
    one, two = (Detector(str(out), device="cpu") for out in outs)
    assert one.class_names == two.class_names == names and one.category_ids == two.category_ids == [0, 3, 7]
    # Twice the same, the layers that begin at random included.
    assert all(torch.equal(a, b) for a, b in zip(one.model.state_dict().values(), two.model.state_dict().values()))
    run("detect", tmp_path / "images", "--weights", outs[0], "--out", tmp_path / "found", "--score", 0.0)
    found = content_of(tmp_path / "found")
    assert {c["name"]: c["id"] for c in found["categories"]} == {"red": 0, "platelet": 3, "5": 7}
    printed = run("eval", dataset, "--weights", outs[1], "--device", "cpu")
    assert "AP50" in printed and "AR100" in printed


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


def test_a_retinanet_trains_detects_and_is_measured(dataset, tmp_path):
    out = tmp_path / "trained.safetensors"
    short = [v if v != "r18_fpn" else "retinanet_r18_fpn" for v in SHORT]
    assert "loss_cls" in run("train", dataset, "--out", out, *short)
    assert type(Detector(str(out), device="cpu").model).__name__ == "RetinaNet"
    assert "AP50" in run("eval", dataset, "--weights", out, "--device", "cpu")


def test_a_proposal_network_trains_and_its_recall_is_measured(dataset, tmp_path):
    out = tmp_path / "trained.safetensors"
    short = [v if v != "r18_fpn" else "rpn_r50_fpn" for v in SHORT]
    printed = run("train", dataset, "--out", out, "--val", dataset, *short)
    assert "loss_rpn_bbox" in printed and "AR@1000" in printed
    assert Detector(str(out), device="cpu").class_names == ["object"]
    assert "AR@100 " in run("eval", dataset, "--weights", out, "--device", "cpu")
    tuned = [v for v in SHORT if v not in ("--model", "r18_fpn")]  # the weights say that they are an RPN's
    run("train", dataset, "--out", tmp_path / "tuned.safetensors", "--weights", out, *tuned)
    assert Detector(str(tmp_path / "tuned.safetensors"), device="cpu").class_names == ["object"]


def test_training_goes_on_from_torchvision_weights(dataset, tmp_path):
    model, start, out = faster_rcnn("r18_fpn", 3, "torchvision"), tmp_path / "start.pth", tmp_path / "trained.pth"
    save(model, start)
    run("train", dataset, "--weights", start, "--out", out, *SHORT)
    trained = infer_model(out)
    assert trained.profile.name == "torchvision"
    frozen, moved = "backbone.conv1.weight", "roi_head.bbox_head.fc_cls.weight"
    assert torch.equal(trained.state_dict()[frozen], model.state_dict()[frozen])
    assert not torch.equal(trained.state_dict()[moved], model.state_dict()[moved])


@pytest.mark.parametrize("command, options", [("train", ()), ("eval", ("--weights", "nowhere.pth"))])
def test_a_file_that_is_not_cocos_is_one_line(tmp_path, command, options):
    (tmp_path / "a.json").write_text("{}")
    printed = run(command, tmp_path / "a.json", *options, status=1)
    assert "not a COCO annotation file" in printed and len(printed.strip().splitlines()) == 1


def other_name(content):
    content["categories"][0]["name"] = "blue"


@pytest.mark.parametrize("options, change, message", [
    (("--out", "train.json/m.pth"), None, "train.json/m.pth"),
    (("--out", "images"), None, "images"),
    (("--out", "m.onnx"), None, "m.onnx"),
    (("--val", "nothing.json"), None, "nothing.json"),
    (("--val", "other.json"), None, "blue are none of the model's 3 classes"),
    (("--val", "far.json"), None, "far.png"),
    (("--val", "bare.json"), None, "bare.json: no object is annotated"),
    (("--epochs", -3), None, "epochs"),
    (("--batch", 0), None, "batch_size"),
    (("--lr", "nan"), None, "lr"),
    (("--weights", "nowhere.pth"), None, "nowhere.pth"),
    ((), lambda c: c["images"][1].update(file_name="gone.png"), "gone.png"),
    ((), lambda c: c["images"][1].update(height=97), "128 x 97 pixels are stated"),
    ((), lambda c: c.update(annotations=[]), "no object is annotated"),
    ((), lambda c: c["annotations"][0].update(bbox=[9, 9, -5, -5]), "annotations[0]"),
])  # fmt: skip
def test_what_a_run_lacks_is_one_line_before_its_first_step(dataset, tmp_path, monkeypatch, options, change, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(BaseDetector, "forward", lambda *a: pytest.fail("it has begun"))
    altered = {"other.json": other_name, "far.json": lambda c: c["images"][0].update(file_name="far.png"),
               "bare.json": lambda c: c.update(annotations=[])}  # fmt: skip
    for name, alter in altered.items():
        Path(name).write_text(dataset.read_text())
        with_content(Path(name), alter)
    if change:
        with_content(dataset, change)
    printed = run("train", dataset, *SHORT, *options, status=1)
    assert message in printed and len(printed.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("*trained*"))


def test_hotcoco_is_asked_for_before_training_and_measuring(dataset, weights, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    monkeypatch.setattr(BaseDetector, "forward", lambda *a: pytest.fail("it has begun"))
    for arguments in (
        ("train", dataset, "--val", dataset, "--out", tmp_path / "m.pth"),
        ("eval", dataset, "--weights", weights),
    ):
        assert "fastrcnn[eval]" in run(*arguments, "--device", "cpu", status=1)


def test_what_ends_a_run_leaves_the_weights_of_the_last_epoch(dataset, tmp_path, monkeypatch):
    forward, steps, out = BaseDetector.forward, [], tmp_path / "m.safetensors"

    def diverging(self, images, targets=None):
        steps.append(1)
        return {k: v * (math.nan if len(steps) > 3 else 1) for k, v in forward(self, images, targets).items()}

    monkeypatch.setattr(BaseDetector, "forward", diverging)
    printed = run("train", dataset, *SHORT, "--epochs", 3, "--out", out, status=1)
    assert "step 3: the loss is nan" in printed and f"The weights of the last whole epoch are in {out}" in printed
    assert Detector(str(out), device="cpu").class_names == CLASSES


def test_boxes_left_out_are_counted(dataset, tmp_path):
    tiny = with_content(dataset, lambda c: c["annotations"][0].update(bbox=[5, 5, 0.2, 0.3]))
    printed = run("train", tiny, *SHORT, "--out", tmp_path / "m.pth")
    assert "boxes left out or cut: 1 less than a pixel wide or high" in printed
