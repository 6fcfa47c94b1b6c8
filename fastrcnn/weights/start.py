"""The model that a training begins with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeGuard

import torch

from fastrcnn.checkpoints.pretrained import SHORT_NAMES
from fastrcnn.models.build import merge
from fastrcnn.weights.load import coco_address, pretrained_model, start_from
from fastrcnn.weights.named import named_model
from fastrcnn.zoo.config_file import read_config
from fastrcnn.zoo.mmdet_config import from_mmdet_config
from fastrcnn.zoo.recipes import RPNS, Detector, detector

ALL_TRAINS = dict(frozen_stages=-1, norm_eval=False, norm_cfg=dict(requires_grad=True))  # of random weights


def is_config(name: str | None) -> TypeGuard[str]:
    """Whether `name` is that of a config file, by its ending, and not of a model."""
    return name is not None and Path(name).suffix in (".py", ".json", ".yaml", ".yml")


def model_to_train(
    name: str | None, weights: str | Path | None, class_names: Sequence[str], **overrides: Any
) -> Detector:
    """A detector of these classes. name: of a model, or an MMDetection config file; None is told by the weights, else
    r50_fpn; weights: "coco" for published ones, "torchvision://resnet50" and the like, or what `pretrained_model` takes;
    without any, nothing stays frozen at random values. overrides: as in `fastrcnn.models.faster_rcnn`. Raises ValueError or
    OSError."""
    classes = 1 if name in RPNS else len(class_names)
    if is_config(name):
        if weights == "coco":
            raise ValueError("weights: 'coco' are a named model's, expected a file or an address beside a config")
        return _of_config(name, weights, class_names, overrides)
    if weights == "coco":
        weights = coco_address(name or "r50_fpn")
    if str(weights).startswith("torchvision://"):  # the other short names are of other strides and pixels
        weights = SHORT_NAMES.get(str(weights), weights)
    if weights is not None:
        return pretrained_model(weights, classes, name, class_names, **overrides)
    return named_model(name or "r50_fpn", classes, **merge(dict(backbone=ALL_TRAINS), overrides))


def _of_config(
    path: str, weights: str | Path | None, class_names: Sequence[str], overrides: dict[str, Any]
) -> Detector:
    content = read_config(path)

    def with_classes(part: Any) -> Any:
        if isinstance(part, list | tuple):
            return type(part)(with_classes(v) for v in part)
        if not isinstance(part, dict):
            return part
        return {
            k: len(class_names) if k == "num_classes" else v if k == "rpn_head" else with_classes(v)
            for k, v in part.items()
        }

    with torch.device("meta"):  # for the arguments that the config stands for
        told = from_mmdet_config({**content, "model": with_classes(content.get("model"))})
    config = merge(told.built.arguments, overrides)
    if weights is None and told.backbone.pretrained is None:
        config = merge(config, dict(backbone=ALL_TRAINS))
    model = detector(config)
    model.config = told.config
    if weights is not None:
        return start_from(model, weights, class_names)
    model.init_weights()  # from what the config names
    return model
