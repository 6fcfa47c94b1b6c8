"""Detectron2's R-CNN models (FPN, C4, DC5) and RetinaNets: keys, order of anchors, its input (BGR, std 1) and caffe-style
bottlenecks.

A C4 or DC5 model has no pyramid, hence no `bottom_up` in its keys; C4's last stage is in the RoI heads.

Its files do not say where a bottleneck's stride is, nor, since the statistics of the input are no longer saved, how the
input was normalised: `defaults` has what Detectron2's own configurations say.

Anchors: Detectron2's RPN counts them size by size, and the ratios within each; MMDetection's, and so ours, ratio by ratio.
With one size a level (FPN) that is the same; with C4's and DC5's five, the rows of the RPN's two output layers are put in
our order when read and back when written. So a model has one order of anchors whatever the weights in it, and those of
another peer can follow. (RetinaNet's order is the profile's: its anchors differ between the peers in any case.)
"""

import re

import torch
from torch import Tensor

_RULES = [
    (r"^backbone\.bottom_up\.stem\.conv1\.weight$", r"backbone.conv1.weight"),
    (r"^backbone\.bottom_up\.stem\.conv1\.norm\.(.*)$", r"backbone.{N}1.\1"),
    (r"^backbone\.bottom_up\.res(\d)\.(\d+)\.conv(\d)\.weight$", r"backbone.layer{L}.\2.conv\3.weight"),
    (r"^backbone\.bottom_up\.res(\d)\.(\d+)\.conv2_offset\.(.*)$", r"backbone.layer{L}.\2.conv2.conv_offset.\3"),
    (r"^backbone\.bottom_up\.res(\d)\.(\d+)\.conv(\d)\.norm\.(.*)$", r"backbone.layer{L}.\2.{N}\3.\4"),
    (r"^backbone\.bottom_up\.res(\d)\.(\d+)\.shortcut\.weight$", r"backbone.layer{L}.\2.downsample.0.weight"),
    (r"^backbone\.bottom_up\.res(\d)\.(\d+)\.shortcut\.norm\.(.*)$", r"backbone.layer{L}.\2.downsample.1.\3"),
    (r"^backbone\.fpn_lateral(\d)\.norm\.(.*)$", r"neck.lateral_convs.{P}.{N}.\2"),
    (r"^backbone\.fpn_lateral(\d)\.(.*)$", r"neck.lateral_convs.{P}.conv.\2"),
    (r"^backbone\.fpn_output(\d)\.norm\.(.*)$", r"neck.fpn_convs.{P}.{N}.\2"),
    (r"^backbone\.fpn_output(\d)\.(.*)$", r"neck.fpn_convs.{P}.conv.\2"),
    (r"^proposal_generator\.rpn_head\.conv\.(.*)$", r"rpn_head.rpn_conv.\1"),
    (r"^proposal_generator\.rpn_head\.objectness_logits\.(.*)$", r"rpn_head.rpn_cls.\1"),
    (r"^proposal_generator\.rpn_head\.anchor_deltas\.(.*)$", r"rpn_head.rpn_reg.\1"),
    (r"^roi_heads\.box_head\.conv(\d)\.norm\.(.*)$", r"roi_head.bbox_head.shared_convs.{F}.{N}.\2"),
    (r"^roi_heads\.box_head\.conv(\d)\.(.*)$", r"roi_head.bbox_head.shared_convs.{F}.conv.\2"),
    (r"^roi_heads\.box_head\.fc(\d)\.(.*)$", r"roi_head.bbox_head.shared_fcs.{F}.\2"),
    (r"^roi_heads\.box_predictor\.cls_score\.(.*)$", r"roi_head.bbox_head.fc_cls.\1"),
    (r"^roi_heads\.box_predictor\.bbox_pred\.(.*)$", r"roi_head.bbox_head.fc_reg.\1"),
    (r"^backbone\.top_block\.p(\d)\.(.*)$", r"neck.fpn_convs.{P}.conv.\2"),
    (r"^head\.cls_subnet\.(\d)\.(.*)$", r"bbox_head.cls_convs.{H}.conv.\2"),
    (r"^head\.bbox_subnet\.(\d)\.(.*)$", r"bbox_head.reg_convs.{H}.conv.\2"),
    (r"^head\.cls_score\.(.*)$", r"bbox_head.retina_cls.\1"),
    (r"^head\.bbox_pred\.(.*)$", r"bbox_head.retina_reg.\1"),
]
# Buffers that Detectron2 saves and can compute: pixel statistics and anchors.
_COMPUTED = re.compile(r"(^pixel_(mean|std)$)|(anchor_generator\.)")
_RPN_LAYERS = ("rpn_head.rpn_cls.", "rpn_head.rpn_reg.")


