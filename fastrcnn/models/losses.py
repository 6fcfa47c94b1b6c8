"""Losses with MMDetection's names, arguments and reductions: sum over elements, times weight, over avg_factor."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = torch.finfo(torch.float32).eps  # MMDetection adds it to every avg_factor


class CrossEntropyLoss(nn.Module):
    """Softmax over classes, or sigmoid with use_sigmoid (then the target is the foreground indicator)."""

    def __init__(self, use_sigmoid: bool = False, loss_weight: float = 1.0):
        super().__init__()
        self.use_sigmoid, self.loss_weight = use_sigmoid, loss_weight

    def forward(self, pred: Tensor, target: Tensor, avg_factor: float) -> Tensor:
        """pred [N] and target [N] in 0..1 with use_sigmoid; else pred [N, C], target [N] int64."""
        if self.use_sigmoid:
            loss = F.binary_cross_entropy_with_logits(pred.float(), target.float(), reduction="sum")
        else:
            loss = F.cross_entropy(pred.float(), target, reduction="sum")
        return self.loss_weight * loss / (avg_factor + EPS)


class SmoothL1Loss(nn.Module):
    """0.5 d^2 / beta below beta, d - 0.5 beta above."""

    def __init__(self, beta: float = 1.0, loss_weight: float = 1.0):
        super().__init__()
        self.beta, self.loss_weight = beta, loss_weight

    def forward(self, pred: Tensor, target: Tensor, avg_factor: float) -> Tensor:
        loss = F.smooth_l1_loss(pred.float(), target, beta=self.beta, reduction="sum")
        return self.loss_weight * loss / (avg_factor + EPS)


class L1Loss(nn.Module):
    def __init__(self, loss_weight: float = 1.0):
        super().__init__()
        self.loss_weight = loss_weight

    def forward(self, pred: Tensor, target: Tensor, avg_factor: float) -> Tensor:
        return self.loss_weight * F.l1_loss(pred.float(), target, reduction="sum") / (avg_factor + EPS)


LOSSES = {"CrossEntropyLoss": CrossEntropyLoss, "SmoothL1Loss": SmoothL1Loss, "L1Loss": L1Loss}


def build_loss(cfg: dict | nn.Module) -> nn.Module:
    if isinstance(cfg, nn.Module):
        return cfg
    options = dict(cfg)
    kind = options.pop("type", None)
    if kind not in LOSSES:
        raise ValueError(f"loss: unknown type {kind!r}, expected one of {sorted(LOSSES)}")
    return LOSSES[kind](**options)
