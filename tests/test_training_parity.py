"""Training step for step as torchvision, and as MMDetection's and Detectron2's formulas written down plainly: same weights,
pictures, samples, optimizer, clipping and schedule."""

import copy
import dataclasses
import json

import plain_training
import pytest
import torch
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from training_stubs import cells, tiny

from fastrcnn.data import open_dataset
from fastrcnn.data.batches import batches
from fastrcnn.models import sampling
from fastrcnn.training import Recipe, train
from fastrcnn.training.state import seed_everything
from fastrcnn.weights import infer_model, load_weights

RECIPE = Recipe("parity", batch_size=2, base_batch=2, lr=0.02, momentum=0.9, weight_decay=1e-3, warmup=3, warmup_factor=0.1,
                clip_norm=2.0, flip=0.0)  # fmt: skip
SIZES = dict(min_size=64, max_size=96)


@pytest.fixture
def first_come(monkeypatch):
    sample_the_first(monkeypatch)


def sample_the_first(monkeypatch) -> None:
    """Both sides sample the first boxes that fit, in place of random ones."""
    monkeypatch.setattr(torch, "randperm", lambda n, **options: torch.arange(n, device=options.get("device")))
    keys = lambda matches, front: torch.linspace(0, 0.9, matches.shape[1], dtype=torch.float64).expand(matches.shape)  # noqa: E731
    monkeypatch.setattr(sampling, "_random_keys", keys)


def optimizer_of(trained, milestones):
    """torch's own optimizer and schedules: warm-up by steps, drops by epochs."""
    r = RECIPE
    optimizer = torch.optim.SGD(trained, lr=r.lr, momentum=r.momentum, weight_decay=r.weight_decay)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, r.warmup_factor, total_iters=r.warmup)
    return optimizer, warm, torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, r.gamma)


def step(losses: dict, optimizer, trained, warm) -> dict:
    optimizer.zero_grad()
    sum(losses.values()).backward()
    norm = torch.nn.utils.clip_grad_norm_(trained, RECIPE.clip_norm)
    row = {**{k: v.item() for k, v in losses.items()}, "grad_norm": norm.item(), "lr": optimizer.param_groups[0]["lr"]}
    optimizer.step()
    warm.step()
    return row


def theirs(data, epochs: int, milestones, body: str, pixels, samples: int) -> tuple[dict, list[dict]]:
    """(weights at the start, losses of each step) of torchvision's model in torchvision's loop. pixels(images) makes the
    batch, which the model then takes as it is, in place of torchvision's transform, whose float64 ours has not."""
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(backbone_name=body, weights=None, trainable_layers=3)
    model = FasterRCNN(backbone, box_head=TwoMLPHead(256 * 49, 32), box_predictor=FastRCNNPredictor(32, 4),
                       box_batch_size_per_image=samples, **SIZES)  # fmt: skip
    model = model.double().train()
    if pixels is not None:
        model.transform.image_mean, model.transform.image_std = [0.0] * 3, [1.0] * 3
    start = {k: v.clone() for k, v in model.state_dict().items()}
    r, trained = RECIPE, [p for p in model.parameters() if p.requires_grad]
    optimizer, warm, drops = optimizer_of(trained, milestones)
    rows = []
    for epoch in range(epochs):
        for images, targets, _ in batches(data, r.batch_size, seed=0, epoch=epoch):
            given = [dict(boxes=t["boxes"].double(), labels=t["labels"] + 1) for t in targets]
            losses = model([x.double() / 255 for x in images] if pixels is None else list(pixels(images)), given)
            rows.append(step(losses, optimizer, trained, warm))
        drops.step()
    return start, rows


def model_of(start, samples: int):
    head, stage = dict(bbox_head=dict(fc_out_channels=32)), dict(sampler=dict(num=samples))
    model = infer_model(start, **SIZES, roi_head=head, train_cfg=dict(rcnn=stage))
    return load_weights(model, start, norm_eps=1e-5)  # torchvision's frozen norms at the start of a training


def ours(model, data, epochs: int, milestones, out) -> list[dict]:
    recipe = dataclasses.replace(RECIPE, epochs=epochs, milestones=milestones)
    train(model, data, recipe, out, log=lambda line: None)
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def plain(model, data, epochs: int, milestones) -> list[dict]:
    """Losses of each step of a plain loop, with the losses of tests/plain_training.py. Trains the model."""
    r, trained = RECIPE, [p for p in model.parameters() if p.requires_grad]
    optimizer, *schedules = optimizer_of(trained, milestones)
    rows = []
    for epoch in range(epochs):
        for images, targets, _ in batches(data, r.batch_size, seed=0, epoch=epoch):
            losses = plain_training.losses(model, model.prepare(images)[0], targets, model.profile.name)
            rows.append(step(losses, optimizer, trained, schedules[0]))
        schedules[1].step()
    return rows


def differences(found: list[dict], expected: list[dict]) -> list[float]:
    """The largest relative difference of a step's losses, norm of the gradients, and rate."""
    assert len(found) == len(expected)
    return [max(abs(f[k] - e[k]) / max(abs(e[k]), 1e-9) for k in e) for f, e in zip(found, expected)]


def beside_torchvision(
    data, epochs: int, milestones, out, body: str = "resnet18", pixels=None, samples=512
) -> list[float]:
    """samples: of the second stage, a picture."""
    start, expected = theirs(data, epochs, milestones, body, pixels, samples)
    seed_everything(5)
    return differences(ours(model_of(start, samples).double(), data, epochs, milestones, out), expected)


def beside_the_plain_one(data, epochs: int, milestones, out, model) -> list[float]:
    expected = plain(copy.deepcopy(model).double().train(), data, epochs, milestones)
    return differences(ours(model.double(), data, epochs, milestones, out), expected)


def test_the_first_steps_are_torchvisions(first_come, tmp_path):
    data = open_dataset(cells(tmp_path, 3))
    found = beside_torchvision(data, 2, (1,), tmp_path / "run", samples=64)
    assert len(found) == 4 and max(found) < 1e-6, found


@pytest.mark.parametrize("profile", ["mmdet", "detectron2"])
def test_the_first_steps_are_those_of_the_formulas(first_come, tmp_path, profile):
    data = open_dataset(cells(tmp_path, 3))
    model = tiny(profile=profile, **SIZES)
    found = beside_the_plain_one(data, 2, (1,), tmp_path / "run", model)
    assert len(found) == 4 and max(found) < 1e-10, found
