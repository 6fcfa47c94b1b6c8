"""Parameters and multiply-adds, against sums by hand and against what the peers publish."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import detection

from fastrcnn import zoo
from fastrcnn.weights.named import named_model
from fastrcnn.zoo.complexity import catalogue, complexity
from fastrcnn.zoo.published import PUBLISHED
from fastrcnn.zoo.recipes import NAMES, RPNS


def on_meta(name: str, num_classes: int = 80, profile: str | None = None, **overrides):
    with torch.device("meta"):
        return named_model(name, num_classes, profile, **overrides)


def test_a_small_model_by_hand():
    model = on_meta(
        "r18_fpn",
        3,
        backbone=dict(base_channels=8),
        neck=dict(in_channels=[8, 16, 32, 64], out_channels=16),
        rpn_head=dict(in_channels=16, feat_channels=16),
        roi_head=dict(bbox_roi_extractor=dict(out_channels=16), bbox_head=dict(in_channels=16, fc_out_channels=32)),
    )
    areas = [16 * 32, 8 * 16, 4 * 8, 2 * 4, 1 * 2]  # of a 64 x 128 image at strides 4 to 64
    stem = 4 * areas[0] * 8 * 3 * 49
    stages = areas[0] * 4 * 9 * 8 * 8
    for area, c in zip(areas[1:], (16, 32, 64)):
        stages += area * (9 * c * c // 2 + 3 * 9 * c * c + c * c // 2)  # the last is the shortcut's projection
    neck = sum(area * (c * 16 + 9 * 16 * 16) for area, c in zip(areas, (8, 16, 32, 64)))
    rpn = sum(areas) * (9 * 16 * 16 + 16 * 3 + 16 * 12)
    box_head = 1000 * (16 * 49 * 32 + 32 * 32 + 32 * 4 + 32 * 12)
    assert complexity(model, 64, 128)["flops"] == stem + stages + neck + rpn + box_head


@pytest.mark.parametrize("name, gflops, millions", [("r50_fpn", 207.07, 41.53), ("retinanet_r50_fpn", 239.32, 37.74)])
def test_mmdetections_numbers(name, gflops, millions):
    """Of 1280 x 800 pixels. Biases, norms, activations and pooling make up the difference in operations, the frozen layers
    that in parameters."""
    model = on_meta(name)
    counted = complexity(model)
    assert 0.995 < counted["flops"] / 1e9 / gflops < 1
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert (counted["parameters"] - frozen) / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize(
    "name, weights",
    [
        ("r50_fpn", detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1),
        ("r50_fpn_v2", detection.FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1),
    ],
)
def test_torchvisions_numbers(name, weights):
    """They are of 800 x 800 pixels; the background's box deltas, which torchvision computes, are left out here."""
    counted = complexity(on_meta(name, 90, "torchvision"), 800, 800)
    background = 1000 * 1024 * 4
    assert (counted["flops"] + background) / 1e9 == pytest.approx(weights.meta["_ops"], abs=1e-3)


def test_the_second_stage_of_c4_runs_on_every_proposal():
    """The last stage of a ResNet-50 on 1000 RoIs of 14 x 14, whose stride is in its first convolution."""
    model = on_meta("r50_c4")
    stage = 1024 * 512 + 9 * 512 * 512 + 512 * 2048 + 1024 * 2048 + 2 * (2048 * 512 + 9 * 512 * 512 + 512 * 2048)
    outputs = 2048 * (81 + 320)
    whole = complexity(model)["flops"]
    model.roi_head = nn.Module()
    model.roi_head.bbox_roi_extractor, model.roi_head.forward = nn.Identity(), lambda feats, rois: None
    assert whole - complexity(model)["flops"] == 1000 * (49 * stage + outputs)


class OneStage(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.neck = nn.Conv2d(3, 4, 3, stride=2, padding=1), None
        self.bbox_head = nn.Sequential(nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5))


def test_a_one_stage_detector():
    assert complexity(OneStage(), 8, 16) == dict(parameters=112 + 25 + 10, flops=32 * (27 * 4 + 4 * 5))


def test_the_model_is_left_as_it_is():
    model = OneStage().train()
    model.bbox_head[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    complexity(model)
    assert model.training and not model.bbox_head[1].training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    complexity(model.train())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_training_model_counts_the_same():
    assert complexity(on_meta("r50_fpn").train(), 256, 256) == complexity(on_meta("r50_fpn").eval(), 256, 256)
    assert complexity(on_meta("r50_fpn").half(), 256, 256) == complexity(on_meta("r50_fpn"), 256, 256)


@pytest.mark.parametrize("name", NAMES)
def test_every_name(name):
    model = on_meta(name)
    with torch.device("meta"):  # a default device of the caller's changes nothing
        counted = complexity(model)
    assert counted["parameters"] > 10e6 and counted["flops"] > 100e9


STORED = json.loads((Path(zoo.__file__).parent.parent / "assets" / "models.json").read_text("utf-8"))


def test_what_fastrcnn_models_prints_is_what_the_tables_say():
    """Names, variants and published checkpoints of all; `python -m fastrcnn.zoo.complexity` writes the file again."""
    facts = "name", "profile", "metric", "ap", "licence", "licence_of", "address"
    expected = {}
    for name in (*NAMES, *RPNS):
        rows = sorted((p for p in PUBLISHED if p.model == name), key=lambda p: -p.ap)
        for variant in dict.fromkeys(["-", *(p.variant for p in rows)]):
            same = [{key: getattr(p, key) for key in facts} for p in rows if p.variant == variant]
            expected[name, "" if variant == "-" else variant] = same
    assert {(entry["model"], entry["variant"]): entry["published"] for entry in STORED} == expected


@pytest.mark.parametrize("name", ["r50_c4", "x101_64x4d_fpn", "rpn_r50_fpn", "retinanet_r18_fpn"])
def test_the_stored_numbers_are_counted(name):
    assert [entry for entry in STORED if entry["model"] == name][:1] == list(itertools.islice(catalogue(name), 1))
