"""Detectron2's R-CNN FPN models: keys, and its input (BGR, std 1) and caffe-style bottlenecks."""

import re

from torch import Tensor

_RULES = [
    (r"^backbone\.bottom_up\.stem\.conv1\.weight$", r"backbone.conv1.weight"),
    (r"^backbone\.bottom_up\.stem\.conv1\.norm\.(.*)$", r"backbone.bn1.\1"),
    (r"^backbone\.bottom_up\.res(\d)\.(\d+)\.conv(\d)\.weight$", r"backbone.layer{L}.\2.conv\3.weight"),
    (r"^backbone\.bottom_up\.res(\d)\.(\d+)\.conv(\d)\.norm\.(.*)$", r"backbone.layer{L}.\2.bn\3.\4"),
    (r"^backbone\.bottom_up\.res(\d)\.(\d+)\.shortcut\.weight$", r"backbone.layer{L}.\2.downsample.0.weight"),
    (r"^backbone\.bottom_up\.res(\d)\.(\d+)\.shortcut\.norm\.(.*)$", r"backbone.layer{L}.\2.downsample.1.\3"),
    (r"^backbone\.fpn_lateral(\d)\.(.*)$", r"neck.lateral_convs.{P}.conv.\2"),
    (r"^backbone\.fpn_output(\d)\.(.*)$", r"neck.fpn_convs.{P}.conv.\2"),
    (r"^proposal_generator\.rpn_head\.conv\.(.*)$", r"rpn_head.rpn_conv.\1"),
    (r"^proposal_generator\.rpn_head\.objectness_logits\.(.*)$", r"rpn_head.rpn_cls.\1"),
    (r"^proposal_generator\.rpn_head\.anchor_deltas\.(.*)$", r"rpn_head.rpn_reg.\1"),
    (r"^roi_heads\.box_head\.fc(\d)\.(.*)$", r"roi_head.bbox_head.shared_fcs.{F}.\2"),
    (r"^roi_heads\.box_predictor\.cls_score\.(.*)$", r"roi_head.bbox_head.fc_cls.\1"),
    (r"^roi_heads\.box_predictor\.bbox_pred\.(.*)$", r"roi_head.bbox_head.fc_reg.\1"),
]
# Buffers that Detectron2 saves and can compute: pixel statistics and anchors.
_COMPUTED = re.compile(r"(^pixel_(mean|std)$)|(anchor_generator\.)")


def detect(state: dict[str, Tensor]) -> bool:
    return "proposal_generator.rpn_head.objectness_logits.weight" in state


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {}
    for key, value in state.items():
        if _COMPUTED.search(key):
            continue
        new = key
        for pattern, replacement in _RULES:
            match = re.match(pattern, key)
            if match:
                number = int(match[1]) if match.lastindex and match[1].isdigit() else 0
                replacement = replacement.replace("{L}", str(number - 1)).replace("{P}", str(number - 2))
                new = match.expand(replacement.replace("{F}", str(number - 1)))
                break
        out[new] = value
    return out


_EXPORT = [
    (r"^backbone\.conv1\.weight$", "backbone.bottom_up.stem.conv1.weight"),
    (r"^backbone\.bn1\.(.*)$", r"backbone.bottom_up.stem.conv1.norm.\1"),
    (r"^backbone\.layer(\d)\.(\d+)\.conv(\d)\.weight$", r"backbone.bottom_up.res{+1}.\2.conv\3.weight"),
    (r"^backbone\.layer(\d)\.(\d+)\.bn(\d)\.(.*)$", r"backbone.bottom_up.res{+1}.\2.conv\3.norm.\4"),
    (r"^backbone\.layer(\d)\.(\d+)\.downsample\.0\.weight$", r"backbone.bottom_up.res{+1}.\2.shortcut.weight"),
    (r"^backbone\.layer(\d)\.(\d+)\.downsample\.1\.(.*)$", r"backbone.bottom_up.res{+1}.\2.shortcut.norm.\3"),
    (r"^neck\.lateral_convs\.(\d)\.conv\.(.*)$", r"backbone.fpn_lateral{+2}.\2"),
    (r"^neck\.fpn_convs\.(\d)\.conv\.(.*)$", r"backbone.fpn_output{+2}.\2"),
    (r"^rpn_head\.rpn_conv\.(weight|bias)$", r"proposal_generator.rpn_head.conv.\1"),
    (r"^rpn_head\.rpn_cls\.(.*)$", r"proposal_generator.rpn_head.objectness_logits.\1"),
    (r"^rpn_head\.rpn_reg\.(.*)$", r"proposal_generator.rpn_head.anchor_deltas.\1"),
    (r"^roi_head\.bbox_head\.shared_fcs\.(\d)\.(.*)$", r"roi_heads.box_head.fc{+1}.\2"),
    (r"^roi_head\.bbox_head\.fc_cls\.(.*)$", r"roi_heads.box_predictor.cls_score.\1"),
    (r"^roi_head\.bbox_head\.fc_reg\.(.*)$", r"roi_heads.box_predictor.bbox_pred.\1"),
]


def export(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict in Detectron2's keys from one in ours. Raises ValueError for a key it has no place for."""
    out = {}
    for key, value in state.items():
        if key.endswith("num_batches_tracked"):
            continue  # Detectron2's frozen norms do not count
        for pattern, replacement in _EXPORT:
            match = re.match(pattern, key)
            if match:
                shifted = re.sub(r"\{\+(\d)\}", lambda m, n=match: str(int(n[1]) + int(m[1])), replacement)
                out[match.expand(shifted)] = value
                break
        else:
            raise ValueError(f"Detectron2's Faster R-CNN has no place for {key}")
    return out


def profile_options(state: dict[str, Tensor], meta: dict) -> dict:
    """Detectron2's own ResNets have the stride on the first 1x1 convolution; its ResNeXts, with grouped 3x3 convolutions,
    on the 3x3. Pixel statistics are taken from the file where it has them."""
    weight = state.get("backbone.bottom_up.res2.0.conv2.weight")
    grouped = weight is not None and weight.shape[0] != weight.shape[1]
    options = dict(style="pytorch" if grouped else "caffe", norm_eps=1e-5)
    pixels = {key: state[f"pixel_{key}"].flatten().tolist() for key in ("mean", "std") if f"pixel_{key}" in state}
    return {**options, "data_preprocessor": pixels} if pixels else options
