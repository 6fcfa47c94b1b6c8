"""Weights of image classifiers to start a backbone from, by file, address or the short names of MMDetection's configs."""

from pathlib import Path

from torch import Tensor

from fastrcnn.checkpoints.read import read

# torchvision's and OpenMMLab's own addresses; the file names end in the first digits of their SHA-256.
_TORCHVISION = "https://download.pytorch.org/models/"
_OPENMMLAB = "https://download.openmmlab.com/pretrain/third_party/"
SHORT_NAMES = {
    "torchvision://resnet18": _TORCHVISION + "resnet18-f37072fd.pth",
    "torchvision://resnet34": _TORCHVISION + "resnet34-b627a593.pth",
    "torchvision://resnet50": _TORCHVISION + "resnet50-0676ba61.pth",
    "torchvision://resnet101": _TORCHVISION + "resnet101-63fe2227.pth",
    "torchvision://resnet152": _TORCHVISION + "resnet152-394f9c45.pth",
    "torchvision://resnext50_32x4d": _TORCHVISION + "resnext50_32x4d-7cdf4587.pth",
    "torchvision://resnext101_32x8d": _TORCHVISION + "resnext101_32x8d-8ba56ff5.pth",
    "open-mmlab://resnext50_32x4d": _OPENMMLAB + "resnext50-32x4d-0ab1a123.pth",
    "open-mmlab://resnext101_32x4d": _OPENMMLAB + "resnext101_32x4d-a5af3160.pth",
    "open-mmlab://resnext101_64x4d": _OPENMMLAB + "resnext101_64x4d-ee2c6f71.pth",
    "open-mmlab://detectron/resnet50_caffe": _OPENMMLAB + "resnet50_caffe-788b5fa3.pth",
    "open-mmlab://detectron/resnet101_caffe": _OPENMMLAB + "resnet101_caffe-3ad79236.pth",
    "open-mmlab://detectron2/resnet50_caffe": _OPENMMLAB + "resnet50_msra-5891d200.pth",
    "open-mmlab://detectron2/resnet101_caffe": _OPENMMLAB + "resnet101_msra-6cc46731.pth",
    "open-mmlab://detectron2/resnext101_32x8d": _OPENMMLAB + "resnext101_32x8d-1516f1aa.pth",
    "open-mmlab://detectron/resnet50_gn": _OPENMMLAB + "resnet50_gn-9186a21c.pth",
    "open-mmlab://detectron/resnet101_gn": _OPENMMLAB + "resnet101_gn-cac0ab98.pth",
    "open-mmlab://jhu/resnet50_gn_ws": _OPENMMLAB + "resnet50_gn_ws-15beedd8.pth",
    "open-mmlab://jhu/resnet101_gn_ws": _OPENMMLAB + "resnet101_gn_ws-3e3c308c.pth",
    "open-mmlab://jhu/resnext50_32x4d_gn_ws": _OPENMMLAB + "resnext50_32x4d_gn_ws-0d87ac85.pth",
    "open-mmlab://jhu/resnext101_32x4d_gn_ws": _OPENMMLAB + "resnext101_32x4d_gn_ws-34ac1a9e.pth",
    "open-mmlab://resnet50_v1c": _OPENMMLAB + "resnet50_v1c-2cccc1ad.pth",
    "open-mmlab://resnet101_v1c": _OPENMMLAB + "resnet101_v1c-e67eebb6.pth",
}


def pretrained_state(checkpoint: str | Path, prefix: str = "") -> dict[str, Tensor]:
    """The state dict of an image classifier or, with prefix "backbone", of a detector's backbone.

    checkpoint: a file, an https address or a short name such as "torchvision://resnet50". Raises ValueError for an unknown
    short name, otherwise what `read` raises.
    """
    source = str(checkpoint)
    if "://" in source and not source.startswith(("http://", "https://")):
        source = source.replace("modelzoo://", "torchvision://")
        if source not in SHORT_NAMES:
            raise ValueError(f"pretrained: unknown name {source!r}, expected a file, an address or one of "
                             f"{', '.join(SHORT_NAMES)}")  # fmt: skip
        source = SHORT_NAMES[source]
    state, _ = read(source)
    if not prefix:
        return state
    prefix = prefix.rstrip(".") + "."
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
