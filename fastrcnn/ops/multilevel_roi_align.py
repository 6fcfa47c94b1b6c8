"""RoIAlign on a feature pyramid: each RoI is read from the level that fits its size (Lin et al., FPN, 2017, eq. 1).

Sampling and layout are those of `roi_align`; all levels run in one call, and the level is chosen inside.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrcnn.ops._bind import bind
from fastrcnn.ops._checks import (
    check_choice,
    check_flag,
    check_map,
    check_numbers,
    check_positive,
    check_same_device,
    check_tensors,
)
from fastrcnn.ops.roi_align import _backward, _empty_output, _forward, _layout, check_sampling, level_rule

PROFILES = ("mmdet", "torchvision", "detectron2")

_operator = torch.library.custom_op("fastrcnn::multilevel_roi_align", _forward, mutates_args=())
_gradient = torch.library.custom_op("fastrcnn::multilevel_roi_align_backward", _backward, mutates_args=())


@_operator.register_fake
def _(features, rois, pooled_h, pooled_w, scales, sampling_ratio, aligned, level_rule):
    return _empty_output(features, rois.shape[0], pooled_h, pooled_w)


@_gradient.register_fake
def _(grad, features, rois, scales, sampling_ratio, aligned, level_rule):
    return [torch.empty_like(m, memory_format=_layout(features)) for m in features]


def _setup(ctx, inputs, output):
    features, rois, _, _, *ctx.rules = inputs
    ctx.save_for_backward(rois, *features)


def _grad(ctx, grad):
    rois, *features = ctx.saved_tensors
    grads = torch.ops.fastrcnn.multilevel_roi_align_backward(grad, features, rois, *ctx.rules)
    return grads, None, None, None, None, None, None, None


_operator.register_autograd(_grad, setup_context=_setup)


def _multilevel_roi_align(
    op,
    features: Sequence[Tensor],
    rois: Tensor,
    output_size: int | Sequence[int],
    strides: Sequence[float],
    sampling_ratio: int = 0,
    aligned: bool = True,
    finest_scale: float = 56,
    profile: str = "mmdet",
) -> Tensor:
    """RoI features [K, C, out_h, out_w] from the pyramid level that fits each RoI's size. Differentiable in `features`.

    features: [B, C, H_l, W_l], finest first, one dtype; rois [K, 5] = (image index, xyxy in image pixels), a negative
    index being padding that gives zeros; strides: image pixels a map pixel, one a level. RoIs of sqrt(area) below
    2 * finest_scale pixels take level 0, below 4 * finest_scale level 1, and so on; `profile` ("mmdet", "torchvision",
    "detectron2") chooses the peer's rounding at the boundary. Backward is deterministic.
    Raises TypeError or ValueError naming the argument, also for an image index beyond B on the CPU. On CUDA the host does
    not wait to look at the indices: such RoIs give zeros there, as padding does. CUDA takes up to 8 levels
    and 512 bins along both axes together.
    """
    features = check_tensors("features", features)
    for i, m in enumerate(features):
        check_map(f"features[{i}]", m)
        if m.shape[:2] != features[0].shape[:2] or m.dtype != features[0].dtype:
            want = f"{list(features[0].shape[:2])} and {features[0].dtype} as in features[0]"
            raise ValueError(f"features[{i}]: expected [B, C] = {want}, got {list(m.shape[:2])} and {m.dtype}")
    strides = check_numbers("strides", strides, len(features))
    scales = [1.0 / check_positive(f"strides[{i}]", s) for i, s in enumerate(strides)]
    *pooled, ratio = check_sampling(rois, output_size, sampling_ratio)
    check_same_device(rois=rois, **{f"features[{i}]": m for i, m in enumerate(features)})
    rule = level_rule(check_positive("finest_scale", finest_scale), check_choice("profile", profile, PROFILES))
    return op(features, rois, *pooled, scales, ratio, check_flag("aligned", aligned), rule)


multilevel_roi_align = bind(
    _multilevel_roi_align, torch.ops.fastrcnn.multilevel_roi_align.default, "multilevel_roi_align"
)
multilevel_roi_align_reference = bind(_multilevel_roi_align, _forward, "multilevel_roi_align_reference")
