"""The training loop: one plain function from a model and a dataset to a trained model and a run's folder.

A step is a function of (seed, epoch, the pictures' indices) and of the state, and of nothing else; nothing in it waits for
the device. Losses stay there until a few steps are logged together, and a state is only saved behind such a look: what is
saved is finite.
"""

import contextlib
import dataclasses
import hashlib
import math
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from fastrcnn.data.batches import batches, steps_per_epoch
from fastrcnn.layers.sync_batch_norm import synchronise_norms
from fastrcnn.models.base_detector import BaseDetector, unwrapped
from fastrcnn.models.preprocess import resized_size
from fastrcnn.models.sampling import seeded
from fastrcnn.training import checkpoint, distributed
from fastrcnn.training.ema import average, averaged_copy
from fastrcnn.training.log import Log
from fastrcnn.training.pictures import training_transforms
from fastrcnn.training.recipe import Recipe, get_recipe
from fastrcnn.training.schedule import base_rate, build_optimizer, rate_factor, set_rate, total_steps
from fastrcnn.training.validate import check_data, finish, validate

LOOK = 10  # steps between two looks at the losses
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def seed_of(*numbers: int) -> int:
    """One number of 63 bits from several."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "little") >> 1


class Losses(nn.Module):
    """A detector's losses of a batch, as one module that can be made parallel."""

    def __init__(self, model: BaseDetector):
        super().__init__()
        self.model = model

    def forward(self, images: Sequence[Tensor], sizes, targets: Sequence[dict]) -> dict[str, Tensor]:
        """images, and targets with labels from 0 and boxes in their pixels, on the model's device; sizes: see `prepare`."""
        batch, frame = self.model.prepare(images, sizes)
        return self.model.losses(batch, frame._replace(factors=None), frame.scale(targets))


@dataclass
class State:
    """What a run has beside its recipe: everything that a checkpoint holds."""

    model: nn.Module
    mean: nn.Module | None  # the weights' moving average
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0  # of the optimizer
    epoch: int = 0
    batch: int = 0  # of the epoch, that have been taken
    sums: dict = field(default_factory=dict)  # of the epoch's losses so far, and how many batches
    rows: list = field(default_factory=list)  # of the epochs that are done
    best: float = -math.inf
    stale: int = 0  # epochs since the best
    skipped: dict = field(default_factory=dict)

    @property
    def result(self) -> nn.Module:
        return self.model if self.mean is None else self.mean

    def content(self, identity: dict) -> dict:
        parts = ("model", "mean", "optimizer", "scaler")
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in parts}
        tensors = {k: getattr(self, k).state_dict() for k in parts if getattr(self, k) is not None}
        return dict(identity=identity, random=checkpoint.random_state(), **tensors, **plain)

    def take(self, content: dict) -> None:
        for name, value in content.items():
            if name in ("model", "mean", "optimizer", "scaler"):
                getattr(self, name).load_state_dict(value)
            elif name not in ("identity", "random"):
                setattr(self, name, value)
        checkpoint.set_random_state(content["random"])


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
        for part in filter(None, (body, model.neck)):
            part.compile()


def picture_sizes(model: BaseDetector, images: Sequence[Tensor], seeds: Sequence[int], recipe: Recipe):
    """(height, width) that each picture is resized to, by its own seed; None leaves it to the model."""
    if recipe.lsj is not None:  # the transforms have made them as large as they shall be
        return [tuple(x.shape[1:]) for x in images]
    if recipe.multi_scale is None:
        return None
    p, sizes = model.data_preprocessor, []
    for image, seed in zip(images, seeds):
        scale = random.Random(seed).uniform(*recipe.multi_scale)
        most = round(p.max_size * max(1.0, scale))
        sizes.append(resized_size(*image.shape[1:], round(p.min_size * scale), most, p.profile.resize))
    return sizes


@dataclass
class Look:
    """Losses of the steps since the last look, still on the device."""

    rows: list = field(default_factory=list)  # step, epoch, lr
    values: list = field(default_factory=list)  # [parts + norm of the gradients]
    indices: list = field(default_factory=list)
    names: list = field(default_factory=list)
    pictures: int = 0
    waited: float = 0.0
    begun: float = field(default_factory=time.perf_counter)


def train(
    model: nn.Module,
    dataset,
    recipe: str | Recipe = "finetune",
    out: str | Path | None = None,
    resume: bool = False,
    val=None,
    *,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    seed: int = 0,
    workers: int = 0,
    deterministic: bool = False,
    drop_empty: bool = False,
    patience: int | None = None,
    save_every: float = 300.0,
    keep: int = 2,
    tensorboard: bool = False,
    log: Callable[[str], None] = print,
) -> nn.Module:
    """Trains `model`, in place, and returns what it became, or with a recipe that averages the average, in eval mode.

    dataset, val: `fastrcnn.data.open_dataset`'s, or (image uint8 [3, H, W], target) pairs, targets being dicts boxes
    [N, 4] xyxy pixels, labels [N] counted from 0, optional ignore_boxes [R, 4]. recipe: a name of `RECIPES`, or one of your
    own; epochs, batch_size (pictures a process and step), lr (as it is, where the recipe's is scaled by the pictures of a
    step) and patience say otherwise. out: a folder for weights (best.safetensors, last.safetensors), states, log.jsonl,
    results.csv, config.json, metrics.json and the report; None writes nothing. resume: goes on from the newest state in
    `out`, or begins where there is none: the steps that follow are, on the CPU bit for bit, those of a run that was never
    stopped, with any number of workers. val: after each epoch its losses and AP are measured, the best AP is kept, and
    `patience` epochs without a better one end the run. save_every: seconds between two states (an epoch's end has one, as
    have SIGTERM and Ctrl-C), of which `keep` stay. deterministic: PyTorch's deterministic algorithms.
    Under torchrun every process trains on its share of each batch, as one process would on the whole.

    Every picture is read once before the first step. Raises ValueError for arguments, folders and data that no run can
    have, naming them; OSError where `out` cannot be written or another process trains in it; FloatingPointError at a loss
    that is not finite, naming step, losses and pictures, while the states of before are kept; torch.OutOfMemoryError that
    says what to lower. The same seed gives the same weights on the same machine with the same number of threads.
    """
    recipe = get_recipe(recipe, epochs=epochs, batch_size=batch_size, patience=patience)
    if lr is not None:
        get_recipe(recipe, lr=lr)  # checks it
    device = next(model.parameters()).device
    with contextlib.ExitStack() as stack:
        rank, world = stack.enter_context(distributed.process_group(device))
        say = log if rank == 0 else lambda line: None
        if out is not None:
            out = checkpoint.check_out(out, resume or rank > 0)
            distributed.wait(world)  # nobody writes before everybody has looked
            if rank == 0:
                stack.enter_context(checkpoint.locked(out))
        inner = unwrapped(model)
        check_data(inner, dataset, val, drop_empty, world, say)
        if deterministic:
            stack.enter_context(_deterministic())
        run = _Run(inner, dataset, val, recipe, out, lr, seed, workers, drop_empty, rank, world, device, say)
        stop = stack.enter_context(checkpoint.stopping() if out is not None else contextlib.nullcontext(checkpoint.Stop()))
        return run.train(resume, stop, save_every, keep, tensorboard, deterministic)


@contextlib.contextmanager
def _deterministic():
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
