"""Each option of each verb does what it says."""

# ruff: noqa: F811  fixtures are imported by name

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import content_of, dataset, run, tiny, with_content  # noqa: F401
from test_cli_face import VERBS
from test_cli_train import no_report  # noqa: F401

from fastrcnn import Detector
from fastrcnn.data import read_image
from fastrcnn.data.rendered_cells import render_cells
from fastrcnn.inference.tiles import Tiled
from fastrcnn.weights import save

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save(tiny(), tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture
def picture(tmp_path):
    Image.fromarray(render_cells(3, 96, 128)[0]).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_every_option_is_in_a_test():
    said = "".join(path.read_text("utf-8") for path in HERE.glob("test_*.py"))
    pages = "".join(path.read_text("utf-8") for path in [*HERE.glob("../docs/*.md"), HERE / "../README.md"])
    examples = "".join(verb.help for verb in VERBS.values())
    options = {
        (*p.opts, *p.secondary_opts) for verb in VERBS.values() for p in verb.params if p.opts[0].startswith("--")
    }
    assert len(options) > 50
    assert not [o for o in sorted(options) if not any(re.search(rf"{name}\b", said + pages + examples) for name in o)]


# --- detect


def test_what_detect_keeps_and_how_it_counts(weights, picture, tmp_path):
    def boxes(*options):
        run("detect", picture, "--weights", weights, "--out", tmp_path / "o", "--score", 0, "--overwrite", *options)
        return [row["bbox"] for row in content_of(tmp_path / "o")["annotations"]]

    for options, named in (
        (("--iou", 0.9), dict(iou_threshold=0.9)),
        (("--max-det", 3), dict(max_per_img=3)),
        (("--precision", "bf16"), dict(precision="bf16")),
    ):
        wanted = Detector(str(weights), score_threshold=0.0, **named)(picture)[0].to_coco(1)
        assert boxes(*options) == [row["bbox"] for row in wanted] != boxes()
    assert not list((tmp_path / "o").glob("earlier*"))
    run("detect", picture, "--weights", weights, "--out", tmp_path / "o")
    assert [p.name for p in (tmp_path / "o").glob("earlier*")] == ["earlier-1"]


def test_weights_that_name_no_classes_are_named_by_an_option(picture, dataset, tmp_path, monkeypatch):
    model = tiny()
    model.class_names = None
    weights, names = save(model, tmp_path / "own.safetensors"), ["one", "two", "three"]
    (tmp_path / "classes.txt").write_text("\n".join(names))
    given = "--weights", weights, "--names", tmp_path / "classes.txt"
    detecting = "detect", picture, "--out", tmp_path / "out", "--score", 0
    run(*detecting, *given)
    assert [c["name"] for c in content_of(tmp_path / "out")["categories"]] == names
    assert "had names" in run(*detecting, *given[:3], "three,two,one", "--resume", status=1)
    assert "--names does" in run(*detecting, *given[:2])
    assert "one for each of 3 classes (background is none), got 2" in run(*detecting, *given[:3], "one,two", status=1)
    run("convert", weights, "--to", "fastrcnn", "--out", tmp_path / "named.safetensors", *given[2:])
    assert Detector(str(tmp_path / "named.safetensors")).class_names == names
    run("eval", dataset, *given[:2], "--names", dataset)
    assert "none of the model's 3 classes: one, two, three" in run("eval", dataset, *given, status=1)
    seen = []
    monkeypatch.setattr("fastrcnn.export.export", lambda detector, *rest: seen.append(detector.class_names) or 1 / 0)
    monkeypatch.setattr("fastrcnn.serve.create_app", lambda detector, *rest, **more: seen.append(detector.class_names))
    monkeypatch.setattr("fastrcnn.serve.serve", lambda *rest: None)
    run("serve", "--port", 0, *given)
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        run("export", weights, *given[2:])
    assert seen == [names, names]


def test_detect_looks_in_tiles_when_it_is_told_to(weights, picture, tmp_path):
    run("detect", picture, "--weights", weights, "--out", tmp_path / "o", "--score", 0, "--tile", 64, "--overlap", 0.25)
    wanted = Tiled(Detector(str(weights), score_threshold=0.0), 64, 0.25)(picture)[0].to_coco(1)
    found = [row["bbox"] for row in content_of(tmp_path / "o")["annotations"]]
    assert found == [row["bbox"] for row in wanted] and found
    whole = Detector(str(weights), score_threshold=0.0)(picture)[0].to_coco(1)
    assert found != [row["bbox"] for row in whole]


def test_how_detect_draws(weights, picture, tmp_path):
    found = Detector(str(weights), score_threshold=0.0, max_per_img=2)(picture)[0]
    options = "detect", picture, "--weights", weights, "--score", 0, "--max-det", 2
    drawn = []
    for more, named in (((), {}), (("--line-width", 5), dict(line_width=5)), (("--hide-labels",), dict(labels=False))):
        run(*options, "--out", tmp_path / f"o{len(drawn)}", *more)
        pixels = np.array(Image.open(tmp_path / f"o{len(drawn)}" / "a.png"))
        assert np.array_equal(pixels, found.draw(read_image(picture), **named).permute(1, 2, 0).numpy())
        drawn.append(pixels)
    assert (drawn[0] != drawn[1]).any() and (drawn[0] != drawn[2]).any()


# --- train


@pytest.fixture
def short(weights):
    return "--weights", weights, "--epochs", 1, "--batch", 1, "--workers", 0, "--device", "cpu"


def test_pictures_that_lie_elsewhere(dataset, weights, short, tmp_path):
    """--images and --val-images: two sets whose annotation files lie beside neither of their picture folders."""
    for name in ("train", "val"):
        (tmp_path / "files").mkdir(exist_ok=True)
        shutil.copy(dataset, tmp_path / "files" / f"{name}.json")
        shutil.copytree(tmp_path / "images", tmp_path / "elsewhere" / name)
    with_content(
        tmp_path / "files" / "val.json", lambda c: [i.update(file_name=f"v{i['file_name']}") for i in c["images"]]
    )
    for n in (1, 2):
        (tmp_path / "elsewhere" / "val" / f"{n}.png").rename(tmp_path / "elsewhere" / "val" / f"v{n}.png")
    shutil.rmtree(tmp_path / "images")
    train, val = (tmp_path / "files" / f"{name}.json" for name in ("train", "val"))
    images = "--images", tmp_path / "elsewhere" / "train"
    val_images = "--val-images", tmp_path / "elsewhere" / "val"
    printed = run("train", train, *images, "--val", val, *val_images, "--out", tmp_path / "run", *short)
    assert "2 images" in printed and "missing" not in printed and "AP50" in printed
    printed = run("train", train, *images, "--val", val, "--out", tmp_path / "none", *short, status=1)
    assert "v1.png" in printed
    scores = json.loads(run("eval", val, "--images", val_images[1], "--weights", weights, "--json"))
    assert scores["AP"] is not None
    assert "picture missing" not in run("data", "check", val, "--images", val_images[1])
    run("data", "convert", val, "--images", val_images[1], "--to", "yolo", "--out", tmp_path / "yolo")
    assert sorted(p.stem for p in (tmp_path / "yolo").rglob("v*.png")) == ["v1", "v2"]
    parts = json.loads(run("data", "split", val, "--images", val_images[1], "--val", 0.5, "--out", tmp_path / "sets",
                           "--seed", 1, "--json"))  # fmt: skip
    assert parts["pictures"] == dict(train=1, val=1)


def test_what_train_is_told_is_in_its_run(dataset, short, tmp_path):
    with_content(dataset, lambda c: c.update(annotations=[a for a in c["annotations"] if a["image_id"] == 1]))
    options = "--lr", 0.0005, "--seed", 7, "--patience", 3, "--precision", "bf16", "--drop-empty", "--deterministic"
    before = torch.are_deterministic_algorithms_enabled()
    try:
        printed = run("train", dataset, "--val", dataset, "--out", tmp_path / "run", *short, *options)
    finally:
        torch.use_deterministic_algorithms(before)
    assert "pictures, 1 an epoch" in printed
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["recipe"]["patience"], config["recipe"]["precision"]) == (3, "bf16")
    assert (config["seed"], config["deterministic"], config["drop_empty"]) == (7, True, True)
    with open(tmp_path / "run" / "results.csv") as file:
        assert 0 < float(next(csv.DictReader(file))["lr"]) <= 0.0005


