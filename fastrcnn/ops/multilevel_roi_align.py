"""RoIAlign on a feature pyramid: each RoI is read from the level that fits its size (Lin et al., FPN, 2017, eq. 1).

Sampling and layout are those of `roi_align`; all levels run in one call, and the level is chosen inside.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrcnn.ops._checks import check_same_device, check_tensor
from fastrcnn.ops.roi_align import _backward, _empty_output, _forward, _layout, _pair

PROFILES = ("mmdet", "torchvision", "detectron2")

_multilevel = torch.library.custom_op("fastrcnn::multilevel_roi_align", _forward, mutates_args=())
_multilevel_backward = torch.library.custom_op("fastrcnn::multilevel_roi_align_backward", _backward, mutates_args=())


@_multilevel.register_fake
def _(features, rois, pooled_h, pooled_w, scales, sampling_ratio, aligned, finest_scale, profile):
    return _empty_output(features, rois.shape[0], pooled_h, pooled_w)


@_multilevel_backward.register_fake
def _(grad, features, rois, scales, sampling_ratio, aligned, finest_scale, profile):
    return [torch.empty_like(m, memory_format=_layout(features)) for m in features]


def _multilevel_setup(ctx, inputs, output):
    features, rois, _, _, *ctx.rules = inputs
    ctx.save_for_backward(rois, *features)


def _multilevel_grad(ctx, grad):
    rois, *features = ctx.saved_tensors
    grads = torch.ops.fastrcnn.multilevel_roi_align_backward(grad, features, rois, *ctx.rules)
    return grads, None, None, None, None, None, None, None, None


_multilevel.register_autograd(_multilevel_grad, setup_context=_multilevel_setup)


def _pyramid(op, features, rois, output_size, strides, sampling_ratio, aligned, finest_scale, profile):
    features = list(features)
    if not features or len(features) != len(strides):
        raise ValueError(f"strides: expected one for each of the {len(features)} features, got {list(strides)}")
    for i, m in enumerate(features):
        check_tensor(f"features[{i}]", m, "B, C, H, W")
        if m.shape[:2] != features[0].shape[:2] or m.dtype != features[0].dtype:
            want = f"{list(features[0].shape[:2])} and {features[0].dtype} as in features[0]"
            raise ValueError(f"features[{i}]: expected [B, C] = {want}, got {list(m.shape[:2])} and {m.dtype}")
    check_tensor("rois", rois, "K, 5", last=5)
    check_same_device(rois=rois, **{f"features[{i}]": m for i, m in enumerate(features)})
    if profile not in PROFILES:
        raise ValueError(f"profile: expected one of {PROFILES}, got {profile!r}")
    scales = [1.0 / s for s in strides]
    rules = scales, int(sampling_ratio), bool(aligned), float(finest_scale), profile
    return op(features, rois, *_pair(output_size), *rules)


def multilevel_roi_align_reference(
    features: Sequence[Tensor],
    rois: Tensor,
    output_size: int | Sequence[int],
    strides: Sequence[float],
    sampling_ratio: int = 0,
    aligned: bool = True,
    finest_scale: float = 56,
    profile: str = "mmdet",
) -> Tensor:
    return _pyramid(_forward, features, rois, output_size, strides, sampling_ratio, aligned, finest_scale, profile)


def multilevel_roi_align(
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
    Raises TypeError or ValueError naming the argument; RuntimeError for an image index beyond B on the CPU. On CUDA the
    host does not wait to look at the indices: such RoIs give zeros there, as padding does. CUDA takes up to 8 levels.
    """
    op = torch.ops.fastrcnn.multilevel_roi_align
    return _pyramid(op, features, rois, output_size, strides, sampling_ratio, aligned, finest_scale, profile)
