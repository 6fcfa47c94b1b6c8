"""One small call of every operator, for the tests that all operators pass, and calls that must be refused."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from conftest import random_boxes
from torch import Tensor

from fastrcnn import ops


def spread_scores(*shape: int, seed: int = 1) -> Tensor:
    """Distinct, in (0, 1]."""
    n = torch.Size(shape).numel()
    return ((torch.randperm(n, generator=torch.Generator().manual_seed(seed)) + 1) / max(n, 1)).view(shape)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rois(n: int) -> Tensor:
    return torch.cat([torch.arange(n)[:, None] % 2, random_boxes(n, 64, 64, 40)], 1)


def ids(n: int) -> Tensor:
    return torch.arange(n) % 3


@dataclass(frozen=True)
class Case:
    """make(n): the arguments by name, with n boxes or RoIs. `grows`: the dimension that n is of each tensor. `typed`:
    tensors that take any floating dtype; the others stay as they are made. wrong: (arguments, error, name in it)."""

    make: Callable[[int], dict]
    typed: tuple[str, ...]
    grows: dict[str, int] = field(default_factory=dict)
    differentiable: tuple[str, ...] = ()
    exact: bool = True  # the reference's very bits; else within the rounding of the dtype
    wrong: tuple[tuple[dict, type, str], ...] = ()


def padded(n: int) -> dict:
    """Two images' boxes in groups, of which some rows count and at most 6 are kept."""
    return dict(
        boxes=random_boxes(2 * n, 150, 150).view(2, n, 4),
        scores=spread_scores(2, n),
        groups=ids(2 * n).view(2, n),
        max_output=6,
        counts=torch.tensor([10, 7]),
    )


def suppression(n: int) -> dict:
    return dict(boxes=random_boxes(n, 150, 150), scores=spread_scores(n))


def anchors_and_deltas(n: int) -> dict:
    return dict(anchors=random_boxes(n), deltas=random(n, 8), max_shape=torch.tensor([300.0, 400]), stds=[0.5] * 4)


def one_pyramid(n: int) -> dict:
    maps = [random(2, 8, 16 >> i, 20 >> i, seed=i) for i in range(3)]
    return dict(features=maps, rois=rois(n), output_size=(3, 2), strides=[4, 8, 16], finest_scale=5)


def rpn_maps(n: int) -> dict:
    shapes = [(3, n, 5), (3, 2, 3)]
    return dict(
        cls_logits=[spread_scores(2, *s) * 8 - 4 for s in shapes],
        bbox_deltas=[random(2, 4 * a, h, w) * 0.5 for a, h, w in shapes],
        base_anchors=[torch.tensor([[-8.0, -8, 8, 8], [-16, -8, 16, 8], [-8, -16, 8, 16]]) * k for k in (1, 2)],
        strides=[8, (16, 12)],
        image_sizes=torch.tensor([[40, 40], [30, 36]]),
        nms_pre=7,
        topk_on="logits",
    )


def ground_truth(n: int) -> dict:
    gts, regions = random_boxes(6, 200, 200, seed=1).view(2, 3, 4), random_boxes(4, 200, 200, seed=2).view(2, 2, 4)
    counts = dict(gt_counts=torch.tensor([3, 1]), ignore_counts=torch.tensor([0, 2]))
    return dict(boxes=random_boxes(n, 200, 200), gt_boxes=gts, ignore_boxes=regions, ignore_iof_thr=0.4, **counts)


def deformed(n: int) -> dict:
    tensors = dict(offset=random(n, 18, 6, 7), mask=random(n, 9, 6, 7, seed=2).sigmoid())
    return dict(input=random(n, 4, 6, 7), weight=random(4, 2, 3, 3, seed=1), bias=random(4), padding=1, **tensors)


def convolved(n: int) -> dict:
    norm = {f"bn_{k}": random(6, seed=i).abs() + 0.5 for i, k in enumerate(("weight", "bias", "mean", "var"))}
    return dict(input=random(n, 4, 6, 7), weight=random(6, 4, 3, 3), padding=1, residual=random(n, 6, 6, 7), **norm)