def test_tensorboards_files_are_written_or_its_absence_is_told(dataset, short, tmp_path):
    pytest.importorskip("tensorboard")
    run("train", dataset, "--out", tmp_path / "run", *short, "--tensorboard")
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))


# --- eval, bench, export


def test_how_many_detections_eval_counts(dataset, weights):
    options = "eval", dataset, "--weights", weights, "--json"
    few, plain = (json.loads(run(*options, *more)) for more in (("--max-dets", "1,2,3"), ("--batch", 2)))
    assert {"AR1", "AR2", "AR3"} <= set(few) and {"AR1", "AR10", "AR100"} <= set(plain)
    assert few["AR3"] < plain["AR100"]
    sized = json.loads(run(*options, "--min-size", 32, "--max-size", 64, "--precision", "bf16"))
    assert sized["AR100"] != plain["AR100"]


def test_bench_tells_what_it_timed(weights):
    facts = json.loads(run("bench", "--weights", weights, "--height", 64, "--width", 96, "--batch", 2, "--seconds", 0,
                           "--device", "cpu", "--precision", "bf16", "--json"))  # fmt: skip
    assert (facts["images"], facts["device"], facts["precision"]) == (2, "cpu", "bf16")
    assert "r51" in run("bench", "--model", "r51", "--seconds", 0, status=1)


