"""What somebody brings who comes from another tool, and what one mistypes: it works, or one line says what to do."""

import json
from pathlib import Path

import pytest
import torch
import torchvision.models.detection as theirs
from conftest import tiny_model
from PIL import Image
from test_cli import run
from test_cli_face import process
from torch import nn
from torchvision.ops.misc import Conv2dNormActivation
from typer.testing import CliRunner

from fastrcnn import Detector
from fastrcnn.checkpoints import fetch as fetching
from fastrcnn.checkpoints.checkpoint import load_checkpoint
from fastrcnn.cli import app
from fastrcnn.cli.words import in_options
from fastrcnn.data.rendered_cells import render_cells
from fastrcnn.models import from_mmdet_config
from fastrcnn.weights import infer_model, save

CONFIG = """
model = dict(
    type='FasterRCNN',
    backbone=dict(type='ResNet', depth=18, base_channels=8, num_stages=4, out_indices=(0, 1, 2, 3)),
    neck=dict(type='FPN', in_channels=[8, 16, 32, 64], out_channels=16, num_outs=5),
    rpn_head=dict(type='RPNHead', in_channels=16, feat_channels=16),
    roi_head=dict(
        type='StandardRoIHead',
        bbox_roi_extractor=dict(
            type='SingleRoIExtractor', roi_layer=dict(type='RoIAlign', output_size=7, sampling_ratio=0),
            out_channels=16, featmap_strides=[4, 8, 16, 32]),
        bbox_head=dict(type='Shared2FCBBoxHead', in_channels=16, fc_out_channels=32, num_classes=3)))
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a picture, weights, and no annotations; no way to the network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("urllib.request.OpenerDirector.open", lambda *a, **k: pytest.fail("it went to the network"))
    Image.fromarray(render_cells(1, 96, 128)[0]).save("a.jpg")
    model = tiny_model(min_size=96, max_size=128)
    model.class_names = ["red", "white", "platelet"]
    save(model, "tiny.safetensors")
    return tmp_path


def only_line(*arguments) -> str:
    lines = [line for line in run(*arguments, status=1).splitlines() if line.strip()]
    assert len(lines) == 1, lines
    return lines[0]


# --- checkpoints


def test_a_mask_rcnns_checkpoint_gives_its_boxes():
    torch.manual_seed(0)
    small = dict(weights=None, weights_backbone=None, num_classes=4, min_size=64, max_size=96, box_score_thresh=0.0)
    model = theirs.maskrcnn_resnet50_fpn(**small).eval()
    with pytest.warns(UserWarning, match="masks or keypoints are left out"):
        ours = infer_model(model.state_dict(), min_size=64, max_size=96, test_cfg=dict(rcnn=dict(score_thr=0.0)))
    picture = torch.rand(3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        found, wanted = ours.double()([picture])[0], model.double()([picture])[0]
    assert len(wanted["boxes"]) > 10 and torch.equal(found["labels"], wanted["labels"])
    torch.testing.assert_close(found["boxes"], wanted["boxes"], rtol=0, atol=1e-6)


MOBILE = "backbone.body.0.0.weight", "rpn.head.cls_logits.weight", "roi_heads.box_predictor.cls_score.weight"
FCOS = (
    "backbone.body.conv1.weight",
    "head.classification_head.cls_logits.weight",
    "head.regression_head.bbox_ctrness.weight",
)


@pytest.mark.parametrize(
    "keys, told",
    [
        (("conv1.weight", "layer1.0.conv1.weight", "fc.weight"), "an image classifier"),
        (MOBILE, r"torchvision's whose kind or body is not supported \(FCOS, SSD, MobileNet\)"),
        (FCOS, "torchvision's whose kind or body is not supported"),
        (("backbone.features.0.weight", "head.classification_head.module_list.0.weight"), "kind or body"),
        (("encoder.weight",), "not a Faster R-CNN or RetinaNet"),
    ],
)
def test_what_is_no_detector_of_the_peers_is_told(keys, told):
    with pytest.raises(ValueError, match=told):
        load_checkpoint({key: torch.zeros(2, 2) for key in keys})


def test_a_whole_model_is_refused_with_the_line_that_saves_its_weights(place):
    torch.save(nn.Sequential(nn.Linear(1, 1)), "whole.pth")
    told = only_line("detect", "a.jpg", "--weights", "whole.pth")
    assert "a whole model" in told and "torch.save(model.state_dict(), path)" in told


def test_what_is_no_weights_is_told(place):
    (place / "notes.json").write_text('{"images": []}')
    (place / "run").mkdir()
    (place / "run" / "best.safetensors").touch()
    for weights, told in (("a.jpg", "a picture"), ("notes.json", "a text"), ("run", "it has best.safetensors")):
        assert told in only_line("detect", "a.jpg", "--weights", weights)
        assert told in only_line("bench", "a.jpg", "--weights", weights)


def test_detectron2s_short_addresses(tmp_path, monkeypatch):
    asked = []

    def download(address, file):
        asked.append(address)
        file.write(b"x")

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(fetching, "_download", download)
    fetching.fetch("detectron2://ImageNetPretrained/MSRA/R-50.pkl")
    assert asked == ["https://dl.fbaipublicfiles.com/detectron2/ImageNetPretrained/MSRA/R-50.pkl"]


def test_a_config_and_its_checkpoint_make_a_detector(place):
    """As `init_detector(config, checkpoint)`; the keys alone do not tell a ResNet of eight channels from none."""
    (place / "mine.py").write_text(CONFIG)
    torch.save(dict(state_dict=from_mmdet_config("mine.py").state_dict(), meta={}), "mine.pth")
    found = Detector("mine.py", "mine.pth", device="cpu", score_threshold=0.0)("a.jpg")[0]
    assert len(found) > 0 and set(found.names) <= {"class 0", "class 1", "class 2"}
    printed = run("detect", "a.jpg", "--model", "mine.py", "--weights", "mine.pth", "--out", "o", "--score", 0)
    assert "1 of 1 images" in printed
    (place / "theirs.yaml").write_text("MODEL: {}")
    assert "Detectron2's are not read" in only_line("detect", "a.jpg", "--model", "theirs.yaml", "--weights", "m.pth")


def test_a_peers_module_is_told_to_give_its_state_dict():
    with pytest.raises(TypeError, match=r"torchvision\.ops\.misc.*hand over its state_dict"):
        Detector(Conv2dNormActivation(3, 3))


# --- sizes


def test_the_sizes_of_pictures_may_be_others_than_the_models(place):
    model = infer_model("tiny.safetensors")
    detector = Detector(model, min_size=64, max_size=80)
    assert detector.model.prepare([torch.zeros(3, 96, 128, dtype=torch.uint8)])[1].sizes.tolist() == [[60, 80]]
    assert model.data_preprocessor.min_size == 96  # the caller's keeps its own
    for bad in (0, 6.5, "64"):
        with pytest.raises(ValueError, match="min_size: expected a whole number of pixels above 0"):
            Detector(model, min_size=bad)
    options = "--weights", "tiny.safetensors", "--score", 0, "--no-pictures"
    run("detect", "a.jpg", *options, "--out", "one")
    run("detect", "a.jpg", *options, "--out", "two", "--min-size", 64, "--max-size", 80)
    one, two = (json.loads(Path(out, "detections.json").read_text())["annotations"] for out in ("one", "two"))
    wanted = Detector("tiny.safetensors", score_threshold=0.0, min_size=64, max_size=80)("a.jpg")[0].to_coco(1)
    assert [row["bbox"] for row in two] == [row["bbox"] for row in wanted] != [row["bbox"] for row in one]


def test_bench_and_export_take_sizes(place):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    facts = run("bench", "a.jpg", "--weights", "tiny.safetensors", "--seconds", 0, "--min-size", 32, "--json")
    assert json.loads(facts)["images"] == 1
    run("export", "tiny.safetensors", "--out", "m.onnx", "--no-dynamic", "--min-size", 64, "--max-size", 96)
    import onnx

    shape = onnx.load("m.onnx").graph.input[0].type.tensor_type.shape
    assert [d.dim_value for d in shape.dim] == [1, 3, 64, 96]


# --- words


@pytest.mark.parametrize(
    "words, said",
    [
        (
            "predict source=a.jpg conf=0.25 imgsz=640 save_txt save_crop=True",
            "predict a.jpg --score 0.25 --min-size 640 --max-size 640 --format yolo,crops",
        ),
        ("train data=d.yaml model=m.pt epochs=3", "train d.yaml --weights m.pt --epochs 3"),
        ("val model=m.pt data=d.yaml", "val d.yaml --weights m.pt"),
        ("export model=m.pt format=onnx", "export m.pt --to onnx"),
        ("detect a.jpg --weights x=y.pth", None),
        ("detect conf", None),
    ],
)
def test_another_tools_words_are_said_as_options(words, said):
    found = in_options(words.split())
    assert (None if found is None else " ".join(found)) == said


def test_the_command_says_them():
    printed = CliRunner().invoke(app, ["predict", "source=a b.jpg", "conf=0.25"])
    assert printed.exit_code == 2 and "perhaps: fastrcnn predict 'a b.jpg' --score 0.25" in printed.output


# --- slips


def test_what_is_not_there_is_told_before_weights_are_fetched(place):
    assert "nosuch.jpg, none: no such file or folder" in only_line("detect", "nosuch.jpg", "none")
    assert "0: no such file or folder; the first camera is camera:0" in only_line("detect", 0)
    (place / "m.py").touch()
    for misplaced in ("tiny.safetensors", "m.py"):
        assert f"{misplaced}: no picture. Weights are given by --weights" in only_line("detect", "a.jpg", misplaced)
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [("train",), ("eval", "--weights", "w.pth"), ("data", "check"), ("data", "convert", "--to", "yolo", "--out", "o")],
    ids=lambda words: words[0],
)
def test_data_that_is_not_there_or_has_no_annotations(place, arguments):
    (place / "nodata").mkdir()
    Image.open("a.jpg").save("nodata/a.jpg")
    assert "nosuch: No such file or directory" in only_line(*arguments, "nosuch")
    assert "nodata: no annotations found: expected a COCO file" in only_line(*arguments, "nodata")
    assert "a.jpg: not JSON: its bytes are no text" in only_line(*arguments, "a.jpg")


@pytest.mark.parametrize("option", [("--patience", 0), ("--workers", -1), ("--min-size", 0)])
def test_numbers_that_no_run_can_have_are_told_at_once(place, option):
    printed = run("train", "nowhere", *option, status=2)
    assert option[0] in printed and not (place / "runs").exists()


def test_a_warning_is_one_line_in_a_terminal(place):
    torch.save(
        dict(state_dict=infer_model("tiny.safetensors").state_dict() | {"roi_head.mask_head.x": torch.zeros(1)}),
        "m.pth",
    )
    done = process(
        "fastrcnn", "detect", str(place / "a.jpg"), "--weights", str(place / "m.pth"), "--out", str(place / "o")
    )
    assert done.stderr.splitlines()[0] == (
        f"fastrcnn: {place / 'm.pth'}: its layers for masks or keypoints are left out: it finds boxes"
    )
