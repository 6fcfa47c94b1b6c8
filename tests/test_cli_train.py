"""fastrcnn train, on pictures rendered here."""

# ruff: noqa: F811  fixtures are imported by name

import csv
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from test_cli import CLASSES, content_of, dataset, run, tiny, weights, with_content  # noqa: F401

from fastrcnn import Detector
from fastrcnn.models.base_detector import BaseDetector
from fastrcnn.training.state import Losses
from fastrcnn.weights import infer_model, save


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    """Small models to go on from; those of named models in full size would take most of the time."""
    folder = tmp_path_factory.mktemp("starts")
    small = dict(min_size=64, max_size=96)
    models = dict(frcnn=tiny(), tv=tiny("torchvision"), retina=tiny_model("retinanet_r18_fpn", **small),
                  rpn=tiny_model("rpn_r50_fpn", **small))  # fmt: skip
    return {name: save(model, folder / f"{name}.pth") for name, model in models.items()}


@pytest.fixture
def short(starts):
    return "--weights", starts["frcnn"], "--epochs", 1, "--batch", 1, "--workers", 0, "--device", "cpu"


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr("fastrcnn.training.loop.report", lambda *a: None)


def test_training_writes_weights_that_detect_and_eval_take(dataset, short, tmp_path):
    def other_ids(content):  # as labelling tools write them, with a number for a name
        for row in (*content["categories"], *content["annotations"]):
            key = "category_id" if "category_id" in row else "id"
            row[key] = {1: 0, 2: 7, 3: 3}[row[key]]
        content["categories"][1]["name"] = 5

    with_content(dataset, other_ids)
    names = ["red", "platelet", "5"]
    outs = [tmp_path / "runs" / name for name in ("one", "two")]
    for out in outs:
        given = out.with_suffix(".safetensors") if out == outs[1] else out
        printed = run("train", dataset, "--out", given, "--val", dataset, *short)
        assert "epoch 1/1" in printed and "AP50" in printed and "2 images" in printed
    assert given.read_bytes() == (outs[1] / "best.safetensors").read_bytes()
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


def test_the_pictures_sizes_are_the_checkpoints_own(dataset, short, tmp_path):
    run("train", dataset, "--out", tmp_path / "one", *short)
    run("train", dataset, "--out", tmp_path / "two", *short, "--min-size", 48)
    sizes = [infer_model(tmp_path / name / "last.safetensors").data_preprocessor for name in ("one", "two")]
    assert [(s.min_size, s.max_size) for s in sizes] == [(96, 128), (48, 128)]


