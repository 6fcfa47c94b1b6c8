"""fastrcnn train, on pictures rendered here."""

# ruff: noqa: F811  fixtures are imported by name

import csv
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from test_cli import CLASSES, SHORT, content_of, dataset, run, weights, with_content  # noqa: F401

from fastrcnn import Detector
from fastrcnn.models import faster_rcnn
from fastrcnn.models.base_detector import BaseDetector
from fastrcnn.training.state import Losses
from fastrcnn.weights import infer_model, save


@pytest.fixture(autouse=True)
def no_charts(monkeypatch):
    monkeypatch.setattr("fastrcnn.training.loop.report", lambda *a: None)


def test_training_writes_weights_that_detect_and_eval_take(dataset, tmp_path):
    def other_ids(content):  # as labelling tools write them, with a number for a name
        for row in (*content["categories"], *content["annotations"]):
            key = "category_id" if "category_id" in row else "id"
            row[key] = {1: 0, 2: 7, 3: 3}[row[key]]
        content["categories"][1]["name"] = 5

    with_content(dataset, other_ids)
    names = ["red", "platelet", "5"]
    outs = [tmp_path / "runs" / name for name in ("one", "two")]
    for out in outs:
        printed = run("train", dataset, "--out", out, "--val", dataset, "--workers", 0, *SHORT)
        assert "epoch 1/1" in printed and "AP50" in printed and "2 images" in printed
    files = [out / f"{name}.safetensors" for out, name in zip(outs, ("best", "last"))]
    one, two = (Detector(str(file), device="cpu") for file in files)
    assert one.class_names == two.class_names == names and one.category_ids == two.category_ids == [0, 3, 7]
    # Twice the same, the layers that begin at random included.
    assert all(torch.equal(a, b) for a, b in zip(one.model.state_dict().values(), two.model.state_dict().values()))
    run("detect", tmp_path / "images", "--weights", files[0], "--out", tmp_path / "found", "--score", 0.0)
    found = content_of(tmp_path / "found")
    assert {c["name"]: c["id"] for c in found["categories"]} == {"red": 0, "platelet": 3, "5": 7}
    printed = run("eval", dataset, "--weights", files[1], "--device", "cpu")
    assert "AP50" in printed and "AR100" in printed
    assert json.loads((outs[0] / "config.json").read_text())["recipe"]["name"] == "finetune"


def test_the_pictures_sizes_are_the_checkpoints_own(dataset, tmp_path):
    run("train", dataset, "--out", tmp_path / "one", "--workers", 0, *SHORT)
    last = tmp_path / "one" / "last.safetensors"
    options = "--weights", last, "--epochs", 1, "--workers", 0, "--device", "cpu"
    run("train", dataset, "--out", tmp_path / "two", *options)
    run("train", dataset, "--out", tmp_path / "three", *options, "--min-size", 48)
    sizes = [infer_model(tmp_path / name / "last.safetensors").data_preprocessor for name in ("two", "three")]
    assert [(s.min_size, s.max_size) for s in sizes] == [(64, 96), (48, 96)]


def test_a_retinanet_trains_detects_and_is_measured(dataset, tmp_path):
    short = [v if v != "r18_fpn" else "retinanet_r18_fpn" for v in SHORT]
    assert "loss_cls" in run("train", dataset, "--out", tmp_path / "run", *short)
    best = tmp_path / "run" / "best.safetensors"
    assert type(Detector(str(best), device="cpu").model).__name__ == "RetinaNet"
    assert "AP50" in run("eval", dataset, "--weights", best, "--device", "cpu")


def test_a_proposal_network_trains_and_its_recall_is_measured(dataset, tmp_path):
    short = [v if v != "r18_fpn" else "rpn_r50_fpn" for v in SHORT]
    printed = run("train", dataset, "--out", tmp_path / "run", "--val", dataset, *short)
    assert "loss_rpn_bbox" in printed and "AR@1000" in printed
    out = tmp_path / "run" / "best.safetensors"
    assert Detector(str(out), device="cpu").class_names == ["object"]
    assert "AR@100 " in run("eval", dataset, "--weights", out, "--device", "cpu")
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["best"]["AR@1000"] >= 0
    tuned = [v for v in SHORT if v not in ("--model", "r18_fpn")]  # the weights say that they are an RPN's
    run("train", dataset, "--out", tmp_path / "tuned", "--weights", out, *tuned)
    assert Detector(str(tmp_path / "tuned" / "last.safetensors"), device="cpu").class_names == ["object"]


