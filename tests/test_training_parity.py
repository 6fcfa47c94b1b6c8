"""Training step for step as torchvision: same weights, pictures, samples, optimizer, clipping and schedule."""

import dataclasses
import json

import pytest
import torch
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from training_stubs import cells

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


def theirs(data, epochs: int, milestones, body: str = "resnet18") -> tuple[dict, list[dict]]:
    """(weights at the start, losses of each step) of torchvision's model in torchvision's loop."""
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(backbone_name=body, weights=None, trainable_layers=3)
    model = FasterRCNN(backbone, box_head=TwoMLPHead(256 * 49, 32), box_predictor=FastRCNNPredictor(32, 4), **SIZES)
    model = model.double().train()
    start = {k: v.clone() for k, v in model.state_dict().items()}
    r, trained = RECIPE, [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=r.lr, momentum=r.momentum, weight_decay=r.weight_decay)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, r.warmup_factor, total_iters=r.warmup)
    drops = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, r.gamma)
    rows = []
    for epoch in range(epochs):
        for images, targets, _ in batches(data, r.batch_size, seed=0, epoch=epoch):
            given = [dict(boxes=t["boxes"].double(), labels=t["labels"] + 1) for t in targets]
            losses = model([image.double() / 255 for image in images], given)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            norm = torch.nn.utils.clip_grad_norm_(trained, r.clip_norm)
            rows.append({**{k: v.item() for k, v in losses.items()}, "grad_norm": norm.item(),
                         "lr": optimizer.param_groups[0]["lr"]})  # fmt: skip
            optimizer.step()
            warm.step()
        drops.step()
    return start, rows


def ours(start, data, epochs: int, milestones, out) -> list[dict]:
    model = infer_model(start, **SIZES, roi_head=dict(bbox_head=dict(fc_out_channels=32)))
    load_weights(model, start, norm_eps=1e-5)  # torchvision's frozen norms at the start of a training
    recipe = dataclasses.replace(RECIPE, epochs=epochs, milestones=milestones)
    train(model.double(), data, recipe, out, log=lambda line: None)
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def worst(data, epochs: int, milestones, out, body: str = "resnet18") -> list[float]:
    """The largest relative difference of a step's losses, norm of the gradients, and rate."""
    start, expected = theirs(data, epochs, milestones, body)
    seed_everything(5)
    found = ours(start, data, epochs, milestones, out)
    assert len(found) == len(expected)
    return [max(abs(f[k] - e[k]) / max(abs(e[k]), 1e-9) for k in e) for f, e in zip(found, expected)]


def test_the_first_steps_are_torchvisions(first_come, tmp_path):
    data = open_dataset(cells(tmp_path, 5))
    differences = worst(data, 2, (1,), tmp_path / "run")
    assert len(differences) == 6 and max(differences) < 1e-6, differences
