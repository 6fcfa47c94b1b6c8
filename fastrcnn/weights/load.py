"""Finds out whose checkpoint it is, converts its keys and gives the model that peer's semantics."""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fastrcnn.models import FasterRCNN, faster_rcnn
from fastrcnn.models.zoo import merge
from fastrcnn.weights import detectron2, files, mmdet, torchvision

# torchvision's own addresses; the file names end in the first digits of their SHA-256.
COCO_WEIGHTS = {
    "r50_fpn": "https://download.pytorch.org/models/fasterrcnn_resnet50_fpn_coco-258fb6c6.pth",
    "r50_fpn_v2": "https://download.pytorch.org/models/fasterrcnn_resnet50_fpn_v2_coco-dd69338a.pth",
}
_CLASS_WEIGHT = "roi_head.bbox_head.fc_cls.weight"
PEERS = {"torchvision": torchvision, "detectron2": detectron2, "mmdet": mmdet}


def _name(source) -> str:
    return "the state dict" if isinstance(source, Mapping) else str(source)


def load_checkpoint(path_or_url: str | Path | Mapping) -> tuple[dict[str, Tensor], str, dict, dict]:
    """(state dict in our keys, peer, the peer's options for the model, metadata).

    Raises ValueError where the keys belong to none of the three peers, and whatever `files.read` raises.
    """
    state, meta = files.read(path_or_url)
    for name, peer in PEERS.items():
        if peer.detect(state):
            profile = meta.get("profile", name)  # our own files say it; their keys are MMDetection's
            return peer.convert(state), profile, peer.profile_options(state, meta), meta
    some = ", ".join(list(state)[:3])
    raise ValueError(
        f"{_name(path_or_url)}: not a Faster R-CNN of MMDetection, torchvision or Detectron2 (first keys: {some})"
    )


def _model_name(state: dict[str, Tensor]) -> str:
    """The zoo's name for a state dict in our keys, from its depths and widths."""
    blocks = tuple(len({k.split(".")[2] for k in state if k.startswith(f"backbone.layer{i}.")}) for i in (1, 2, 3, 4))
    bottleneck = "backbone.layer1.0.conv3.weight" in state
    depth = {(2, 2, 2, 2): 18, (3, 4, 6, 3): 50 if bottleneck else 34, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}.get(
        blocks
    )
    if depth is None or "neck.fpn_convs.0.conv.weight" not in state:
        raise ValueError(f"cannot tell the model from the checkpoint: blocks per stage {blocks}; name it with model=")
    if "rpn_head.rpn_conv.1.conv.weight" in state:
        return f"r{depth}_fpn_v2"
    conv2 = state["backbone.layer1.0.conv2.weight"]
    if bottleneck and conv2.shape[0] != conv2.shape[1]:
        groups = conv2.shape[0] // conv2.shape[1]
        return f"x{depth}_{groups}x{conv2.shape[1]}d_fpn"
    return f"r{depth}_fpn"


def coco_address(name: str) -> str:
    """The https address of published COCO weights for a named model. Raises ValueError where there are none."""
    if name not in COCO_WEIGHTS:
        raise ValueError(f'weights: no "coco" weights are known for {name!r}, only for {", ".join(COCO_WEIGHTS)}')
    return COCO_WEIGHTS[name]


def infer_model(path_or_url: str | Path | Mapping, name: str | None = None, **overrides) -> FasterRCNN:
    """Builds the model a checkpoint was saved from, from its keys, shapes and metadata, and loads it. In evaluation mode.

    name: the model, where the checkpoint does not tell; overrides: as in `fastrcnn.models.faster_rcnn`. Raises ValueError
    where the checkpoint does not tell or does not fit.
    """
    state, profile, options, meta = load_checkpoint(path_or_url)
    num_classes = len(state[_CLASS_WEIGHT]) - 1
    model = _build(state, profile, meta, num_classes, name, overrides)
    _apply(model, state, profile, options, meta, _name(path_or_url), None)
    return model.eval()


def _build(state, profile, meta, num_classes, name, overrides) -> FasterRCNN:
    name = name or meta.get("model") or _model_name(state)
    if "overrides" in meta:  # our own files carry what differs from the named model, as JSON
        overrides = merge(json.loads(meta["overrides"]), overrides)
    return faster_rcnn(name, num_classes, profile, **overrides)


