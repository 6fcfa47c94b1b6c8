"""Losses with MMDetection's names, arguments and reductions: sum over elements, times weight, over avg_factor.

Box losses compare deltas (L1, smooth L1, balanced L1) or, with reg_decoded_bbox, boxes in pixels (the IoU family).
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastrcnn.models.build import build
from fastrcnn.ops._checks import coordinates

EPS = torch.finfo(torch.float32).eps  # MMDetection adds it to every avg_factor


def positive_weight(positive: Tensor, pos_weight: float) -> Tensor:
    """Weights [N] of MMDetection's `pos_weight`: that much for positives where it is above 0, 1 for the rest."""
    return torch.where(positive, float(pos_weight) if pos_weight > 0 else 1.0, 1.0)


def processes() -> int:
    """How many processes train one model together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def avg_factor(count: Tensor, least: float, training: bool) -> Tensor:
    """What a sum over this process's samples is divided by, so that the mean of all processes' losses is the loss of their
    joined batch: the count of all of them, at least `least`, over their number. Outside of training, `count` alone."""
    count = count.float()
    if training and processes() > 1:
        dist.all_reduce(count)
        return count.clamp(min=least) / processes()
    return count.clamp(min=least)


def _one_hot(target: Tensor, columns: int) -> Tensor:
    """bool [N, columns]; F.one_hot waits for the device to look at the target."""
    return target[:, None] == torch.arange(columns, device=target.device)


def _weighted(elements: Tensor, weight: Tensor | None, loss_weight: float, avg_factor: float | Tensor) -> Tensor:
    if weight is not None:
        elements = elements * weight.view(-1, *[1] * (elements.dim() - 1))
    return loss_weight * elements.sum() / (avg_factor + EPS)


class CrossEntropyLoss(nn.Module):
    """Softmax over classes, or with use_sigmoid one sigmoid for each column.

    class_weight: one weight a class, the background last, and with use_sigmoid one a column, for its positives; the
    weighted sum is still divided by avg_factor.
    """

    def __init__(self, use_sigmoid: bool = False, class_weight: list[float] | None = None, loss_weight: float = 1.0):
        super().__init__()
        self.use_sigmoid, self.class_weight, self.loss_weight = use_sigmoid, class_weight, loss_weight

    def elements(self, pred: Tensor, target: Tensor) -> Tensor:
        """The loss [N] of each row from pred [N, C] logits and target [N] int64; with use_sigmoid [N, C] of each column
        against the one-hot target, or [N] from pred [N] and the foreground indicator [N], as an RPN has them."""
        pred = coordinates(pred)
        weight = None if self.class_weight is None else pred.new_tensor(self.class_weight)
        if not self.use_sigmoid:
            return F.cross_entropy(pred, target, weight, reduction="none")
        one_hot = target if pred.dim() == 1 else _one_hot(target, pred.shape[1])
        return F.binary_cross_entropy_with_logits(pred, one_hot.to(pred), reduction="none", pos_weight=weight)

    def forward(self, pred: Tensor, target: Tensor, avg_factor: float, weight: Tensor | None = None) -> Tensor:
        """weight [N]: of each row, none for 1."""
        return _weighted(self.elements(pred, target), weight, self.loss_weight, avg_factor)


class FocalLoss(nn.Module):
    """Sigmoid focal loss (Lin et al., 2017): -alpha_t (1 - p_t)^gamma log p_t over all classes."""

    use_sigmoid = True

    def __init__(
        self, use_sigmoid: bool = True, gamma: float = 2.0, alpha: float = 0.25, loss_weight: float = 1.0
    ):  # fmt: skip
        super().__init__()
        if not use_sigmoid:
            raise ValueError("FocalLoss: use_sigmoid must be True")
        self.gamma, self.alpha, self.loss_weight = gamma, alpha, loss_weight

    def elements(self, pred: Tensor, target: Tensor) -> Tensor:
        """[N, C] from pred [N, C] logits and target [N] int64, C standing for background; or [N] from pred [N] and the
        foreground indicator [N], as an RPN has them."""
        pred = coordinates(pred)
        one_hot = target if pred.dim() == 1 else _one_hot(target, pred.shape[1])
        one_hot = one_hot.to(pred.dtype)
        p = pred.sigmoid()
        miss = (1 - p) * one_hot + p * (1 - one_hot)
        weight = (self.alpha * one_hot + (1 - self.alpha) * (1 - one_hot)) * miss**self.gamma
        return F.binary_cross_entropy_with_logits(pred, one_hot, reduction="none") * weight

    def forward(self, pred: Tensor, target: Tensor, avg_factor: float, weight: Tensor | None = None) -> Tensor:
        """weight [N]: of each row, none for 1."""
        return _weighted(self.elements(pred, target), weight, self.loss_weight, avg_factor)


class _BoxLoss(nn.Module):
    """Sum of `elements(pred, target)` over everything, weighted and averaged. pred, target [N, 4]."""

    def __init__(self, loss_weight: float = 1.0):
        super().__init__()
        self.loss_weight = loss_weight

    def forward(self, pred: Tensor, target: Tensor, avg_factor: float | Tensor, weight: Tensor | None = None) -> Tensor:
        """weight [N]: of each row, none for 1."""
        return _weighted(self.elements(coordinates(pred), target), weight, self.loss_weight, avg_factor)


class L1Loss(_BoxLoss):
    def elements(self, pred: Tensor, target: Tensor) -> Tensor:
        return (pred - target).abs()


class SmoothL1Loss(_BoxLoss):
    """0.5 d^2 / beta below beta, d - 0.5 beta above."""

    def __init__(self, beta: float = 1.0, loss_weight: float = 1.0):
        super().__init__(loss_weight)
        self.beta = beta

    def elements(self, pred: Tensor, target: Tensor) -> Tensor:
        return F.smooth_l1_loss(pred, target, beta=self.beta, reduction="none")


class BalancedL1Loss(_BoxLoss):
    """Libra R-CNN (Pang et al., 2019), eq. 9: L1 whose gradient grows faster for small errors."""

    def __init__(self, alpha: float = 0.5, gamma: float = 1.5, beta: float = 1.0, loss_weight: float = 1.0):
        super().__init__(loss_weight)
        self.alpha, self.gamma, self.beta = alpha, gamma, beta

    def elements(self, pred: Tensor, target: Tensor) -> Tensor:
        d = (pred - target).abs()
        b = math.exp(self.gamma / self.alpha) - 1
        inside = self.alpha / b * (b * d + 1) * torch.log(b * d / self.beta + 1) - self.alpha * d
        return torch.where(d < self.beta, inside, self.gamma * d + self.gamma / b - self.alpha * self.beta)


def _overlaps(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection [N] and union [N] of boxes in pairs."""
    size = (torch.minimum(pred[:, 2:], target[:, 2:]) - torch.maximum(pred[:, :2], target[:, :2])).clamp(min=0)
    inter = size.prod(1)
    return inter, (pred[:, 2:] - pred[:, :2]).prod(1) + (target[:, 2:] - target[:, :2]).prod(1) - inter


