"""Our operators in the words of ONNX, opset 18: what `torch.onnx.export` writes for each.

Semantics are the operators', to the ties: TopK puts equal scores in index order, and NonMaxSuppression sees ranks in
place of scores. NaN is not carried: what is no number ranks anywhere.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from fastrcnn.ops._box_math import COEFFICIENTS
from fastrcnn.ops.nms import _comparable
from fastrcnn.ops.roi_align import ANY_LEVEL

OPSET = 18
FLOAT, INT64 = 1, 7  # ONNX's numbers of types


class _Operators:
    """onnxscript's operators of the opset, imported when the first is asked for."""

    def __getattr__(self, name: str):
        import onnxscript

        return getattr(getattr(onnxscript, f"opset{OPSET}"), name)


op = _Operators()


def _ints(*values: int):
    return op.Constant(value_ints=list(values))


def _floats(values: Sequence[float]):
    return op.Constant(value_floats=[float(v) for v in values])


def _float(x):
    return op.Cast(x, to=FLOAT)


def _size(x, axis: int):
    """[1] int64."""
    return op.Shape(x, start=axis, end=axis + 1)


def _columns(x, first: int, end: int):
    return op.Slice(x, _ints(first), _ints(end), _ints(-1))


def _range(size):
    """0..size-1 of size [1]."""
    return op.Range(op.Constant(value_int=0), op.Squeeze(size), op.Constant(value_int=1))


def _rows(x, index):
    """x [B, N, C], index [B, K] -> [B, K, C]."""
    return op.GatherND(x, op.Unsqueeze(index, _ints(-1)), batch_dims=1)


def exp(x):
    """`ops._box_math.exp`, operation for operation; a power of two is looked up, since ONNX moves no bits."""
    x = op.Clip(x, op.Constant(value_float=-87.3), op.Constant(value_float=88.3))
    n = op.Round(op.Mul(x, _floats([1.44269504])))  # what adding and subtracting ROUND does; runtimes would fold that
    r = op.Sub(op.Sub(x, op.Mul(n, _floats([0.693359375]))), op.Mul(n, _floats([-2.12194440e-4])))
    p = _floats(COEFFICIENTS[:1])
    for c in COEFFICIENTS[1:]:
        p = op.Add(op.Mul(p, r), _floats([c]))
    mantissa = op.Add(op.Add(op.Mul(op.Mul(p, r), r), r), _floats([1.0]))
    power = op.Gather(_floats([2.0**n for n in range(-126, 128)]), op.Add(op.Cast(n, to=INT64), _ints(126)))
    return op.Mul(mantissa, power)


def sigmoid(x):
    return op.Div(_floats([1.0]), op.Add(exp(op.Neg(x)), _floats([1.0])))