def test_a_named_model_trains_from_scratch(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(Losses, "forward", lambda self, *batch: dict(loss=sum(p.sum() for p in self.parameters()) * 0))
    options = "--model", "r18_fpn", "--epochs", 1, "--batch", 2, "--device", "cpu", "--min-size", 64, "--max-size", 96
    for name in ("one", "two"):
        run("train", dataset, "--out", tmp_path / name, *options)
    one, two = (infer_model(tmp_path / name / "last.safetensors") for name in ("one", "two"))
    assert all(map(torch.equal, one.state_dict().values(), two.state_dict().values()))  # begun alike
    assert one.backbone.frozen_stages == -1 and all(p.requires_grad for p in one.parameters())


def test_a_retinanet_trains_detects_and_is_measured(dataset, starts, short, tmp_path):
    assert "loss_cls" in run("train", dataset, "--out", tmp_path / "run", *short, "--weights", starts["retina"])
    best = tmp_path / "run" / "best.safetensors"
    assert type(Detector(str(best), device="cpu").model).__name__ == "RetinaNet"
    assert "AP50" in run("eval", dataset, "--weights", best, "--device", "cpu")


def test_a_proposal_network_trains_and_its_recall_is_measured(dataset, starts, short, tmp_path):
    printed = run("train", dataset, "--out", tmp_path / "run", "--val", dataset, *short, "--weights", starts["rpn"])
    assert "loss_rpn_bbox" in printed and "AR@1000" in printed
    out = tmp_path / "run" / "best.safetensors"
    assert Detector(str(out), device="cpu").class_names == ["object"]
    assert "AR@100 " in run("eval", dataset, "--weights", out, "--device", "cpu")
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["best"]["AR@1000"] >= 0


def test_training_goes_on_from_torchvision_weights(dataset, starts, short, tmp_path):
    run("train", dataset, *short, "--weights", starts["tv"], "--out", tmp_path / "run", "--recipe", "tv")
    model, trained = infer_model(starts["tv"]), infer_model(tmp_path / "run" / "last.safetensors")
    assert trained.profile.name == "torchvision"
    frozen, moved = "backbone.conv1.weight", "roi_head.bbox_head.fc_cls.weight"
    assert torch.equal(trained.state_dict()[frozen], model.state_dict()[frozen])
    assert not torch.equal(trained.state_dict()[moved], model.state_dict()[moved])


def test_a_killed_command_goes_on(dataset, short, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    long = *short, "--epochs", 3
    run("train", dataset, "--out", whole, *long)
    forward, steps = Losses.forward, []

    def dying(self, *batch):
        steps.append(1)
        if len(steps) == 4:
            raise SystemExit(9)
        return forward(self, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(Losses, "forward", dying)
        run("train", dataset, "--out", cut, *long, status=9)
    assert "holds a run" in run("train", dataset, "--out", cut, *long, status=1)
    assert "going on at step 2" in run("train", dataset, "--out", cut, "--resume", *long)
    tables = [list(csv.DictReader((out / "results.csv").open())) for out in (whole, cut)]
    assert tables[0] == tables[1] and len(tables[0]) == 3


def test_val_is_the_part_of_a_set_that_is_for_it(dataset, short, tmp_path, monkeypatch):
    sets, seen = tmp_path / "sets", []
    run("data", "split", dataset, "--to", "yolo", "--val", 0.5, "--out", sets)
    monkeypatch.setattr(
        "fastrcnn.training.train", lambda net, data, plan, out, resume, val, **more: seen.append((data, val))
    )
    for number, more in enumerate(((), ("--val", sets), ("--val", sets / "data.yaml"))):
        run("train", sets, *short, *more, "--out", tmp_path / f"run_{number}")
    for data, val in seen:
        assert (data.picture(0).parent.name, val.picture(0).parent.name) == ("train", "val")


def test_a_run_goes_on_with_the_file_of_its_best_weights_named_or_not(dataset, short, tmp_path):
    for given, named in (("a", "a.safetensors"), ("b.safetensors", "b")):
        run("train", dataset, "--out", tmp_path / given, *short)
        run("train", dataset, "--out", tmp_path / named, *short, "--resume")
        folder = tmp_path / given[0]
        assert folder.with_suffix(".safetensors").read_bytes() == (folder / "best.safetensors").read_bytes()


def other_name(content):
    content["categories"][0]["name"] = "blue"


@pytest.mark.parametrize("options, change, message", [
    (("--out", "train.json/m"), None, "train.json/m"),
    (("--out", "m.pth"), None, "expected a folder, which will hold best.safetensors"),
    (("--out", "n.pt"), None, "the name of a file: n.pt; try n"),
    (("--val", "nothing.json"), None, "nothing.json"),
    (("--val", "other.json"), None, "blue are none of the model's 3 classes"),
    (("--val", "far.json"), None, "far.png"),
    (("--val", "bare.json"), None, "bare.json: no object is annotated"),
    (("--batch", "auto"), None, "batch: auto measures a GPU's memory"),
    (("--weights", "nowhere.pth"), None, "nowhere.pth"),
    (("--patience", 3, "--images", "gone"), None, "patience: needs --val"),
    ((), lambda c: c.update(annotations=[]), "no object is annotated"),
])  # fmt: skip
def test_what_a_run_lacks_is_said_before_its_first_step(
    dataset, short, tmp_path, monkeypatch, options, change, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Losses, "forward", lambda *a: pytest.fail("it has begun"))
    altered = {"other.json": other_name, "far.json": lambda c: c["images"][0].update(file_name="far.png"),
               "bare.json": lambda c: c.update(annotations=[])}  # fmt: skip
    for name, alter in altered.items():
        Path(name).write_text(dataset.read_text())
        with_content(Path(name), alter)
    if change:
        with_content(dataset, change)
    printed = run("train", dataset, "--out", "run", *short, *options, status=1)
    assert message in printed.strip().splitlines()[-1]
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("option, value, status", [
    ("--epochs", 0, 2), ("--batch", 0, 2), ("--batch", "many", 2), ("--lr", -1, 2), ("--lr", "nan", 2), ("--seed", -1, 2),
    ("--min-size", -5, 2), ("--max-size", 0, 2), ("--patience", 0, 2), ("--workers", -1, 2), ("--recipe", "5x", 1),
    ("--precision", "fp12", 1),
])  # fmt: skip
def test_numbers_that_no_run_has_are_named_before_the_data_is_looked_at(tmp_path, option, value, status):
    printed = run("train", tmp_path / "nothing", "--out", tmp_path / "run", option, value, status=status)
    assert (f"'{option}'" if status == 2 else f"{option[2:]}: expected one of") in printed and "nothing" not in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("change, said", [
    (lambda c: c["images"][1].update(file_name="gone.png"), "gone.png"),
    (lambda c: c["images"][1].update(height=97), "128 x 97 pixels are stated"),
    (lambda c: c["annotations"][0].update(bbox=[9, 9, -5, -5]), "annotations[0]"),
    (lambda c: c["annotations"][0].update(bbox=[5, 5, 0.2, 0.3]), "less than a pixel wide or high"),
])  # fmt: skip
def test_what_is_wrong_with_the_data_is_named_and_left_out(dataset, short, tmp_path, change, said):
    printed = run("train", with_content(dataset, change), *short, "--out", tmp_path / "run")
    assert said in printed and "epoch 1/1" in printed


def test_hotcoco_is_asked_for_before_training_and_measuring(dataset, weights, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    monkeypatch.setattr(BaseDetector, "forward", lambda *a: pytest.fail("it has begun"))
    for arguments in (
        ("train", dataset, "--val", dataset, "--out", tmp_path / "run"),
        ("eval", dataset, "--weights", weights),
    ):
        assert "fastrcnn[eval]" in run(*arguments, "--device", "cpu", status=1)


def test_what_ends_a_run_leaves_the_state_of_before(dataset, short, tmp_path, monkeypatch):
    forward, steps, out = Losses.forward, [], tmp_path / "run"

    def diverging(self, *batch):
        steps.append(1)
        return {k: v * (math.nan if len(steps) > 3 else 1) for k, v in forward(self, *batch).items()}

    monkeypatch.setattr(Losses, "forward", diverging)
    printed = run("train", dataset, *short, "--epochs", 3, "--out", out, status=1)
    assert "step 3: the loss is nan" in printed and "images" in printed
    assert "step_000000002.pt is the last good state" in printed
    assert Detector(str(out / "last.safetensors"), device="cpu").class_names == CLASSES