def _hull(pred: Tensor, target: Tensor) -> Tensor:
    """Width and height [N, 2] of the smallest box around each pair."""
    return (torch.maximum(pred[:, 2:], target[:, 2:]) - torch.minimum(pred[:, :2], target[:, :2])).clamp(min=0)


class IoULoss(_BoxLoss):
    """-log IoU ("log"), 1 - IoU ("linear") or 1 - IoU^2 ("square"); UnitBox (Yu et al., 2016)."""

    def __init__(self, linear: bool = False, eps: float = 1e-6, mode: str = "log", loss_weight: float = 1.0):
        super().__init__(loss_weight)
        self.mode, self.eps = "linear" if linear else mode, eps
        if self.mode not in ("log", "linear", "square"):
            raise ValueError(f"mode: expected log, linear or square, got {mode!r}")

    def elements(self, pred: Tensor, target: Tensor) -> Tensor:
        inter, union = _overlaps(pred, target)
        iou = (inter / union.clamp(min=1e-6)).clamp(min=self.eps)
        return {"log": -iou.log(), "linear": 1 - iou, "square": 1 - iou**2}[self.mode]


class GIoULoss(_BoxLoss):
    """1 - IoU + (hull - union) / hull (Rezatofighi et al., 2019)."""

    def __init__(self, eps: float = 1e-6, loss_weight: float = 1.0):
        super().__init__(loss_weight)
        self.eps = eps

    def elements(self, pred: Tensor, target: Tensor) -> Tensor:
        inter, union = _overlaps(pred, target)
        union = union.clamp(min=self.eps)
        hull = _hull(pred, target).prod(1).clamp(min=self.eps)
        return 1 - (inter / union - (hull - union) / hull)


