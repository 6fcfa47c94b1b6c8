"""A plain training loop: SGD, linear warm-up, cosine decay, gradient clipping, an average of the weights."""

import copy
import math
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from fastrcnn.data import read_through


def _collate(batch):
    return tuple(zip(*batch))


def _learning_rate(step: int, total: int, warmup: int, base: float) -> float:
    if step < warmup:
        return base * (step + 1) / warmup
    return base * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


@torch.no_grad()
def _average(mean: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    """Exponential moving average, short-sighted at first so that the first steps are forgotten."""
    weight = 1 - min(decay, (1 + step) / (10 + step))
    for a, b in zip(mean.state_dict().values(), model.state_dict().values()):
        if a.dtype.is_floating_point:
            a.lerp_(b, weight)
        else:
            a.copy_(b)


def _check(model: nn.Module, dataset: Dataset, epochs: int, batch_size: int, lr: float, log) -> None:
    """Raises ValueError for whatever would end the run later."""
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}: expected a whole number from 1 up, got {value}")
    if not 0 < lr < math.inf:
        raise ValueError(f"lr: expected a number above 0, got {lr}")
    if batch_size > len(dataset):
        raise ValueError(f"batch_size: {batch_size} is more than the {len(dataset)} images of the dataset")
    counts = read_through(dataset)
    if not counts:
        raise ValueError(f"dataset: no object is annotated on its {len(dataset)} images, or all were left out")
    unknown = [label for label in counts if not 0 <= label < model.num_classes] if model.reads_labels else ()
    if unknown:
        raise ValueError(f"dataset: expected labels in 0..{model.num_classes - 1}, got {sorted(unknown)}")
    log(f"{len(dataset)} images, {sum(counts.values())} objects")


def train(
    model: nn.Module,
    dataset: Dataset,
    epochs: int,
    batch_size: int = 4,
    lr: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    warmup: int = 100,
    clip_norm: float = 10.0,
    ema_decay: float = 0.998,
    workers: int = 0,
    seed: int = 0,
    log: Callable[[str], None] = print,
    keep: Callable[[nn.Module], None] = lambda mean: None,
) -> nn.Module:
    """Trains `model` in place on (image uint8 [3, H, W], target) pairs and returns the averaged model in eval mode.

    Targets are dicts boxes [N, 4], labels [N] counted from 0, optional ignore_boxes [R, 4]. `log` gets a line and `keep`
    the averaged model after every epoch. Every item is read once before the first step: raises ValueError for what
    cannot be read, where there is no object at all or a label that the model does not have, and for arguments out of range.
    Stops with FloatingPointError at a loss that is not finite, naming the step and the losses.

    The same seed gives the same weights on the same machine with the same number of threads: convolutions sum in an order
    that depends on them.
    """
    _check(model, dataset, epochs, batch_size, lr, log)
    torch.manual_seed(seed)
    model.train()
    device = next(model.parameters()).device
    mean = copy.deepcopy(model).eval()
    # Norms and biases are not pulled towards zero.
    decayed = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    free = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    groups = [dict(params=decayed, weight_decay=weight_decay), dict(params=free, weight_decay=0.0)]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum)
    loader = DataLoader(dataset, batch_size, shuffle=True, drop_last=True, num_workers=workers, collate_fn=_collate)
    total = epochs * len(loader)
    step, start = 0, time.perf_counter()
    for epoch in range(epochs):
        sums: dict[str, float] = {}
        for images, targets in loader:
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(step, total, warmup, lr)
            losses = model([image.to(device) for image in images], model.outside(targets))
            loss = sum(losses.values())
            if not torch.isfinite(loss):
                raise FloatingPointError(f"step {step}: the loss is {loss.item()}, from "
                                         f"{ {k: round(v.item(), 4) for k, v in losses.items()} }")  # fmt: skip
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(decayed + free, clip_norm)
            optimizer.step()
            _average(mean, model, step, ema_decay)
            step += 1
            for k, v in losses.items():
                sums[k] = sums.get(k, 0.0) + v.item()
        parts = "  ".join(f"{k} {v / len(loader):.3f}" for k, v in sums.items())
        log(f"epoch {epoch + 1}/{epochs}  {parts}  {time.perf_counter() - start:.0f} s")
        keep(mean)
    return mean
