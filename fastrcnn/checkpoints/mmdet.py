"""MMDetection's keys are ours; older checkpoints differ in a few names."""

import re

from torch import Tensor

from fastrcnn.checkpoints.peer_options import OURS, PeerOptions

CAFFE_INPUT = PeerOptions(mean=(103.53, 116.28, 123.675), std=(1.0, 1.0, 1.0), bgr_to_rgb=False)

# The class layer of a Faster R-CNN (of MMDetection 2 and, to be refused, 1), of a RetinaNet and of an RPN alone.
ANCHORS = (
    "roi_head.bbox_head.fc_cls.weight",
    "bbox_head.fc_cls.weight",
    "bbox_head.retina_cls.weight",
    "rpn_head.rpn_cls.weight",
)


def detect(state: dict[str, Tensor]) -> bool:
    return any(key in state for key in ANCHORS)


def check_version(state: dict[str, Tensor], meta: dict) -> None:
    """Raises ValueError for MMDetection 1.x: its background is class 0, and its anchors and box coder differ.

    Its box head is outside of roi_head, and has boxes for the background, too, where they are predicted class by class. A
    version 1.x alone does not tell: weights published for 2.0 were trained before the number was raised.
    """
    boxes, classes = (len(state.get(f"roi_head.bbox_head.{name}.weight", ())) for name in ("fc_reg", "fc_cls"))
    version = str(meta.get("mmdet_version", ""))
    if "bbox_head.fc_cls.weight" in state or (boxes > 0 and boxes == 4 * classes) or version.startswith("0."):
        raise ValueError(
            "expected weights of MMDetection 2 or 3, got those of 1.x or older, whose background is class 0 and whose "
            f"anchors and box coder differ (mmdet_version {version or 'not given'})"
        )


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict in our keys. Early checkpoints keep the layer that predicts a deformable convolution's offsets beside
    it. mmcv's EMAHook leaves the other of two versions of each weight as `ema_backbone_conv1_weight`: the plain names hold
    the one that was evaluated."""
    out = {}
    for key, value in state.items():
        key = re.sub(r"\.conv(\d)_offset\.", r".conv\1.conv_offset.", key)
        if not key.startswith(("data_preprocessor.", "ema_")):
            out[key] = value
    return out


def export(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """MMDetection's keys are ours."""
    return {key: value for key, value in state.items() if not key.endswith(OURS)}


_LONGEST = 1_000_000  # letters of a configuration's text that are looked at
_NUMBER = r"\s*(-?\d+(?:\.\d*)?(?:e-?\d+)?)\s*"
_COLOUR = rf"[\[(]{_NUMBER},{_NUMBER},{_NUMBER}(?:,\s*)?[\])]"
# Where a configuration's text keeps the input's statistics, and how it calls the order of their channels: MMDetection 3
# in the model (BGR where it is silent), 2 and 1 beside the pipelines (RGB where it is silent).
_INPUTS = (("data_preprocessor", "bgr_to_rgb", False), ("img_norm_cfg", "to_rgb", True))


def _call(text: str, name: str) -> str:
    """What stands between the outermost brackets of `name=dict(...)` or `name: {...}`; empty where there is none."""
    start = re.search(rf"\b{name}['\"]?\s*[=:]\s*(?:dict\s*\(|\{{)", text)
    if start is None:
        return ""
    depth = 1
    for i, letter in enumerate(text[start.end() :], start.end()):
        depth += (letter in "([{") - (letter in ")]}")
        if depth == 0:
            return text[start.end() : i]
    return ""


def _value(text: str, name: str, pattern: str) -> re.Match | None:
    return re.search(rf"\b{name}['\"]?\s*[=:]\s*{pattern}", text)


def _input_options(text: str) -> PeerOptions:
    for name, order, default in _INPUTS:
        part = _call(text, name)
        mean, std = (_value(part, key, _COLOUR) for key in ("mean", "std"))
        if mean and std:
            rgb = _value(part, order, "(True|False)")
            colours = {key: tuple(map(float, found.groups())) for key, found in (("mean", mean), ("std", std))}
            return PeerOptions.read({**colours, "bgr_to_rgb": default if rgb is None else rgb[1] == "True"})
    return PeerOptions()


def profile_options(state: dict[str, Tensor], meta: dict) -> PeerOptions:
    """What the checkpoint's own configuration text says: the backbone's style, and the input's statistics and order of
    channels. A caffe style without statistics stands for BGR and no division, as with the weights of that name."""
    text = meta.get("cfg") or meta.get("config")
    text = text if isinstance(text, str) and len(text) <= _LONGEST else ""
    found = re.search(r"\bstyle['\"]?\s*[=:]\s*['\"](caffe|pytorch)['\"]", text)
    style = PeerOptions(style=found[1] if found else None)
    pixels = _input_options(text)
    return style.over(CAFFE_INPUT if pixels.mean is None and style.style == "caffe" else pixels)


def class_names(meta: dict) -> list[str] | None:
    data = meta.get("dataset_meta") or meta
    names = data.get("CLASSES") or data.get("classes") if isinstance(data, dict) else None
    if isinstance(names, str):  # one class whose tuple lost its comma
        return [names]
    known = isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names)
    return list(names) if known else None
