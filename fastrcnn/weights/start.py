"""The model that a training begins with."""

from collections.abc import Sequence
from pathlib import Path

from fastrcnn.weights.load import coco_address, load_pretrained, load_weights, pretrained_model
from fastrcnn.weights.named import named_model
from fastrcnn.zoo.config_file import read_config
from fastrcnn.zoo.mmdet_config import from_mmdet_config
from fastrcnn.zoo.recipes import RPNS, Detector


def is_config(name: str | None) -> bool:
    """Whether `name` is that of a config file, by its ending, and not of a model."""
    return name is not None and Path(name).suffix in (".py", ".json", ".yaml", ".yml")


def model_to_train(name: str | None, weights: str | Path | None, class_names: Sequence[str], **overrides) -> Detector:
    """A detector of these classes. name: of a model, or an MMDetection config file; None is told by the weights, else
    r50_fpn; weights: "coco" for published ones, or what `pretrained_model` takes; without any, nothing stays frozen at
    random values. overrides: as in `fastrcnn.models.faster_rcnn`. Raises ValueError or OSError."""
    classes = 1 if name in RPNS else len(class_names)
    if is_config(name):
        return _of_config(name, weights, classes, overrides)
    if weights == "coco":
        weights = coco_address(name or "r50_fpn")
    if weights is not None:
        return pretrained_model(weights, classes, name, class_names, **overrides)
    backbone = dict(frozen_stages=-1, norm_eval=False, norm_cfg=dict(requires_grad=True))
    return named_model(name or "r50_fpn", classes, backbone=backbone, **overrides)


def _of_config(path: str, weights, classes: int, overrides: dict) -> Detector:
    config = read_config(path)

    def with_classes(part):
        if isinstance(part, list | tuple):
            return type(part)(with_classes(v) for v in part)
        if not isinstance(part, dict):
            return part
        return {
            k: classes if k == "num_classes" else v if k == "rpn_head" else with_classes(v) for k, v in part.items()
        }

    model = from_mmdet_config({**config, "model": with_classes(config.get("model"))})
    for side in ("min_size", "max_size"):
        if side in overrides:
            setattr(model.data_preprocessor, side, overrides[side])
    if weights is None:
        model.init_weights()  # from what the config names
        return model
    try:
        return load_weights(model, weights)
    except ValueError:
        load_pretrained(model.backbone, weights)
        return model
