"""MMDetection's keys are ours; older checkpoints differ in a few names."""

import re

from torch import Tensor

CAFFE_INPUT = dict(mean=(103.53, 116.28, 123.675), std=(1.0, 1.0, 1.0), bgr_to_rgb=False)


def detect(state: dict[str, Tensor]) -> bool:
    return "roi_head.bbox_head.fc_cls.weight" in state or "bbox_head.fc_cls.weight" in state


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict in our keys. MMDetection 1.x kept the box head outside of roi_head."""
    out = {}
    for key, value in state.items():
        key = re.sub(r"^bbox_head\.", "roi_head.bbox_head.", key)
        if not key.startswith(("data_preprocessor.", "mask_head.", "roi_head.mask_head.")):
            out[key] = value
    return out


def export(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """MMDetection's keys are ours."""
    return dict(state)


def profile_options(state: dict[str, Tensor], meta: dict) -> dict:
    """What the checkpoint's own configuration text says about the input: the caffe style of its backbone."""
    text = str(meta.get("cfg") or meta.get("config") or "")
    if not re.search(r"style\s*=\s*['\"]caffe['\"]", text):
        return {}
    return dict(style="caffe", data_preprocessor=CAFFE_INPUT)


def class_names(meta: dict) -> list[str] | None:
    data = meta.get("dataset_meta") or meta
    names = data.get("CLASSES") or data.get("classes") if isinstance(data, dict) else None
    return list(names) if names else None