def conv_bn_relu(
    input, weight, bn_weight, bn_bias, bn_mean, bn_var, eps: float, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, residual, relu: bool, upsample_residual: bool,
):  # fmt: skip
    """Of a model whose norms are folded, which is what is exported: `bn_weight` is None."""
    where = dict(strides=stride, pads=[*padding, *padding], dilations=dilation, group=groups)
    out = op.Conv(input, weight, **where) if bn_bias is None else op.Conv(input, weight, bn_bias, **where)
    if upsample_residual:
        how = dict(mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor")
        residual = op.Resize(residual, None, None, op.Shape(out), **how)
    out = out if residual is None else op.Add(out, residual)
    return op.Relu(out) if relu else out


def decode_boxes(
    anchors,
    deltas,
    max_shape,
    means: Sequence[float],
    stds: Sequence[float],
    wh_ratio_clip: float,
    symmetric_clip: bool,
):
    anchors = op.Unsqueeze(_float(anchors), _ints(2))  # [B, N, 1, 4]
    moves = op.Reshape(_float(deltas), _ints(0, 0, -1, 4))
    moves = op.Add(op.Mul(moves, _floats(stds)), _floats(means))
    limit = abs(math.log(wh_ratio_clip))
    least = -limit if symmetric_clip else -3e38
    grow = op.Clip(_columns(moves, 2, 4), op.Constant(value_float=least), op.Constant(value_float=limit))
    low, high = _columns(anchors, 0, 2), _columns(anchors, 2, 4)
    size, half = op.Sub(high, low), _floats([0.5])
    centre = op.Add(op.Mul(op.Add(low, high), half), op.Mul(size, _columns(moves, 0, 2)))
    half = op.Mul(op.Mul(size, exp(grow)), half)
    ends = [op.Sub(centre, half), op.Add(centre, half)]
    if max_shape is not None:
        sides = op.Unsqueeze(op.Gather(_float(max_shape), _ints(1, 0), axis=1), _ints(1, 2))  # [B, 1, 1, 2]
        ends = [op.Min(op.Max(end, _floats([0.0])), sides) for end in ends]
    return op.Reshape(op.Concat(*ends, axis=-1), op.Shape(deltas))


def decode_proposals(
    cls_logits, bbox_deltas, base_anchors, strides: Sequence[float], image_sizes, nms_pre: int, means: Sequence[float],
    stds: Sequence[float], wh_ratio_clip: float, symmetric_clip: bool, min_size: float, topk_on_logits: bool,
    return_logits: bool, batch_shape,
):  # fmt: skip
    """batch_shape [2] (height, width) in place of the strides, or nothing."""
    columns = []
    for level, (logits, deltas, base) in enumerate(zip(cls_logits, bbox_deltas, base_anchors)):
        anchors, width = _size(logits, 1), _size(logits, 3)
        steps = [_floats([s]) for s in strides[2 * level : 2 * level + 2]]
        if not strides:
            whole = op.Div(batch_shape, op.Shape(logits, start=2, end=4))
            steps = [_float(op.Gather(whole, _ints(k))) for k in (1, 0)]
        logits = op.Reshape(op.Transpose(_float(logits), perm=[0, 2, 3, 1]), _ints(0, -1))
        deltas = op.Transpose(deltas, perm=[0, 2, 3, 1])
        deltas = op.Reshape(deltas, op.Concat(_size(deltas, 0), _ints(-1, 4), axis=0))
        count = op.Min(_size(logits, 1), _ints(nms_pre)) if nms_pre > 0 else _size(logits, 1)
        _, top = op.TopK(logits if topk_on_logits else sigmoid(logits), count, axis=1)
        cell = op.Div(top, anchors)
        row = op.Div(cell, width)
        x = op.Mul(_float(op.Sub(cell, op.Mul(row, width))), steps[0])
        y = op.Mul(_float(row), steps[1])
        x, y = op.Unsqueeze(x, _ints(-1)), op.Unsqueeze(y, _ints(-1))
        base = op.Gather(_float(base), op.Sub(top, op.Mul(cell, anchors)))
        placed = op.Add(base, op.Concat(x, y, x, y, axis=-1))
        boxes = decode_boxes(placed, _rows(deltas, top), image_sizes, means, stds, wh_ratio_clip, symmetric_clip)
        scores = op.GatherElements(logits, top, axis=1)
        levels = op.Add(op.Mul(top, _ints(0)), _ints(level))
        columns.append((boxes, scores if return_logits else sigmoid(scores), levels))
    boxes, scores, levels = (op.Concat(*parts, axis=1) for parts in zip(*columns))
    size = op.Sub(_columns(boxes, 2, 4), _columns(boxes, 0, 2))
    valid = op.ReduceMin(_float(op.Greater(size, _floats([min_size]))), _ints(-1), keepdims=0)
    counts = op.Cast(op.ReduceSum(valid, _ints(1), keepdims=0), to=INT64)
    first, order = op.TopK(valid, _size(valid, 1), axis=1)  # the valid ones come to the front, in their order
    boxes = op.Mul(_rows(boxes, order), op.Unsqueeze(first, _ints(-1)))
    scores = op.Mul(op.GatherElements(scores, order, axis=1), first)
    levels = op.Where(op.Greater(first, _floats([0.0])), op.GatherElements(levels, order, axis=1), _ints(-1))
    return boxes, scores, levels, counts


def level_borders(num_levels: int, rule: Sequence[float]) -> list[float]:
    """The smallest float32 size (square root of an area) of each level from 1 on, found by halving the bits: the rule's own
    rounding decides here, and the exported program only compares."""
    scale, first, inside, outside, lowest = (np.float32(x) for x in rule)

    def level(size: np.float32) -> float:
        with np.errstate(divide="ignore"):
            return np.floor(first + np.log2(size / scale + inside) + outside) - lowest

    borders = []
    for wanted in range(1, num_levels):
        low, high = 0, int(np.float32(1e15).view(np.int32))
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if level(np.int32(middle).view(np.float32)) >= wanted else (middle, high)
        borders.append(float(np.int32(high).view(np.float32)))
    return borders


def multilevel_roi_align(
    features, rois, pooled_h: int, pooled_w: int, scales: Sequence[float], sampling_ratio: int, aligned: bool,
    level_rule: Sequence[float],
):  # fmt: skip
    rois = _float(rois)
    image, boxes = _columns(rois, 0, 1), _columns(rois, 1, 5)
    sides = op.Sub(_columns(boxes, 2, 4), _columns(boxes, 0, 2))
    size = op.Sqrt(op.Mul(_columns(sides, 0, 1), _columns(sides, 1, 2)))  # [K, 1]
    level = op.Mul(image, _floats([0.0]))
    for border in level_borders(len(features), level_rule):
        level = op.Add(level, _float(op.GreaterOrEqual(size, _floats([border]))))
    level = op.Where(op.Less(image, _floats([0.0])), _floats([-1.0]), level)  # padding has none
    index = op.Squeeze(op.Cast(op.Max(image, _floats([0.0])), to=INT64), _ints(1))
    mode = "half_pixel" if aligned else "output_half_pixel"
    total = None
    for i, (x, scale) in enumerate(zip(features, scales)):
        here = op.Equal(level, _floats([i]))
        own = op.Where(here, boxes, _floats([0.0]))  # others are empty RoIs, which take no time
        pooled = op.RoiAlign(
            x, op.CastLike(own, x), index, mode="avg", output_height=pooled_h, output_width=pooled_w,
            sampling_ratio=max(sampling_ratio, 0), spatial_scale=scale, coordinate_transformation_mode=mode,
        )  # fmt: skip
        rest = op.CastLike(_floats([0.0]), x) if total is None else total
        total = op.Where(op.Unsqueeze(here, _ints(2, 3)), pooled, rest)
    return total


def roi_align(input, rois, pooled_h: int, pooled_w: int, spatial_scale: float, sampling_ratio: int, aligned: bool):
    return multilevel_roi_align([input], rois, pooled_h, pooled_w, [spatial_scale], sampling_ratio, aligned, ANY_LEVEL)


def nms_padded(boxes, scores, groups, iou_threshold: float, max_output: int, counts=None):
    """Boxes are ranked first and stand in that order: NonMaxSuppression sees ranks in place of scores, so that ties are
    broken before it, and each group as a class, in which the others have rank 0 and take no part."""
    n, nothing = _size(scores, 1), _floats([0.0])
    place, scores = op.Unsqueeze(_range(n), _ints(0)), _float(scores)  # [1, N]
    rank = op.Add(op.Mul(scores, nothing), _float(op.Sub(n, place)))  # [B, N], N..1
    if counts is not None:
        taking = op.Less(place, op.Unsqueeze(counts, _ints(1)))
        scores, rank = op.Where(taking, scores, _floats([-math.inf])), op.Where(taking, rank, nothing)
    _, order = op.TopK(scores, n, axis=1)
    ranks = op.Unsqueeze(rank, _ints(1))
    if groups is not None:
        groups = op.Unsqueeze(op.GatherElements(groups, order, axis=1), _ints(1))  # [B, 1, N]
        most = op.Max(op.Reshape(op.ReduceMax(groups, keepdims=0), _ints(1)), _ints(0))
        classes = op.Unsqueeze(_range(op.Add(most, _ints(1))), _ints(0, 2))
        ranks = op.Where(op.Equal(groups, classes), ranks, nothing)  # [B, classes, N]
    threshold = _floats([_comparable(iou_threshold, torch.empty(0))])
    chosen = op.NonMaxSuppression(_rows(_float(boxes), order), ranks, _ints(max_output), threshold, _floats([0.5]))
    where = op.Gather(chosen, _ints(0, 2), axis=1)  # of (image, class, place)
    kept = op.ScatterND(op.Mul(rank, nothing), where, op.Expand(_floats([1.0]), _size(chosen, 0)))
    # At least max_output places to choose from.
    pads = op.Concat(_ints(0, 0, 0), op.Max(op.Sub(_ints(max_output), n), _ints(0)), axis=0)
    rank, first = op.TopK(op.Pad(op.Mul(kept, rank), pads), _ints(max_output), axis=1)
    live = op.Greater(rank, nothing)
    indices = op.Where(live, op.GatherElements(op.Pad(order, pads), first, axis=1), _ints(-1))
    return indices, op.ReduceSum(op.Cast(live, to=INT64), _ints(1), keepdims=0)


def select_candidates(scores, threshold: float, max_candidates):
    """For at most as many candidates as there are scores, as models ask."""
    scores = _float(scores)
    above = op.Greater(scores, _floats([threshold]))
    found = op.ReduceSum(op.Cast(above, to=INT64), _ints(1), keepdims=0)
    most = op.Reshape(op.Cast(max_candidates, to=INT64), _ints(1))
    values, indices = op.TopK(op.Where(above, scores, _floats([-math.inf])), most, axis=1)
    live = op.Greater(values, _floats([-math.inf]))
    values, indices = op.Where(live, values, _floats([0.0])), op.Where(live, indices, _ints(-1))
    return values, indices, op.Min(found, most), found


def sort(x, stable: bool, dim: int, descending: bool):
    """The stable one, largest first, of numbers that a float32 holds."""
    if not descending:
        raise ValueError("sort: ONNX's TopK keeps the order of equal values when it puts the largest first")
    values, indices = op.TopK(_float(x), _size(x, dim), axis=dim)
    return op.CastLike(values, x), indices


def shift(x, bits: int):
    """x >> bits of integers that are not negative: ONNX shifts unsigned ones alone, and its division cuts off."""
    return op.Div(x, op.CastLike(_ints(1 << bits), x))


TRANSLATIONS: dict[torch._ops.OpOverload, Callable] = {
    getattr(torch.ops.fastrcnn, function.__name__).default: function
    for function in (
        conv_bn_relu, decode_boxes, decode_proposals, multilevel_roi_align, nms_padded, roi_align, select_candidates,
    )
} | {torch.ops.aten.__rshift__.Scalar: shift, torch.ops.aten.sort.stable: sort}  # fmt: skip


def to_onnx(program: torch.export.ExportedProgram, inputs: Sequence[str], outputs: Sequence[str]):
    """The ModelProto of an exported program. Raises what torch's exporter does."""
    names = dict(input_names=list(inputs), output_names=list(outputs) or None)
    found = torch.onnx.export(
        program, dynamo=True, opset_version=OPSET, custom_translation_table=TRANSLATIONS, verbose=False, **names
    )
    return found.model_proto