class DIoULoss(GIoULoss):
    """1 - IoU + squared distance of the centres over the squared diagonal of the hull (Zheng et al., 2020)."""

    def _terms(self, pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        inter, union = _overlaps(pred, target)
        diagonal = (_hull(pred, target) ** 2).sum(1) + self.eps
        apart = ((target[:, :2] + target[:, 2:] - pred[:, :2] - pred[:, 2:]) ** 2).sum(1) / 4
        return inter / (union + self.eps), apart / diagonal

    def elements(self, pred: Tensor, target: Tensor) -> Tensor:
        iou, distance = self._terms(pred, target)
        return 1 - (iou - distance)


class CIoULoss(DIoULoss):
    """DIoU with a term for the aspect ratio where the boxes overlap by more than half (Zheng et al., 2020)."""

    def elements(self, pred: Tensor, target: Tensor) -> Tensor:
        iou, distance = self._terms(pred, target)
        size, target_size = pred[:, 2:] - pred[:, :2], target[:, 2:] - target[:, :2]
        angle = torch.atan(target_size[:, 0] / (target_size[:, 1] + self.eps))
        v = 4 / math.pi**2 * (angle - torch.atan(size[:, 0] / (size[:, 1] + self.eps))) ** 2
        with torch.no_grad():
            alpha = (iou > 0.5) * v / (1 - iou + v)
        return 1 - (iou - (distance + alpha * v)).clamp(-1.0, 1.0)


class BoundedIoULoss(_BoxLoss):
    """Smooth L1 on upper bounds of the IoU, one for each coordinate (Tychsen-Smith & Petersson, 2018)."""

    def __init__(self, beta: float = 0.2, eps: float = 1e-3, loss_weight: float = 1.0):
        super().__init__(loss_weight)
        self.beta, self.eps = beta, eps

    def elements(self, pred: Tensor, target: Tensor) -> Tensor:
        size, goal = pred[:, 2:] - pred[:, :2], target[:, 2:] - target[:, :2]
        apart = ((target[:, :2] + target[:, 2:] - pred[:, :2] - pred[:, 2:]) * 0.5).abs() * 2
        shift = 1 - ((goal - apart) / (goal + apart + self.eps)).clamp(min=0)
        scale = 1 - torch.minimum(goal / (size + self.eps), size / (goal + self.eps))
        d = torch.cat([shift, scale], 1)
        return torch.where(d < self.beta, 0.5 * d * d / self.beta, d - 0.5 * self.beta)


LOSSES = {
    c.__name__: c
    for c in (
        CrossEntropyLoss, FocalLoss, L1Loss, SmoothL1Loss, BalancedL1Loss, IoULoss, GIoULoss, DIoULoss, CIoULoss,
        BoundedIoULoss,
    )
}  # fmt: skip


def build_loss(cfg: dict | nn.Module) -> nn.Module:
    """From MMDetection's dict(type="L1Loss", ...); a module is returned as it is."""
    if isinstance(cfg, nn.Module):
        return cfg
    options = dict(cfg)
    if options.pop("reduction", "mean") != "mean":
        raise ValueError(f"loss: expected reduction='mean', got {cfg}")
    return build(options, LOSSES, "loss")


def box_loss(
    head, deltas: Tensor, anchors: Tensor, boxes: Tensor, avg_factor, positive: Tensor | None = None
) -> Tensor:
    """The loss of a head with `bbox_coder`, `loss_bbox` and `reg_decoded_bbox`. deltas [P, 4] of the anchors [P, 4], boxes
    [P, 4] their ground truth; compared as deltas or boxes. positive [P]: the rows that count, None for all."""
    if positive is not None:  # rows that do not count compare a box with itself: what they hold may be no box at all
        rows, unit = positive[:, None], torch.arange(4, device=anchors.device) // 2  # xyxy 0, 0, 1, 1
        anchors, boxes = (torch.where(rows, x, unit.to(x.dtype)) for x in (anchors, boxes))
        deltas = torch.where(rows, deltas, 0.0)
    if head.reg_decoded_bbox:
        anchors = anchors.to(coordinates(deltas).dtype)
        return head.loss_bbox(head.bbox_coder.decode(anchors, deltas), boxes, avg_factor, positive)
    return head.loss_bbox(deltas, head.bbox_coder.encode(anchors, boxes), avg_factor, positive)
