"""torchvision's Faster R-CNN and RetinaNet (resnet50_fpn and _v2): keys, class order and norm epsilon."""

import re

import torch
from torch import Tensor

from fastrcnn.checkpoints.peer_options import OURS, PeerOptions

# (pattern, replacement), the first that matches; {i} below is a level or layer index.
_RULES = [
    (r"^backbone\.body\.(.*)$", r"backbone.\1"),
    (r"^backbone\.fpn\.inner_blocks\.(\d+)\.0\.(.*)$", r"neck.lateral_convs.\1.conv.\2"),
    (r"^backbone\.fpn\.inner_blocks\.(\d+)\.1\.(.*)$", r"neck.lateral_convs.\1.bn.\2"),
    (r"^backbone\.fpn\.inner_blocks\.(\d+)\.(weight|bias)$", r"neck.lateral_convs.\1.conv.\2"),
    (r"^backbone\.fpn\.layer_blocks\.(\d+)\.0\.(.*)$", r"neck.fpn_convs.\1.conv.\2"),
    (r"^backbone\.fpn\.layer_blocks\.(\d+)\.1\.(.*)$", r"neck.fpn_convs.\1.bn.\2"),
    (r"^backbone\.fpn\.layer_blocks\.(\d+)\.(weight|bias)$", r"neck.fpn_convs.\1.conv.\2"),
    (r"^rpn\.head\.conv\.(weight|bias)$", r"rpn_head.rpn_conv.\1"),
    (r"^rpn\.head\.conv\.(\d+)\.0\.(.*)$", r"rpn_head.rpn_conv.\1.conv.\2"),
    (r"^rpn\.head\.cls_logits\.(.*)$", r"rpn_head.rpn_cls.\1"),
    (r"^rpn\.head\.bbox_pred\.(.*)$", r"rpn_head.rpn_reg.\1"),
    (r"^roi_heads\.box_head\.fc6\.(.*)$", r"roi_head.bbox_head.shared_fcs.0.\1"),
    (r"^roi_heads\.box_head\.fc7\.(.*)$", r"roi_head.bbox_head.shared_fcs.1.\1"),
    (r"^roi_heads\.box_head\.(\d)\.0\.(.*)$", r"roi_head.bbox_head.shared_convs.\1.conv.\2"),
    (r"^roi_heads\.box_head\.(\d)\.1\.(.*)$", r"roi_head.bbox_head.shared_convs.\1.bn.\2"),
    (r"^roi_heads\.box_head\.5\.(.*)$", r"roi_head.bbox_head.shared_fcs.0.\1"),
    (r"^roi_heads\.box_predictor\.cls_score\.(.*)$", r"roi_head.bbox_head.fc_cls.\1"),
    (r"^roi_heads\.box_predictor\.bbox_pred\.(.*)$", r"roi_head.bbox_head.fc_reg.\1"),
    (r"^backbone\.fpn\.extra_blocks\.p6\.(.*)$", r"neck.fpn_convs.3.conv.\1"),
    (r"^backbone\.fpn\.extra_blocks\.p7\.(.*)$", r"neck.fpn_convs.4.conv.\1"),
    (r"^head\.classification_head\.conv\.(\d)\.0\.(.*)$", r"bbox_head.cls_convs.\1.conv.\2"),
    (r"^head\.classification_head\.conv\.(\d)\.1\.(.*)$", r"bbox_head.cls_convs.\1.gn.\2"),
    (r"^head\.classification_head\.cls_logits\.(.*)$", r"bbox_head.retina_cls.\1"),
    (r"^head\.regression_head\.conv\.(\d)\.0\.(.*)$", r"bbox_head.reg_convs.\1.conv.\2"),
    (r"^head\.regression_head\.conv\.(\d)\.1\.(.*)$", r"bbox_head.reg_convs.\1.gn.\2"),
    (r"^head\.regression_head\.bbox_reg\.(.*)$", r"bbox_head.retina_reg.\1"),
]
# RetinaNet's towers were convolutions and ReLUs in turn when its first weights were published: conv.0, conv.2, conv.4...
_OLD_TOWER = re.compile(r"^(head\.(?:classification|regression)_head\.conv)\.(\d)\.(weight|bias)$")


ANCHORS = ("roi_heads.box_predictor.cls_score.weight", "head.classification_head.cls_logits.weight")