def test_training_goes_on_from_torchvision_weights(dataset, tmp_path):
    model, start = faster_rcnn("r18_fpn", 3, "torchvision"), tmp_path / "start.pth"
    save(model, start)
    run("train", dataset, "--weights", start, "--out", tmp_path / "run", "--recipe", "tv", *SHORT)
    trained = infer_model(tmp_path / "run" / "last.safetensors")
    assert trained.profile.name == "torchvision"
    frozen, moved = "backbone.conv1.weight", "roi_head.bbox_head.fc_cls.weight"
    assert torch.equal(trained.state_dict()[frozen], model.state_dict()[frozen])
    assert not torch.equal(trained.state_dict()[moved], model.state_dict()[moved])


def test_a_killed_command_goes_on(dataset, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    long = [v if v != 1 else 3 for v in SHORT[:4]] + list(SHORT[4:])
    run("train", dataset, "--out", whole, *long)
    forward, steps = Losses.forward, []

    def dying(self, *batch):
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return forward(self, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(Losses, "forward", dying)
        run("train", dataset, "--out", cut, *long, status=130)
    assert "holds a run" in run("train", dataset, "--out", cut, *long, status=1)
    assert "going on at step 2" in run("train", dataset, "--out", cut, "--resume", *long)
    tables = [list(csv.DictReader((out / "results.csv").open())) for out in (whole, cut)]
    assert tables[0] == tables[1] and len(tables[0]) == 3


def other_name(content):
    content["categories"][0]["name"] = "blue"


@pytest.mark.parametrize("options, change, message", [
    (("--out", "train.json/m"), None, "train.json/m"),
    (("--out", "m.safetensors"), None, "expected a folder, which will hold best.safetensors"),
    (("--out", "m.pth"), None, "the name of a file: m.pth; try m"),
    (("--val", "nothing.json"), None, "nothing.json"),
    (("--val", "other.json"), None, "blue are none of the model's 3 classes"),
    (("--val", "far.json"), None, "far.png"),
    (("--val", "bare.json"), None, "bare.json: no object is annotated"),
    (("--epochs", -3), None, "epochs"),
    (("--batch", 0), None, "batch_size"),
    (("--batch", "many"), None, "batch: expected a whole number or auto, got 'many'"),
    (("--batch", "auto"), None, "batch: auto measures a GPU's memory"),
    (("--lr", "nan"), None, "lr"),
    (("--recipe", "5x"), None, "recipe: expected one of 1x"),
    (("--weights", "nowhere.pth"), None, "nowhere.pth"),
    ((), lambda c: c.update(annotations=[]), "no object is annotated"),
])  # fmt: skip
def test_what_a_run_lacks_is_said_before_its_first_step(dataset, tmp_path, monkeypatch, options, change, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Losses, "forward", lambda *a: pytest.fail("it has begun"))
    altered = {"other.json": other_name, "far.json": lambda c: c["images"][0].update(file_name="far.png"),
               "bare.json": lambda c: c.update(annotations=[])}  # fmt: skip
    for name, alter in altered.items():
        Path(name).write_text(dataset.read_text())
        with_content(Path(name), alter)
    if change:
        with_content(dataset, change)
    printed = run("train", dataset, "--out", "run", *SHORT, *options, status=1)
    assert message in printed.strip().splitlines()[-1]
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("change, said", [
    (lambda c: c["images"][1].update(file_name="gone.png"), "gone.png"),
    (lambda c: c["images"][1].update(height=97), "128 x 97 pixels are stated"),
    (lambda c: c["annotations"][0].update(bbox=[9, 9, -5, -5]), "annotations[0]"),
    (lambda c: c["annotations"][0].update(bbox=[5, 5, 0.2, 0.3]), "less than a pixel wide or high"),
])  # fmt: skip
def test_what_is_wrong_with_the_data_is_named_and_left_out(dataset, tmp_path, change, said):
    printed = run("train", with_content(dataset, change), *SHORT, "--out", tmp_path / "run")
    assert said in printed and "epoch 1/1" in printed


def test_hotcoco_is_asked_for_before_training_and_measuring(dataset, weights, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    monkeypatch.setattr(BaseDetector, "forward", lambda *a: pytest.fail("it has begun"))
    for arguments in (
        ("train", dataset, "--val", dataset, "--out", tmp_path / "run"),
        ("eval", dataset, "--weights", weights),
    ):
        assert "fastrcnn[eval]" in run(*arguments, "--device", "cpu", status=1)


def test_what_ends_a_run_leaves_the_state_of_before(dataset, tmp_path, monkeypatch):
    forward, steps, out = Losses.forward, [], tmp_path / "run"

    def diverging(self, *batch):
        steps.append(1)
        return {k: v * (math.nan if len(steps) > 3 else 1) for k, v in forward(self, *batch).items()}

    monkeypatch.setattr(Losses, "forward", diverging)
    printed = run("train", dataset, *SHORT, "--epochs", 3, "--out", out, status=1)
    assert "step 3: the loss is nan" in printed and "images" in printed
    assert "step_000000002.pt is the last good state" in printed
    assert Detector(str(out / "last.safetensors"), device="cpu").class_names == CLASSES
