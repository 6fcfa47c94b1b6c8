"""Puts checkpoints into models, with the semantics of the peer that trained them."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastrcnn.checkpoints.checkpoint import ANCHORS, Checkpoint, as_checkpoint, load_checkpoint, metadata_json
from fastrcnn.checkpoints.peer_options import PeerOptions
from fastrcnn.checkpoints.pretrained import CLASSIFIER, SHORT_NAMES, pretrained_state
from fastrcnn.checkpoints.read import check_finite, read_tensors, within
from fastrcnn.models.pretrained import load_classifier
from fastrcnn.weights.describe import CLASS_LAYERS, check_keys, config_of
from fastrcnn.zoo.published import coco_weights
from fastrcnn.zoo.recipes import Detector, detector, recipe


def _name(source: str | Path | Mapping[str, Tensor]) -> str:
    return "the state dict" if isinstance(source, Mapping) else str(source)


def coco_address(name: str, profile: str | None = None) -> str:
    """The https address of published COCO weights for a named model. Raises ValueError where there are none."""
    return coco_weights(name, profile).address


def infer_model(path_or_url: str | Path | Mapping[str, Tensor], name: str | None = None, **overrides: Any) -> Detector:
    """Builds the model a checkpoint was saved from, from its keys, shapes and metadata, and loads it. In evaluation mode.

    name: the model, where the checkpoint does not tell; overrides: as in `fastrcnn.models.faster_rcnn`. Raises ValueError
    where the checkpoint does not tell or does not fit.
    """
    checkpoint, source = load_checkpoint(path_or_url), _name(path_or_url)
    model = detector(config_of(checkpoint, checkpoint.num_classes, name, overrides, source))
    return _apply(model, checkpoint, source).eval()


def pretrained_model(
    path_or_url: str | Path | Mapping[str, Tensor],
    num_classes: int,
    name: str | None = None,
    class_names: Sequence[str] | None = None,
    **overrides: Any,
) -> Detector:
    """A model of `num_classes` to train, that starts from a checkpoint: a detector of any peer, whose last layers are left
    fresh where it has other classes, or an image classifier (a torchvision ResNet or ResNeXt), for the backbone alone.

    name: the model (default: told by a detector's keys; "r50_fpn" for a classifier); class_names: by label; a checkpoint
    that names others, or these in another order, has other classes; overrides: as in `fastrcnn.models.faster_rcnn`. Raises
    ValueError where the checkpoint does not fit.
    """
    tensors, meta = read_tensors(path_or_url)
    source = _name(path_or_url)
    if not any(key.endswith(ANCHORS) for key in tensors):
        classifier = within(tensors, CLASSIFIER, source)
        if CLASSIFIER[0] in classifier:
            check_finite(classifier, source)
            model = recipe(name or "r50_fpn", num_classes, **overrides)
            body = {f"backbone.{k}": v for k, v in classifier.items() if not k.startswith("fc.")}
            others = {k: v for k, v in model.state_dict().items() if not k.startswith("backbone.")}
            return _apply(model, Checkpoint({**others, **body}, model.profile.name, PeerOptions(), {}), source)
    checkpoint = as_checkpoint(tensors, meta, source)
    model = detector(config_of(checkpoint, num_classes, name, overrides, source))
    return _apply(model, _with_fresh_classes(checkpoint, model, class_names), source)


def start_from(
    model: Detector, path_or_url: str | Path | Mapping[str, Tensor], class_names: Sequence[str] | None = None
) -> Detector:
    """Puts what `pretrained_model` takes, or a short name such as "torchvision://resnet50", into a model to train, in
    place, and returns it. Raises ValueError where it does not fit."""
    source = _name(path_or_url)
    if source in SHORT_NAMES:
        return _with_backbone(model, pretrained_state(source), source)
    tensors, meta = read_tensors(path_or_url)
    if not any(key.endswith(ANCHORS) for key in tensors):
        classifier = within(tensors, CLASSIFIER, source)
        if CLASSIFIER[0] in classifier:
            check_finite(classifier, source)
            return _with_backbone(model, classifier, source)
    checkpoint = as_checkpoint(tensors, meta, source)
    return _apply(model, _with_fresh_classes(checkpoint, model, class_names), source)


def _with_backbone(model: Detector, classifier: dict[str, Tensor], source: str) -> Detector:
    load_classifier(model.backbone, classifier, source)
    return model


def _with_fresh_classes(checkpoint: Checkpoint, model: Detector, class_names: Sequence[str] | None) -> Checkpoint:
    """The checkpoint, with the model's own last layers where its classes are others, or in another order."""
    theirs = checkpoint.categories()[0]
    if checkpoint.num_classes == model.num_classes and not (
        class_names and theirs and list(class_names) != list(theirs)
    ):
        return checkpoint
    fresh = {k: v for k, v in model.state_dict().items() if k.startswith(CLASS_LAYERS)}
    return dataclasses.replace(checkpoint, state={**checkpoint.state, **fresh})


def load_weights(
    model: Detector, path_or_url: str | Path | Mapping[str, Tensor], norm_eps: float | None = None
) -> Detector:
    """Loads a checkpoint of MMDetection, torchvision or Detectron2 into `model`, in place, and returns it.

    path_or_url: a file of `torch.save`, of safetensors or of pickled numpy arrays, an https address (kept in torch.hub's
    cache), or a state dict. The peer is told by its keys; the model takes over that peer's profile (`model.profile`), so
    that it gives the peer's numbers.
    norm_eps: epsilon of the backbone's norms; None takes the peer's. torchvision's published COCO weights need 0, weights
    trained with its frozen norms from ImageNet 1e-5, and the file does not tell: 0 is assumed.
    Raises ValueError naming the missing, unexpected and misshapen keys and those with NaN or infinity, or saying why the
    file was refused. The model is untouched when an error is raised.
    """
    checkpoint = load_checkpoint(path_or_url)
    if norm_eps is not None:
        checkpoint = dataclasses.replace(checkpoint, options=dataclasses.replace(checkpoint.options, norm_eps=norm_eps))
    return _apply(model, checkpoint, _name(path_or_url))


def _apply(model: Detector, checkpoint: Checkpoint, source: str) -> Detector:
    check_keys(model.state_dict(), checkpoint, source)
    try:
        names, ids = checkpoint.categories()
        config = metadata_json(checkpoint.meta, "mmdet_config", dict) if "mmdet_config" in checkpoint.meta else None
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    channels = model.data_preprocessor.in_channels
    for what in ("mean", "std"):
        if len(values := getattr(checkpoint.options, what) or range(channels)) != channels:
            raise ValueError(f"{source}: {what}: expected one for each of {channels} channels, got {list(values)}")
    # Within the profile it was built for, the model's own choices (a caffe-style C4, say) are what the file does not
    # contradict; elsewhere the peer's defaults are.
    unsaid = PeerOptions() if model.built.profile == checkpoint.peer else checkpoint.unsaid
    model.follow(checkpoint.peer, checkpoint.options.over(unsaid))
    own = model.state_dict()  # with what training in this profile keeps
    model.load_state_dict({k: v for k, v in checkpoint.state.items() if k in own}, strict=False)
    model.class_names = names if names and len(names) == model.num_classes else None
    model.category_ids = ids if ids and len(ids) == model.num_classes else None
    model.config = config or model.config
    return model


def load_pretrained(module: nn.Module, checkpoint: str | Path, prefix: str = "") -> nn.Module:
    """Loads a classifier's (or, with prefix "backbone", a detector's) weights into a backbone, in place; returns it.

    checkpoint: a file, an https address or a short name such as "torchvision://resnet50". Raises ValueError naming what
    does not fit, otherwise what `pretrained_state` raises. `module` is untouched when an error is raised.
    """
    load_classifier(module, pretrained_state(checkpoint, prefix), str(checkpoint))
    return module