def detect(state: dict[str, Tensor]) -> bool:
    fcos = "head.regression_head.bbox_ctrness.weight" in state
    return "backbone.body.conv1.weight" in state and any(key in state for key in ANCHORS) and not fcos


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict in our keys: background from first to last, its unused box regression dropped."""
    convs = {k for k in state if re.match(r"^rpn\.head\.conv\.\d+\.0\.weight$", k)}
    out = {}
    for key, value in state.items():
        key = _OLD_TOWER.sub(lambda m: f"{m[1]}.{int(m[2]) // 2}.0.{m[3]}", key)
        for pattern, replacement in _RULES:
            new, hits = re.subn(pattern, replacement, key)
            if hits:
                break
        else:
            new = key  # left over: load_weights names it
        if len(convs) == 1:  # one convolution is no sequence in MMDetection's head
            new = new.replace("rpn_head.rpn_conv.0.conv.", "rpn_head.rpn_conv.")
        if new.startswith("roi_head.bbox_head.fc_cls."):
            value = torch.cat([value[1:], value[:1]])
        elif new.startswith("roi_head.bbox_head.fc_reg."):
            value = value[4:]
        out[new] = value
    return out


# A plain ResNet's keys: not those of plugins, group norms, a deep stem or the offsets of deformable convolutions.
_BODY = (
    r"(?:conv1|layer\d\.\d+\.conv\d|layer\d\.\d+\.downsample\.0)\.weight|"
    r"(?:bn1|layer\d\.\d+\.bn\d|layer\d\.\d+\.downsample\.1)\.\w+"
)
_EXPORT = [
    (rf"^backbone\.({_BODY})$", r"backbone.body.\1"),
    (r"^neck\.lateral_convs\.(\d+)\.conv\.(.*)$", r"backbone.fpn.inner_blocks.\1.0.\2"),
    (r"^neck\.lateral_convs\.(\d+)\.bn\.(.*)$", r"backbone.fpn.inner_blocks.\1.1.\2"),
    (r"^neck\.fpn_convs\.(\d+)\.conv\.(.*)$", r"backbone.fpn.layer_blocks.\1.0.\2"),
    (r"^neck\.fpn_convs\.(\d+)\.bn\.(.*)$", r"backbone.fpn.layer_blocks.\1.1.\2"),
    (r"^rpn_head\.rpn_conv\.(weight|bias)$", r"rpn.head.conv.0.0.\1"),
    (r"^rpn_head\.rpn_conv\.(\d+)\.conv\.(.*)$", r"rpn.head.conv.\1.0.\2"),
    (r"^rpn_head\.rpn_cls\.(.*)$", r"rpn.head.cls_logits.\1"),
    (r"^rpn_head\.rpn_reg\.(.*)$", r"rpn.head.bbox_pred.\1"),
    (r"^roi_head\.bbox_head\.shared_convs\.(\d+)\.conv\.(.*)$", r"roi_heads.box_head.\1.0.\2"),
    (r"^roi_head\.bbox_head\.shared_convs\.(\d+)\.bn\.(.*)$", r"roi_heads.box_head.\1.1.\2"),
    (r"^roi_head\.bbox_head\.fc_cls\.(.*)$", r"roi_heads.box_predictor.cls_score.\1"),
    (r"^roi_head\.bbox_head\.fc_reg\.(.*)$", r"roi_heads.box_predictor.bbox_pred.\1"),
    (r"^bbox_head\.cls_convs\.(\d+)\.conv\.(.*)$", r"head.classification_head.conv.\1.0.\2"),
    (r"^bbox_head\.cls_convs\.(\d+)\.gn\.(.*)$", r"head.classification_head.conv.\1.1.\2"),
    (r"^bbox_head\.retina_cls\.(.*)$", r"head.classification_head.cls_logits.\1"),
    (r"^bbox_head\.reg_convs\.(\d+)\.conv\.(.*)$", r"head.regression_head.conv.\1.0.\2"),
    (r"^bbox_head\.reg_convs\.(\d+)\.gn\.(.*)$", r"head.regression_head.conv.\1.1.\2"),
    (r"^bbox_head\.retina_reg\.(.*)$", r"head.regression_head.bbox_reg.\1"),
]
_EXPORT_P6_P7 = {
    "neck.fpn_convs.3.conv": "backbone.fpn.extra_blocks.p6",
    "neck.fpn_convs.4.conv": "backbone.fpn.extra_blocks.p7",
}


def export(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict in torchvision's keys from one in ours: the background moves to the front and gets box regression of 0,
    which torchvision never reads. Raises ValueError for a model without a neck, for a key that torchvision's models have no
    place for and for boxes that are not predicted class by class."""
    if not any(key.startswith("neck.") for key in state):
        raise ValueError("torchvision has no detector without a pyramid, and this model has no neck")
    boxes, classes = (len(state.get(f"roi_head.bbox_head.{name}.weight", ())) for name in ("fc_reg", "fc_cls"))
    if classes > 2 and boxes == 4:
        raise ValueError(
            f"roi_head.bbox_head.fc_reg: torchvision predicts boxes class by class, expected {4 * (classes - 1)} rows, got "
            f"the 4 of reg_class_agnostic"
        )
    v2 = "roi_head.bbox_head.shared_convs.0.conv.weight" in state
    retina = "bbox_head.retina_cls.weight" in state
    fcs = {"0": "5"} if v2 else {"0": "fc6", "1": "fc7"}
    out = {}
    for key, value in state.items():
        if key.endswith(OURS):
            continue
        fc = re.match(r"^roi_head\.bbox_head\.shared_fcs\.(\d)\.(.*)$", key)
        if fc and fc[1] in fcs:
            new = f"roi_heads.box_head.{fcs[fc[1]]}.{fc[2]}"
        elif retina and key.rpartition(".")[0] in _EXPORT_P6_P7:
            new = f"{_EXPORT_P6_P7[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}"
        else:
            new = next((re.sub(p, r, key) for p, r in _EXPORT if re.match(p, key)), None)
        if new is None:
            raise ValueError(f"torchvision's detectors have no place for {key}")
        if key.startswith("roi_head.bbox_head.fc_cls."):
            value = torch.cat([value[-1:], value[:-1]])
        elif key.startswith("roi_head.bbox_head.fc_reg."):
            value = torch.cat([torch.zeros_like(value[:4]), value])
        out[new] = value
    return out


def own_style(state: dict[str, Tensor]) -> str:
    """The one style of torchvision's bottlenecks: their stride is on the 3x3 convolution."""
    return "pytorch"


def profile_options(state: dict[str, Tensor], meta: dict) -> PeerOptions:
    """torchvision sets eps = 0 in the frozen norms of its published COCO weights. A frozen norm, unlike BatchNorm2d, has
    no num_batches_tracked; the eps itself is not in the file."""
    frozen = not any(k.endswith("num_batches_tracked") for k in state)
    return PeerOptions(style="pytorch", norm_eps=0.0 if frozen else 1e-5)
