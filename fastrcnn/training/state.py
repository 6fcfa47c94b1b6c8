"""What a run has: the model made ready, its losses as one module, and the state that is saved."""

import contextlib
import dataclasses
import hashlib
import math
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from fastrcnn.layers.sync_batch_norm import synchronise_norms
from fastrcnn.models.base_detector import BaseDetector
from fastrcnn.training import checkpoint, sharding
from fastrcnn.training.distributed import check_shards
from fastrcnn.training.ema import average
from fastrcnn.training.recipe import Recipe
from fastrcnn.training.schedule import set_rate

PARTS = ("model", "mean", "optimizer", "scaler")  # of a state, that have a state dict
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # of autocast


def seed_of(*numbers: int) -> int:
    """One number of 63 bits from several."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "little") >> 1


class Losses(nn.Module):
    """A detector's losses of a batch, as one module that can be made parallel. graphs: its parts are CUDA graphs."""

    def __init__(self, model: BaseDetector, graphs: bool = False):
        super().__init__()
        self.model, self.graphs = model, graphs

    def forward(self, images: Sequence[Tensor], targets: Sequence[dict], sizes, least) -> dict[str, Tensor]:
        """images, and targets with labels from 0 and boxes in their pixels, on the model's device; sizes and least: see
        `prepare`."""
        if self.graphs:  # what they gave is written over from here on; without a backward torch would guess otherwise
            torch.compiler.cudagraph_mark_step_begin()
        batch, frame = self.model.prepare(images, sizes, least)
        return self.model.losses(batch, frame._replace(factors=None), frame.scale(targets))


@dataclass
class State:
    """What a run has beside its recipe: everything that a checkpoint holds."""

    model: nn.Module
    mean: nn.Module | None  # the weights' moving average
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    sharded: bool = False  # whether their tensors are in shards (`sharding`)
    step: int = 0  # of the optimizer
    epoch: int = 0
    batch: int = 0  # of the epoch, that have been taken
    sums: dict = field(default_factory=dict)  # of the epoch's losses so far, and how many batches
    rows: list = field(default_factory=list)  # of the epochs that are done
    best: float = -math.inf
    stale: int = 0  # epochs since the best
    skipped: dict = field(default_factory=dict)

    def result(self) -> nn.Module:
        """The model as it would be kept now. All processes ask at once: of shards it is a whole copy."""
        kept = self.model if self.mean is None else self.mean
        return sharding.whole(kept) if self.sharded else kept

    def content(self, identity: dict) -> dict:
        """What is saved. All processes ask at once; of shards the first one alone has the tensors."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in (*PARTS, "sharded")}
        tensors = {k: getattr(self, k).state_dict() for k in PARTS if getattr(self, k) is not None}
        tensors = sharding.whole_state(tensors) if self.sharded else tensors
        return dict(identity=identity, random=checkpoint.random_state(), **tensors, **plain)

    def take(self, content: dict) -> None:
        for name, value in content.items():
            if self.sharded and name in ("model", "mean"):
                sharding.take_module(getattr(self, name), value)
            elif self.sharded and name == "optimizer":
                sharding.take_optimizer(self.optimizer, value)
            elif name in PARTS:
                getattr(self, name).load_state_dict(value)
            elif name not in ("identity", "random"):
                setattr(self, name, value)
        checkpoint.set_random_state(content["random"])

    def update(self, recipe: Recipe, rate: float) -> Tensor:
        """One step of the optimizer, from the gradients that there are. Returns their norm before it was clipped."""
        set_rate(self.optimizer, rate)
        self.scaler.unscale_(self.optimizer)
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(trained, math.inf if recipe.clip_norm is None else recipe.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.mean is not None:
            average(self.mean, self.model, self.step, recipe.ema)
        return norm.full_tensor() if self.sharded else norm


def check_machine(recipe: Recipe, device: torch.device, world: int) -> None:
    """Raises ValueError where a recipe wants what this machine, or this process alone, cannot do."""
    check_shards(recipe.shard, world)
    if recipe.graphs and device.type != "cuda":
        raise ValueError(f'compile: "reduce-overhead" records CUDA graphs, and the model is on {device}: expected True')


def adapt(model: BaseDetector, recipe: Recipe) -> None:
    """What a recipe says of the model itself, in place."""
    body = model.backbone
    if recipe.frozen_stages is not None and hasattr(body, "frozen_stages"):
        body.requires_grad_(True)
        body.frozen_stages = recipe.frozen_stages
        body.train()
    if recipe.sync_bn:
        body.norm_eval = False
        if hasattr(body, "train_norms"):
            body.train_norms(True)
        synchronise_norms(model)
    if recipe.with_cp:
        for m in body.modules():
            if hasattr(m, "with_cp"):
                m.with_cp = True
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)
    if recipe.compile:
        for part in model.children():
            if part is not model.data_preprocessor:
                part.compile(mode=recipe.compile if recipe.graphs else None)


def seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def description(model: BaseDetector) -> dict:
    """What a run says of its model, and what of it must be the same for the run to go on."""
    return dict(
        type=type(model).__name__, profile=getattr(getattr(model, "profile", None), "name", None),
        min_size=model.data_preprocessor.min_size, max_size=model.data_preprocessor.max_size,
        parameters=sum(p.numel() for p in model.parameters()),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
    )  # fmt: skip


def differences(before: dict, now: dict) -> str:
    """What is otherwise than it was, of a run's identity and of its recipe; empty where nothing is.

    A state may be older than a number of the recipe: it went by that number's default, which changes nothing.
    """
    unsaid = {f.name: f.default for f in dataclasses.fields(Recipe)}
    pairs = [(now, {**now, **before}), (now["recipe"], {**unsaid, **before["recipe"]})]
    changed = [(k, its[k], v) for mine, its in pairs for k, v in mine.items() if k != "recipe" and v != its[k]]
    return ", ".join(f"{k} {old!r}, now {new!r}" for k, old, new in changed)


@contextlib.contextmanager
def deterministic_algorithms():
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
