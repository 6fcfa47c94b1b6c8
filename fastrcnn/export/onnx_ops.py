"""Our operators in the words of ONNX: as plain torch where torch's exporter knows the rest, and as ONNX operators where
there is one that does the work (RoiAlign, NonMaxSuppression, TopK).

`FORMS` is a table of decompositions for `ExportedProgram.run_decompositions`, `TRANSLATIONS` one of functions for
`torch.onnx.export`. Semantics are those of the operators, ties included: TopK and our own choice of ranks put equal
scores in index order. NaN is not carried: what is no number ranks anywhere.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastrcnn.ops._box_math import exp, sigmoid
from fastrcnn.ops._boxes import take_boxes
from fastrcnn.ops.nms import _comparable
from fastrcnn.ops.roi_align import ANY_LEVEL

OPSET = 18


def conv_bn_relu_form(
    x, weight, bn_weight, bias, bn_mean, bn_var, eps, stride, padding, dilation, groups, residual, relu
) -> Tensor:
    """For a model whose norms are folded, which is what is exported: `bn_weight` is None."""
    out = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    out = out if residual is None else out + residual
    return torch.relu(out) if relu else out


def best(x: Tensor, count) -> tuple[Tensor, Tensor]:
    """(values, indices) of the `count` largest of each row, by descending value; in ONNX equal ones by index."""
    return torch.topk(x, count, dim=1)


def decode_boxes_form(anchors, deltas, max_shape, means, stds, wh_ratio_clip, symmetric_clip) -> Tensor:
    batch, n, columns = deltas.shape
    d = deltas.float().reshape(batch, n, columns // 4, 4)
    limit, corners = abs(math.log(wh_ratio_clip)), []
    for axis in (0, 1):
        low, high = (anchors[..., axis + i].float()[..., None] for i in (0, 2))
        move, grow = (d[..., axis + i] * stds[axis + i] + means[axis + i] for i in (0, 2))
        size, grow = high - low, grow.clamp(min=-limit if symmetric_clip else None, max=limit)
        centre, half = (low + high) * 0.5 + size * move, size * exp(grow) * 0.5
        ends = centre - half, centre + half
        if max_shape is not None:
            most = max_shape[:, 1 - axis].float()[:, None, None]
            ends = [torch.minimum(end.clamp(min=0), most) for end in ends]
        corners.append(ends)
    (x1, x2), (y1, y2) = corners
    return torch.stack([x1, y1, x2, y2], -1).reshape(batch, n, columns)


def decode_proposals_form(
    cls_logits, bbox_deltas, base_anchors, strides, image_sizes, nms_pre, means, stds, wh_ratio_clip, symmetric_clip,
    min_size, topk_on_logits, return_logits,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    sizes, batch = image_sizes.float(), image_sizes.shape[0]
    boxes, scores, levels = [], [], []
    for level, (logits, deltas, base) in enumerate(zip(cls_logits, bbox_deltas, base_anchors)):
        num_anchors, height, width = logits.shape[1:]
        n = num_anchors * height * width
        logits = logits.float().permute(0, 2, 3, 1).reshape(batch, n)
        deltas = deltas.float().permute(0, 2, 3, 1).reshape(batch, n, 4)
        count = torch.sym_min(nms_pre, n) if nms_pre > 0 else n
        top = best(logits if topk_on_logits else sigmoid(logits), count)[1]
        cell = torch.div(top, num_anchors, rounding_mode="trunc")
        row = torch.div(cell, width, rounding_mode="trunc")
        x, y = ((cell - row * width).float() * strides[2 * level], row.float() * strides[2 * level + 1])
        anchors = base[top - cell * num_anchors] + torch.stack([x, y, x, y], -1)
        moves = take_boxes(deltas, top)
        boxes.append(decode_boxes_form(anchors, moves, sizes, means, stds, wh_ratio_clip, symmetric_clip))
        logits = logits.gather(1, top)
        scores.append(logits if return_logits else sigmoid(logits))
        levels.append(torch.full_like(top, level))
    boxes, scores, levels = torch.cat(boxes, 1), torch.cat(scores, 1), torch.cat(levels, 1)
    valid = (boxes[..., 2] - boxes[..., 0] > min_size) & (boxes[..., 3] - boxes[..., 1] > min_size)
    first, order = best(valid.int(), valid.shape[1])
    boxes = torch.where(first[..., None] > 0, take_boxes(boxes, order), 0.0)
    scores = torch.where(first > 0, scores.gather(1, order), 0.0)
    levels = torch.where(first > 0, levels.gather(1, order), -1)
    return boxes, scores, levels, valid.sum(1)


def level_borders(num_levels: int, rule: Sequence[float]) -> list[float]:
    """The smallest float32 size (square root of an area) of each level from 1 on, found by halving the bits: the rule's own
    rounding decides here, in numpy since torch is tracing, and the exported program only compares."""
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


def multilevel_roi_align_form(
    features, rois, pooled_h, pooled_w, scales, sampling_ratio, aligned, level_rule
) -> Tensor:
    rois = rois.float()
    size = torch.sqrt((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2]))
    borders = level_borders(len(features), level_rule)
    level = sum((size >= border).long() for border in borders) if borders else None
    out = 0.0
    for i, (x, scale) in enumerate(zip(features, scales)):
        # Of another level, or padding: an empty RoI, which takes no time, and zeros in its place.
        here = rois[:, 0] >= 0 if level is None else (rois[:, 0] >= 0) & (level == i)
        boxes = torch.where(here[:, None], rois[:, 1:], 0.0)
        attributes = dict(
            mode="avg", output_height=pooled_h, output_width=pooled_w, sampling_ratio=max(sampling_ratio, 0),
            spatial_scale=scale, coordinate_transformation_mode="half_pixel" if aligned else "output_half_pixel",
        )  # fmt: skip
        inputs = x, boxes.to(x.dtype), rois[:, 0].clamp(min=0).long()
        shape = rois.shape[0], x.shape[1], pooled_h, pooled_w
        pooled = torch.onnx.ops.symbolic("RoiAlign", inputs, attributes, dtype=x.dtype, shape=shape, version=16)
        out = torch.where(here[:, None, None, None], pooled, out)
    return out


def roi_align_form(x, rois, pooled_h, pooled_w, spatial_scale, sampling_ratio, aligned) -> Tensor:
    return multilevel_roi_align_form([x], rois, pooled_h, pooled_w, [spatial_scale], sampling_ratio, aligned, ANY_LEVEL)


FORMS: dict[torch._ops.OpOverload, Callable] = {
    torch.ops.fastrcnn.conv_bn_relu.default: conv_bn_relu_form,
    torch.ops.fastrcnn.decode_boxes.default: decode_boxes_form,
    torch.ops.fastrcnn.decode_proposals.default: decode_proposals_form,
    torch.ops.fastrcnn.multilevel_roi_align.default: multilevel_roi_align_form,
    torch.ops.fastrcnn.roi_align.default: roi_align_form,
}


def translations() -> dict[Callable, Callable]:
    """For operators that need an ONNX operator of unknown length, NonMaxSuppression. Imports onnxscript."""
    from onnxscript import opset18 as op

    def nms_padded(boxes, scores, groups, iou_threshold: float, max_output: int, counts=None):
        """Boxes are ranked first and stand in that order: NonMaxSuppression sees ranks in place of scores, so that ties
        are broken before it, and each group as a class, in which the others have rank 0 and take no part."""
        i64 = lambda *values: op.Constant(value_ints=list(values))  # noqa: E731
        n = op.Shape(scores, start=1, end=2)
        place = op.Range(op.Constant(value_int=0), op.Squeeze(n), op.Constant(value_int=1))  # [N]
        scores = op.Cast(scores, to=1)
        if counts is not None:
            taking = op.Less(op.Unsqueeze(place, i64(0)), op.Unsqueeze(counts, i64(1)))  # [B, N]
            scores = op.Where(taking, scores, op.Constant(value_float=-math.inf))
        else:
            taking = op.Expand(op.Constant(value_ints=[1]), op.Shape(scores))
            taking = op.Cast(taking, to=9)
        _, order = op.TopK(scores, n, axis=1)
        along = op.Expand(op.Unsqueeze(order, i64(2)), op.Concat(op.Shape(order), i64(4), axis=0))
        boxes = op.GatherElements(op.Cast(boxes, to=1), along, axis=1)
        rank = op.Cast(op.Sub(n, op.Unsqueeze(place, i64(0))), to=1)  # [1, N], N..1
        rank = op.Where(taking, rank, op.Constant(value_float=0.0))  # [B, N]
        if groups is None:
            ranks = op.Unsqueeze(rank, i64(1))
        else:
            groups = op.Unsqueeze(op.GatherElements(groups, order, axis=1), i64(1))  # [B, 1, N]
            most = op.Max(op.ReduceMax(groups, keepdims=0), op.Constant(value_int=0))
            classes = op.Range(op.Constant(value_int=0), op.Add(most, op.Constant(value_int=1)), op.Constant(value_int=1))
            member = op.Equal(groups, op.Unsqueeze(classes, i64(0, 2)))
            ranks = op.Where(member, op.Unsqueeze(rank, i64(1)), op.Constant(value_float=0.0))  # [B, C, N]
        threshold = _comparable(iou_threshold, torch.empty(0))
        chosen = op.NonMaxSuppression(
            boxes, ranks, i64(max_output), op.Constant(value_floats=[threshold]), op.Constant(value_floats=[0.5])
        )  # [M, 3]: image, class, place
        where = op.Gather(chosen, i64(0, 2), axis=1)
        ones = op.Expand(op.Constant(value_float=1.0), op.Shape(chosen, end=1))
        kept = op.ScatterND(op.Mul(rank, op.Constant(value_float=0.0)), where, ones)
        # At least max_output places to choose from.
        pads = op.Concat(i64(0, 0, 0), op.Max(op.Sub(i64(max_output), n), i64(0)), axis=0)
        kept = op.Pad(op.Mul(kept, rank), pads)
        order = op.Pad(order, pads)
        values, first = op.TopK(kept, i64(max_output), axis=1)
        live = op.Greater(values, op.Constant(value_float=0.0))
        indices = op.Where(live, op.GatherElements(order, first, axis=1), op.Constant(value_int=-1))
        return indices, op.ReduceSum(op.Cast(live, to=7), i64(1), keepdims=0)

    return {torch.ops.fastrcnn.nms_padded.default: nms_padded}


def to_onnx(program: torch.export.ExportedProgram, inputs: Sequence[str], outputs: Sequence[str]):
    """The ModelProto of an exported program whose operators have their forms above. Raises what torch's exporter does."""
    program = program.run_decompositions(FORMS)
    names = dict(input_names=list(inputs), output_names=list(outputs) or None)
    found = torch.onnx.export(
        program, dynamo=True, opset_version=OPSET, custom_translation_table=translations(), verbose=False, **names
    )
    return found.model_proto