def pictures(n: int) -> dict:
    images = [(random(3, 9 + i, 11) * 99).abs().clamp(max=255).to(torch.uint8) for i in range(2)]
    return dict(images=images, sizes=[(12, 14), (13, 15)], batch_size=(16, 20), mean=(100, 90, 80), std=(50, 60, 70))


LAYERS = torch.zeros(2, 3, 8, 8)
CASES = {
    "nms": Case(
        lambda n: dict(suppression(n), iou_threshold=0.3),
        ("boxes", "scores"),
        dict(boxes=0, scores=0),
        wrong=(
            ({"boxes": torch.zeros(20, 5)}, ValueError, "boxes"),
            ({"boxes": torch.zeros(1, 20, 4)}, ValueError, "boxes"),
            ({"scores": torch.zeros(19)}, ValueError, "scores"),
            ({"scores": torch.zeros(20, 1)}, ValueError, "scores"),
            ({"iou_threshold": 1.1}, ValueError, "iou_threshold"),
            ({"iou_threshold": -0.1}, ValueError, "iou_threshold"),
        ),
    ),
    "batched_nms": Case(
        lambda n: dict(suppression(n), idxs=ids(n), iou_threshold=0.3, max_output=5),
        ("boxes", "scores"),
        dict(boxes=0, scores=0, idxs=0),
        wrong=(
            ({"idxs": torch.zeros(20, dtype=torch.bool)}, TypeError, "idxs"),
            ({"idxs": ids(19)}, ValueError, "idxs"),
            ({"max_output": -1}, ValueError, "max_output"),
            ({"iou_threshold": 2}, ValueError, "iou_threshold"),
        ),
    ),
    "nms_padded": Case(
        lambda n: dict(padded(n), iou_threshold=0.3),
        ("boxes", "scores"),
        dict(boxes=1, scores=1, groups=1),
        wrong=(
            ({"boxes": torch.zeros(20, 4)}, ValueError, "boxes"),
            ({"scores": torch.zeros(2, 19)}, ValueError, "scores"),
            ({"groups": ids(20)}, ValueError, "groups"),
            ({"groups": ids(38).view(2, 19)}, ValueError, "groups"),
            ({"counts": ids(3)}, ValueError, "counts"),
            ({"max_output": -1}, ValueError, "max_output"),
        ),
    ),
    "soft_nms": Case(
        lambda n: dict(suppression(n), method="gaussian", min_score=0.01),
        ("boxes", "scores"),
        dict(boxes=0, scores=0),
        wrong=(
            ({"scores": torch.zeros(19)}, ValueError, "scores"),
            ({"method": "quadratic"}, ValueError, "method"),
            ({"sigma": 0.0}, ValueError, "sigma"),
        ),
    ),
    "batched_soft_nms": Case(
        lambda n: dict(suppression(n), idxs=ids(n), method="gaussian", min_score=0.01, max_output=7),
        ("boxes", "scores"),
        dict(boxes=0, scores=0, idxs=0),
        wrong=(({"idxs": ids(19)}, ValueError, "idxs"), ({"max_output": -1}, ValueError, "max_output")),
    ),
    "soft_nms_padded": Case(
        lambda n: dict(padded(n), method="gaussian"),
        ("boxes", "scores"),
        dict(boxes=1, scores=1, groups=1),
        wrong=(
            ({"scores": torch.zeros(2, 19)}, ValueError, "scores"),
            ({"groups": ids(38).view(2, 19)}, ValueError, "groups"),
            ({"counts": ids(3)}, ValueError, "counts"),
            ({"max_output": -1}, ValueError, "max_output"),
        ),
    ),
    "select_candidates": Case(
        lambda n: dict(scores=spread_scores(2, n), threshold=0.3, max_candidates=8),
        ("scores",),
        dict(scores=1),
        wrong=(
            ({"scores": torch.zeros(20)}, ValueError, "scores"),
            ({"scores": ids(20).view(2, 10)}, TypeError, "scores"),
            ({"threshold": float("nan")}, ValueError, "threshold"),
            ({"max_candidates": -1}, ValueError, "max_candidates"),
        ),
    ),
    "roi_align": Case(
        lambda n: dict(input=random(2, 8, 16, 16), rois=rois(n), output_size=3, spatial_scale=0.25, sampling_ratio=2),
        ("input",),
        dict(rois=0),
        ("input",),
        exact=False,
        wrong=(
            ({"input": LAYERS[0]}, ValueError, "input"),
            ({"input": LAYERS[:, :, :0]}, ValueError, "input"),
            ({"input": LAYERS[..., :0]}, ValueError, "input"),
            ({"rois": torch.zeros(4, 4)}, ValueError, "rois"),
            ({"rois": torch.zeros(5)}, ValueError, "rois"),
            ({"output_size": 0}, ValueError, "output_size"),
            ({"output_size": (7, 7, 7)}, ValueError, "output_size"),
            ({"output_size": (7, -1)}, ValueError, "output_size"),
            ({"output_size": 2**16}, ValueError, "output_size"),
            ({"sampling_ratio": 2**32 + 1}, ValueError, "sampling_ratio"),
        ),
    ),
    "multilevel_roi_align": Case(
        one_pyramid,
        ("features",),
        dict(rois=0),
        ("features",),
        exact=False,
        wrong=(
            ({"features": []}, ValueError, "features"),
            ({"strides": [4]}, ValueError, "strides"),
            ({"strides": [4, 0, 4]}, ValueError, r"strides\[1\]"),
            ({"features": [LAYERS, LAYERS[0], LAYERS]}, ValueError, r"features\[1\]"),
            ({"features": [LAYERS, LAYERS, LAYERS[..., :0]]}, ValueError, r"features\[2\]"),
            ({"features": [LAYERS, LAYERS[:, :2], LAYERS]}, ValueError, r"features\[1\]"),
            ({"features": [LAYERS, LAYERS[:1], LAYERS]}, ValueError, r"features\[1\]"),
            ({"features": [LAYERS, LAYERS.double(), LAYERS]}, ValueError, r"features\[1\]"),
            ({"features": [LAYERS.int()] * 3}, TypeError, r"features\[0\]"),
            ({"profile": "caffe"}, ValueError, "profile"),
            ({"finest_scale": 0}, ValueError, "finest_scale"),
        ),
    ),
    "decode_boxes": Case(
        anchors_and_deltas,
        ("anchors", "deltas"),
        dict(anchors=0, deltas=0),
        ("anchors", "deltas"),
        wrong=(
            ({"anchors": torch.zeros(20, 5)}, ValueError, "anchors"),
            ({"anchors": torch.zeros(4)}, ValueError, "anchors"),
            ({"deltas": torch.zeros(19, 8)}, ValueError, "deltas"),
            ({"deltas": torch.zeros(20, 6)}, ValueError, "deltas"),
            ({"deltas": torch.zeros(1, 20, 8)}, ValueError, "deltas"),
            ({"max_shape": (1, 2, 3)}, ValueError, "max_shape"),
            ({"max_shape": (1, float("nan"))}, ValueError, "max_shape"),
            ({"max_shape": torch.zeros(2, 2)}, ValueError, "max_shape"),
            ({"means": (0, 0)}, ValueError, "means"),
            ({"stds": (1, 1, 1, 1, 1)}, ValueError, "stds"),
            ({"wh_ratio_clip": 0}, ValueError, "wh_ratio_clip"),
        ),
    ),
    "decode_proposals": Case(
        rpn_maps,
        ("cls_logits", "bbox_deltas"),
        wrong=(
            ({"cls_logits": [LAYERS[0], LAYERS]}, ValueError, r"cls_logits\[0\]"),
            ({"cls_logits": []}, ValueError, "cls_logits"),
            ({"cls_logits": [LAYERS]}, ValueError, "bbox_deltas"),
            ({"bbox_deltas": [LAYERS, LAYERS]}, ValueError, r"bbox_deltas\[0\]"),
            ({"base_anchors": [torch.zeros(2, 4)] * 2}, ValueError, r"base_anchors\[0\]"),
            ({"base_anchors": [torch.zeros(3, 3)] * 2}, ValueError, r"base_anchors\[0\]"),
            ({"strides": [8]}, ValueError, "strides"),
            ({"strides": [(8, 8, 8), 4]}, ValueError, "strides"),
            ({"image_sizes": torch.zeros(3, 2)}, ValueError, "image_sizes"),
            ({"image_sizes": torch.zeros(2, 3)}, ValueError, "image_sizes"),
            ({"topk_on": "scores"}, ValueError, "topk_on"),
            ({"score": "softmax"}, ValueError, "score"),
        ),
    ),
    "match_boxes": Case(
        ground_truth,
        ("boxes", "gt_boxes", "ignore_boxes"),
        dict(boxes=0),
        wrong=(
            ({"boxes": torch.zeros(5, 5)}, ValueError, "boxes"),
            ({"boxes": torch.zeros(3, 5, 4)}, ValueError, "boxes"),
            ({"boxes": torch.zeros(4)}, ValueError, "boxes"),
            ({"gt_boxes": torch.zeros(2, 3, 5)}, ValueError, "gt_boxes"),
            ({"gt_counts": ids(3)}, ValueError, "gt_counts"),
            ({"ignore_boxes": torch.zeros(3, 4)}, ValueError, "ignore_boxes"),
            ({"ignore_boxes": torch.zeros(1, 3, 4)}, ValueError, "ignore_boxes"),
            ({"ignore_boxes": None}, ValueError, "ignore_counts"),
            ({"ignore_counts": ids(1)}, ValueError, "ignore_counts"),
            ({"low_quality": "first_gt"}, ValueError, "low_quality"),
        ),
    ),
    "deform_conv2d": Case(
        deformed,
        ("input", "weight", "bias", "offset", "mask"),
        dict(input=0, offset=0, mask=0),
        ("input", "weight", "offset", "mask"),
        exact=False,
        wrong=(
            ({"padding": 0, "dilation": 9}, ValueError, "input"),
            ({"weight": torch.zeros(4, 2, 3)}, ValueError, "weight"),
            ({"weight": torch.zeros(4, 3, 3, 3)}, ValueError, "weight"),
            ({"weight": torch.zeros(4, 0, 3, 3)}, ValueError, "weight"),
            ({"weight": torch.zeros(4, 2, 3, 3).double()}, TypeError, "weight"),
            ({"offset": torch.zeros(3, 17, 6, 7)}, ValueError, "offset"),
            ({"offset": torch.zeros(3, 18, 6, 6)}, ValueError, "offset"),
            ({"offset": torch.zeros(1, 18, 6, 7)}, ValueError, "offset"),
            ({"offset": torch.zeros(20, 3 * 18, 6, 7)}, ValueError, "offset"),
            ({"mask": torch.zeros(3, 8, 6, 7)}, ValueError, "mask"),
            ({"bias": torch.zeros(3)}, ValueError, "bias"),
            ({"bias": torch.zeros(4).double()}, TypeError, "bias"),
            ({"stride": 0}, ValueError, "stride"),
            ({"stride": (1, 1, 1)}, ValueError, "stride"),
            ({"stride": 2**32}, ValueError, "stride"),
            ({"padding": -1}, ValueError, "padding"),
            ({"dilation": (1, 0)}, ValueError, "dilation"),
        ),
    ),
    "deform_roi_pool": Case(
        lambda n: dict(input=random(2, 8, 16, 16), rois=rois(n), offset=random(n, 2, 3, 2), output_size=(3, 2),
                       spatial_scale=0.25, sampling_ratio=2),
        ("input", "offset"),
        dict(rois=0, offset=0),
        ("input", "offset"),
        exact=False,
        wrong=(
            ({"input": LAYERS[:, :, :0]}, ValueError, "input"),
            ({"offset": torch.zeros(19, 2, 3, 2)}, ValueError, "offset"),
            ({"offset": torch.zeros(20, 2, 3, 3)}, ValueError, "offset"),
            ({"output_size": 0}, ValueError, "output_size"),
        ),
    ),
    "conv_bn_relu": Case(
        convolved,
        ("input", "weight", "residual"),
        dict(input=0, residual=0),
        ("input", "weight", "bn_weight", "bn_bias", "residual"),
        exact=False,
        wrong=(
            ({"input": torch.zeros(20, 4, 6, 1), "padding": 0, "residual": None}, ValueError, "input"),
            ({"weight": torch.zeros(6, 3, 3, 3)}, ValueError, "weight"),
            ({"weight": torch.zeros(6, 4, 3, 3).double()}, TypeError, "weight"),
            ({"groups": 3}, ValueError, "weight"),
            ({"bn_weight": torch.zeros(5)}, ValueError, "bn_weight"),
            ({"bn_weight": None}, ValueError, "bn_weight"),
            ({"bn_bias": None}, ValueError, "bn_bias"),
            ({"bn_mean": None}, ValueError, "bn_mean"),
            ({"bn_var": None}, ValueError, "bn_var"),
            ({"stride": (1, 1, 1)}, ValueError, "stride"),
            ({"stride": 0}, ValueError, "stride"),
            ({"padding": (1,)}, ValueError, "padding"),
            ({"padding": -1}, ValueError, "padding"),
            ({"dilation": 0}, ValueError, "dilation"),
            ({"residual": torch.zeros(20, 6, 5, 5)}, ValueError, "residual"),
            ({"residual": torch.zeros(20, 6, 6, 7).double()}, TypeError, "residual"),
        ),
    ),
    "preprocess": Case(
        pictures,
        ("dtype",),
        wrong=(
            ({"images": []}, ValueError, "images"),
            ({"images": [torch.zeros(3, 4, 5), torch.zeros(4, 5, 3)]}, ValueError, r"images\[1\]"),
            ({"images": [torch.zeros(3, 4, 5), torch.zeros(3, 4, 5, dtype=torch.int32)]}, TypeError, r"images\[1\]"),
            ({"images": [torch.zeros(3, 4, 5), torch.zeros(3, 4, 0)]}, ValueError, r"images\[1\]"),
            ({"sizes": [(6, 7)]}, ValueError, "sizes"),
            ({"sizes": [(6, 7), (6, 0)]}, ValueError, r"sizes\[1\]"),
            ({"sizes": [(6, 7), (17, 7)]}, ValueError, r"sizes\[1\]"),
            ({"batch_size": (2**32, 8)}, ValueError, "batch_size"),
            ({"mean": (0, 0)}, ValueError, "^mean: expected 3 numbers, got 2"),
            ({"mean": (), "std": ()}, ValueError, "^mean: expected 3 numbers, got 0"),
            ({"mean": 0.5}, TypeError, "^mean: expected 3 numbers"),
            ({"std": (1, 1, 1, 1)}, ValueError, "std"),
            ({"resize": "nearest"}, ValueError, "resize"),
            ({"dtype": torch.uint8}, TypeError, "dtype"),
        ),
    ),
}  # fmt: skip


def tensors_to(value, *args):
    """`value` and what it holds, moved."""
    if isinstance(value, list) and value and isinstance(value[0], Tensor):
        return [v.to(*args) for v in value]
    return value.to(*args) if isinstance(value, Tensor) else value


def arguments(name: str, device: str, n: int = 20, dtype: torch.dtype = torch.float32) -> dict:
    case = CASES[name]
    made = {k: tensors_to(v, device) for k, v in case.make(n).items()}
    if "dtype" in case.typed:
        return made | {"dtype": dtype}
    return {k: tensors_to(v, dtype) if k in case.typed else v for k, v in made.items()}


def public(name: str) -> tuple[Callable, Callable]:
    """The operator and its reference."""
    return getattr(ops, name), getattr(ops, f"{name}_reference")