def test_export_leaves_out_low_scores(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []

    def write(detector, out, to, precision, raw, dynamic):
        asked.append((detector.score_threshold, to, precision, raw, dynamic, detector.model.data_preprocessor.min_size))
        raise ValueError("that is all")

    monkeypatch.setattr("fastrcnn.export.export", write)
    options = "--to", "onnx", "--precision", "fp16", "--raw", "--no-dynamic", "--score", 0.3, "--min-size", 48
    assert "that is all" in run("export", weights, *options, status=1)
    assert asked == [(0.3, "onnx", "fp16", True, False, 48)]
    assert "does not fit" in run("export", weights, "--model", "r50_fpn", status=1)


# --- serve


def test_serve_is_given_its_limits(weights, monkeypatch):
    pytest.importorskip("fastapi")
    given = {}

    def create(detector, max_batch, max_wait, queue, **limits):
        given.update(limits, max_batch=max_batch, max_wait=max_wait, queue=queue, score=detector.score_threshold,
                     precision=detector.precision, size=detector.model.data_preprocessor.min_size)  # fmt: skip

    monkeypatch.setattr("fastrcnn.serve.create_app", create)
    monkeypatch.setattr("fastrcnn.serve.serve", lambda app, listener, grace: given.update(grace=grace))
    limits = "--max-batch", 3, "--max-wait", 20, "--queue", 5, "--max-mb", 2, "--max-megapixels", 4, "--timeout", 8
    model = "--weights", weights, "--score", 0.2, "--device", "cpu", "--precision", "bf16", "--min-size", 48
    printed = run("serve", "--host", "127.0.0.1", "--port", 0, *limits, *model)
    assert "answers on cpu (bf16)" in printed
    assert given == dict(max_batch=3, max_wait=0.02, queue=5, max_bytes=2_000_000, max_pixels=4_000_000, timeout=8.0,
                         score=0.2, precision="bf16", size=48, grace=16.0)  # fmt: skip
