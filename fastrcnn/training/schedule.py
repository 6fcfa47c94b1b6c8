"""The learning rate of a step, as a plain function, and the parameters in groups."""

import math
import re
import warnings
from typing import Any

import torch
from torch import nn

from fastrcnn.training.recipe import Recipe


def base_rate(recipe: Recipe, pictures: int, lr: float | None = None) -> float:
    """The full rate of a run with so many pictures a step in all: `lr` as it is where it is said, else the recipe's, which
    grows with their number as SGD's does (Goyal et al., 2017), or with its root as Adam's does (Malladi et al., 2022).
    Warns of a rate for AdamW that can only be meant for SGD."""
    share = pictures / recipe.base_batch
    own = recipe.lr * (share if recipe.scaling == "linear" else math.sqrt(share))
    if lr is not None and recipe.optimizer == "AdamW" and lr > 5 * own:
        warnings.warn(
            f"lr: {lr:g} is {lr / own:.0f} times what recipe {recipe.name} takes for AdamW ({own:.2g}), and is likely to "
            "end in nothing; rates of that size are for SGD (recipe 1x, 2x, 3x or tv)",
            stacklevel=2,
        )
    return own if lr is None else lr


def total_steps(recipe: Recipe, epoch_steps: int) -> int:
    """Of a run; whole epochs but where the recipe counts in steps."""
    if recipe.steps is not None:
        return recipe.steps
    return max(recipe.epochs, math.ceil((recipe.least_steps or 0) / epoch_steps)) * epoch_steps


def rate_factor(recipe: Recipe, step: int, epoch_steps: int) -> float:
    """What the full rate is multiplied by at `step`, counted from 0, where an epoch has `epoch_steps` of them."""
    total, warmup = total_steps(recipe, epoch_steps), recipe.warmup
    if recipe.warmup_epochs is not None:
        warmup = min(warmup, int(recipe.warmup_epochs * epoch_steps) - 1)
    if recipe.warmup_share is not None:
        warmup = min(warmup, round(recipe.warmup_share * total))
    warm = 1.0
    if step < warmup:
        warm = recipe.warmup_factor + (1 - recipe.warmup_factor) * step / warmup
    if recipe.schedule == "cosine":
        done = max(0, step - max(0, warmup)) / max(1, total - max(0, warmup))
        return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    unit = 1 if recipe.steps is not None else epoch_steps
    return warm * recipe.gamma ** sum(step >= round(m * unit) for m in recipe.milestones)


def _stage(name: str) -> int:
    """How many stages lie between a parameter and the heads: 0 in heads and neck, 5 in the stem of a backbone."""
    if not name.startswith("backbone."):
        return 0
    stage = re.match(r"backbone\.layer(\d)\.", name)
    return 5 - int(stage[1]) if stage else 5


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """The parameters that train, by weight decay and `scale` of the rate, each group in the order of the model."""
    norms = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)
    owners = {id(p): m for m in model.modules() for p in m.parameters(recurse=False)}
    fixed = recipe.fixed_norm_mult if getattr(getattr(model, "backbone", None), "norm_eval", False) else 1.0
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            decay = recipe.weight_decay
            if isinstance(owners[id(p)], norms):
                decay *= recipe.norm_decay
            elif name.endswith("bias"):
                decay *= recipe.bias_decay
            scale = recipe.layer_decay ** _stage(name) * (fixed if name.startswith("backbone.") else 1.0)
            groups.setdefault((decay, scale), []).append(p)
    return [dict(params=params, weight_decay=decay, scale=scale) for (decay, scale), params in groups.items()]


def build_optimizer(model: nn.Module, recipe: Recipe, lr: float) -> torch.optim.Optimizer:
    """SGD or AdamW. On CUDA fused: it looks at the scale of fp16's gradients on the device, where others wait for it. AdamW
    on the CPU, too: the other one reads its count of steps for every parameter. Not of shards, for which torch has no fused
    SGD."""
    groups = parameter_groups(model, recipe)
    devices = () if recipe.shard else ("cuda",) if recipe.optimizer == "SGD" else ("cuda", "cpu")
    fused = all(p.device.type in devices for g in groups for p in g["params"]) or None  # None: as torch thinks best
    if recipe.optimizer == "SGD":
        return torch.optim.SGD(groups, lr=lr, momentum=recipe.momentum, fused=fused)
    return torch.optim.AdamW(groups, lr=lr, fused=fused)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
