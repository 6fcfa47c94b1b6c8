"""The moving average of a model's weights."""

import copy

import torch
from torch import nn


def averaged_copy(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode, which `average` moves along."""
    mean = copy.deepcopy(model).eval()
    return mean.requires_grad_(False)


@torch.no_grad()
def average(mean: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    """mean += (1 - decay) (model - mean) after the step number `step`, counted from 0; short-sighted at first, so that the
    first steps are forgotten. Statistics of norms are averaged, too; counters are copied. Nothing waits for the device."""
    weight = 1 - min(decay, (1 + step) / (10 + step))
    ours, theirs = [], []
    for a, b in zip(_tensors(mean), _tensors(model), strict=True):  # of shards each process has its own
        if a.dtype.is_floating_point:
            ours.append(a)
            theirs.append(b)
        else:
            a.copy_(b)
    torch._foreach_lerp_(ours, theirs, weight)


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*(p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()), *model.buffers()]