def pretrained_model(
    path_or_url: str | Path | Mapping, num_classes: int, name: str | None = None, **overrides
) -> FasterRCNN:
    """A model of `num_classes` to train, that starts from a checkpoint: a detector of any peer, whose last layers are left
    fresh where it has other classes, or an image classifier (a torchvision ResNet or ResNeXt), for the backbone alone.

    name: the model (default: told by a detector's keys; "r50_fpn" for a classifier); overrides: as in
    `fastrcnn.models.faster_rcnn`. Raises ValueError where the checkpoint does not fit.
    """
    content, meta = files.read(path_or_url)
    if "layer1.0.conv1.weight" in content:
        model = faster_rcnn(name or "r50_fpn", num_classes, **overrides)
        body = {f"backbone.{k}": v for k, v in content.items() if not k.startswith("fc.")}
        others = {k: v for k, v in model.state_dict().items() if not k.startswith("backbone.")}
        _apply(model, {**others, **body}, model.profile.name, {}, {}, _name(path_or_url), None)
        return model
    state, profile, options, meta = load_checkpoint({"state_dict": content, "meta": meta})
    model = _build(state, profile, meta, num_classes, name, overrides)
    if len(state[_CLASS_WEIGHT]) - 1 != num_classes:
        last = tuple(f"roi_head.bbox_head.{layer}." for layer in ("fc_cls", "fc_reg"))
        state = {**state, **{k: v for k, v in model.state_dict().items() if k.startswith(last)}}
    _apply(model, state, profile, options, meta, _name(path_or_url), None)
    return model


def load_weights(model: FasterRCNN, path_or_url: str | Path | Mapping, norm_eps: float | None = None) -> FasterRCNN:
    """Loads a checkpoint of MMDetection, torchvision or Detectron2 into `model`, in place, and returns it.

    path_or_url: `.pth`, `.pkl` or `.safetensors`, an https address (kept in torch.hub's cache), or a state dict. The peer
    is told by its keys; the model takes over that peer's profile (`model.profile`), so that it gives the peer's numbers.
    norm_eps: epsilon of the backbone's norms; None takes the peer's. torchvision's published COCO weights need 0, weights
    trained with its frozen norms from ImageNet 1e-5, and the file does not tell: 0 is assumed.
    Raises ValueError naming the missing, unexpected and misshapen keys, or saying why the file was refused. The model is
    untouched when an error is raised.
    """
    state, profile, options, meta = load_checkpoint(path_or_url)
    _apply(model, state, profile, options, meta, _name(path_or_url), norm_eps)
    return model


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")


def _check_keys(own: dict[str, Tensor], state: dict[str, Tensor], source: str) -> None:
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in own and not k.endswith("num_batches_tracked")]
    shapes = [
        f"{k} {list(state[k].shape)}, expected {list(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    problems = [
        f"{what}: {_some(keys)}"
        for what, keys in (("missing keys", missing), ("unexpected keys", unexpected), ("wrong shapes", shapes))
        if keys
    ]
    if problems:
        hint = ""
        cls = _CLASS_WEIGHT
        if cls in state and cls in own and len(state[cls]) != len(own[cls]):
            hint = (
                f". The file has {len(state[cls]) - 1} classes: build the model with num_classes={len(state[cls]) - 1}"
            )
        raise ValueError(f"{source} does not fit this model. " + "; ".join(problems) + hint)


def _apply(model, state, profile, options, meta, source, norm_eps) -> None:
    own = model.state_dict()
    _check_keys(own, state, source)
    model.load_state_dict({k: v for k, v in state.items() if k in own}, strict=False)
    if model.profile.name != profile:
        model.set_profile(profile)
    # Nothing of an earlier checkpoint stays. Within the profile it was built for, the model's own choices (a caffe-style
    # C4, say) are what the file does not contradict.
    built_for, own_options = model.built_with
    options = {**(own_options if built_for == profile else {}), **options}
    if norm_eps is not None:
        options["norm_eps"] = norm_eps
    model.set_peer_options(**options)
    names = meta.get("class_names")
    names = names.split("\n") if isinstance(names, str) else mmdet.class_names(meta)
    model.class_names = names if names and len(names) == model.num_classes else None


def export_weights(model: FasterRCNN, peer: str) -> dict[str, Tensor]:
    """The model's state dict in the keys of "mmdet", "torchvision" or "detectron2", for `load_state_dict` there.

    The weights give the same detections there only where the model follows that peer's profile, so another one is
    refused: ValueError. So is a key that the peer's own models have no place for.
    """
    if peer not in PEERS:
        raise ValueError(f"peer: expected one of {', '.join(PEERS)}, got {peer!r}")
    if model.profile.name != peer:
        raise ValueError(
            f"the model follows the profile {model.profile.name!r}: its weights would give other boxes in {peer}"
        )
    return PEERS[peer].export({k: v.detach().cpu().clone() for k, v in model.state_dict().items()})


def model_metadata(name: str, model: FasterRCNN, overrides: dict) -> dict[str, str]:
    """What `infer_model` reads back from a safetensors file of ours."""
    names = "\n".join(model.class_names or [])
    options = model.peer_options()
    backbone = {"style": options["style"]} if "style" in options else {}
    if "norm_eps" in options:
        backbone["norm_cfg"] = dict(eps=options["norm_eps"])
    overrides = merge(overrides, dict(data_preprocessor=options["data_preprocessor"], backbone=backbone))
    return dict(model=name, profile=model.profile.name, overrides=json.dumps(overrides), class_names=names)