def _transposed(rows: Tensor, groups: int, anchors: int) -> Tensor:
    """The rows of an RPN's output layer, those of `anchors` anchors, from group by group to member by member.

    Rows that do not divide so stay as they are: `load_weights` names their shape.
    """
    if anchors == 0 or anchors % groups or len(rows) % anchors:
        return rows
    grid = rows.reshape(groups, anchors // groups, len(rows) // anchors, *rows.shape[1:])
    return grid.transpose(0, 1).reshape(rows.shape)


def _file_ratios(state: dict[str, Tensor], anchors: int) -> int:
    """Ratios per size: the anchors of the first one's area, where the file has them; else Detectron2's default."""
    cells = state.get("proposal_generator.anchor_generator.cell_anchors.0")
    if cells is None or cells.shape != (anchors, 4):
        return 3 if anchors % 3 == 0 else anchors
    area = (cells[:, 2:] - cells[:, :2]).double().prod(1)
    return max(int(torch.isclose(area, area[0], rtol=1e-3).sum()), 1)


def detect(state: dict[str, Tensor]) -> bool:
    heads = "proposal_generator.rpn_head.objectness_logits.weight", "head.cls_subnet.0.weight"
    return any(key in state for key in heads)


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    first_level = 3 if "head.cls_subnet.0.weight" in state else 2  # RetinaNet's pyramid starts at P3
    out = {}
    for key, value in state.items():
        if _COMPUTED.search(key):
            continue
        new, full = key, re.sub(r"^(backbone\.(?=stem\.|res\d\.)|roi_heads\.(?=res5\.))", "backbone.bottom_up.", key)
        for pattern, replacement in _RULES:
            match = re.match(pattern, full)
            if match:
                number = int(match[1]) if match.lastindex and match[1].isdigit() else 0
                # A group norm has no statistics; our key names the kind of norm.
                norm = "bn" if f"{key.rpartition('.')[0]}.running_mean" in state else "gn"
                marks = {
                    "{L}": number - 1,
                    "{P}": number - first_level,
                    "{F}": number - 1,
                    "{H}": number // 2,
                    "{N}": norm,
                }
                for mark, text in marks.items():
                    replacement = replacement.replace(mark, str(text))
                new = match.expand(replacement)
                break
        if key.startswith("roi_heads.res5."):
            new = new.replace("backbone.", "roi_head.shared_head.", 1)
        out[new] = value
    anchors = len(out.get("rpn_head.rpn_cls.weight", ()))
    for key in [k for k in out if k.startswith(_RPN_LAYERS)]:
        out[key] = _transposed(out[key], max(anchors // _file_ratios(state, anchors), 1), anchors)
    return out


_EXPORT = [
    (r"^backbone\.conv1\.weight$", "backbone.bottom_up.stem.conv1.weight"),
    (r"^backbone\.(?:bn|gn)1\.(.*)$", r"backbone.bottom_up.stem.conv1.norm.\1"),
    (r"^backbone\.layer(\d)\.(\d+)\.conv(\d)\.weight$", r"backbone.bottom_up.res{+1}.\2.conv\3.weight"),
    (r"^backbone\.layer(\d)\.(\d+)\.conv2\.conv_offset\.(.*)$", r"backbone.bottom_up.res{+1}.\2.conv2_offset.\3"),
    (r"^backbone\.layer(\d)\.(\d+)\.(?:bn|gn)(\d)\.(.*)$", r"backbone.bottom_up.res{+1}.\2.conv\3.norm.\4"),
    (r"^backbone\.layer(\d)\.(\d+)\.downsample\.0\.weight$", r"backbone.bottom_up.res{+1}.\2.shortcut.weight"),
    (r"^backbone\.layer(\d)\.(\d+)\.downsample\.1\.(.*)$", r"backbone.bottom_up.res{+1}.\2.shortcut.norm.\3"),
    (r"^neck\.lateral_convs\.(\d)\.conv\.(weight|bias)$", r"backbone.fpn_lateral{+2}.\2"),
    (r"^neck\.lateral_convs\.(\d)\.(?:bn|gn)\.(.*)$", r"backbone.fpn_lateral{+2}.norm.\2"),
    (r"^neck\.fpn_convs\.(\d)\.conv\.(weight|bias)$", r"backbone.fpn_output{+2}.\2"),
    (r"^neck\.fpn_convs\.(\d)\.(?:bn|gn)\.(.*)$", r"backbone.fpn_output{+2}.norm.\2"),
    (r"^rpn_head\.rpn_conv\.(weight|bias)$", r"proposal_generator.rpn_head.conv.\1"),
    (r"^rpn_head\.rpn_cls\.(.*)$", r"proposal_generator.rpn_head.objectness_logits.\1"),
    (r"^rpn_head\.rpn_reg\.(.*)$", r"proposal_generator.rpn_head.anchor_deltas.\1"),
    (r"^roi_head\.bbox_head\.shared_convs\.(\d)\.conv\.(weight|bias)$", r"roi_heads.box_head.conv{+1}.\2"),
    (r"^roi_head\.bbox_head\.shared_convs\.(\d)\.(?:bn|gn)\.(.*)$", r"roi_heads.box_head.conv{+1}.norm.\2"),
    (r"^roi_head\.bbox_head\.shared_fcs\.(\d)\.(.*)$", r"roi_heads.box_head.fc{+1}.\2"),
    (r"^roi_head\.bbox_head\.fc_cls\.(.*)$", r"roi_heads.box_predictor.cls_score.\1"),
    (r"^roi_head\.bbox_head\.fc_reg\.(.*)$", r"roi_heads.box_predictor.bbox_pred.\1"),
]
_EXPORT_RETINANET = [
    *(rule for rule in _EXPORT if rule[0].startswith(r"^backbone")),
    (r"^neck\.lateral_convs\.(\d)\.conv\.(weight|bias)$", r"backbone.fpn_lateral{+3}.\2"),
    (r"^neck\.lateral_convs\.(\d)\.(?:bn|gn)\.(.*)$", r"backbone.fpn_lateral{+3}.norm.\2"),
    (r"^neck\.fpn_convs\.([012])\.conv\.(weight|bias)$", r"backbone.fpn_output{+3}.\2"),
    (r"^neck\.fpn_convs\.([012])\.(?:bn|gn)\.(.*)$", r"backbone.fpn_output{+3}.norm.\2"),
    (r"^neck\.fpn_convs\.([34])\.conv\.(weight|bias)$", r"backbone.top_block.p{+3}.\2"),
    (r"^bbox_head\.cls_convs\.(\d)\.conv\.(.*)$", r"head.cls_subnet.{*2}.\2"),
    (r"^bbox_head\.reg_convs\.(\d)\.conv\.(.*)$", r"head.bbox_subnet.{*2}.\2"),
    (r"^bbox_head\.retina_cls\.(.*)$", r"head.cls_score.\1"),
    (r"^bbox_head\.retina_reg\.(.*)$", r"head.bbox_pred.\1"),
]


def export(state: dict[str, Tensor], ratios: int = 3) -> dict[str, Tensor]:
    """State dict in Detectron2's keys from one in ours. ratios: of the RPN's anchors at each size. Raises ValueError for a
    key it has no place for."""
    rules = _EXPORT_RETINANET if "bbox_head.retina_cls.weight" in state else _EXPORT
    body = "backbone.bottom_up." if any(key.startswith("neck.") for key in state) else "backbone."
    anchors = len(state.get("rpn_head.rpn_cls.weight", ()))
    out = {}
    for key, value in state.items():
        if key.endswith("num_batches_tracked"):
            continue  # Detectron2's frozen norms do not count
        # Detectron2 has no deformable convolutions in the last stage of a C4.
        full = re.sub(r"^roi_head\.shared_head\.(?=layer4\.)(?!.*conv_offset)", "backbone.", key)
        for pattern, replacement in rules:
            match = re.match(pattern, full)
            if match:
                shifted = re.sub(r"\{\+(\d)\}", lambda m, n=match: str(int(n[1]) + int(m[1])), replacement)
                shifted = re.sub(r"\{\*2\}", lambda m, n=match: str(int(n[1]) * 2), shifted)
                owner = body if full == key else "roi_heads."
                new = match.expand(shifted).replace("backbone.bottom_up.", owner, 1)
                out[new] = _transposed(value, ratios, anchors) if key.startswith(_RPN_LAYERS) else value
                break
        else:
            raise ValueError(f"Detectron2's detectors have no place for {key}")
    return out


def _groups(state: dict[str, Tensor]) -> tuple[int, int]:
    """(groups, channels in each) of the first 3x3 convolution; state in our keys."""
    weight = state.get("backbone.layer1.0.conv2.weight")
    if weight is None or weight.dim() != 4:
        return 1, 0
    return weight.shape[0] // weight.shape[1], weight.shape[1]


def own_style(state: dict[str, Tensor]) -> str:
    """MODEL.RESNETS.STRIDE_IN_1X1 of Detectron2's own models, state in our keys: ResNets have the stride on the first 1x1
    convolution, ResNeXts, with grouped 3x3 convolutions, on the 3x3."""
    return "pytorch" if _groups(state)[0] > 1 else "caffe"


def defaults(state: dict[str, Tensor]) -> dict:
    """What Detectron2's own model of these weights, in our keys, has and its files do not say."""
    options: dict = dict(style=own_style(state))
    blocks = {key.split(".")[2] for key in state if key.startswith("backbone.layer3.")}
    if _groups(state) == (32, 8) and len(blocks) == 23:  # X101's ImageNet weights come from Caffe2, as does its input
        options["data_preprocessor"] = dict(std=(57.375, 57.12, 58.395))
    return options


def profile_options(state: dict[str, Tensor], meta: dict) -> dict:
    """Pixel statistics where the file has them. Their order is that of the channels: in photographs blue has the lowest
    mean and red the highest."""
    pixels: dict = {key: state[f"pixel_{key}"].flatten().tolist() for key in ("mean", "std") if f"pixel_{key}" in state}
    mean = pixels.get("mean", [0.0])
    if mean[0] != mean[-1]:
        pixels["bgr_to_rgb"] = mean[0] > mean[-1]
    return dict(norm_eps=1e-5, data_preprocessor=pixels) if pixels else dict(norm_eps=1e-5)
