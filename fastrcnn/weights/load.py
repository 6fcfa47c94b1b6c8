"""Finds out whose checkpoint it is, converts its keys and gives the model that peer's semantics."""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from fastrcnn.checkpoints import detectron2, mmdet, torchvision
from fastrcnn.checkpoints.pretrained import pretrained_state
from fastrcnn.checkpoints.read import read
from fastrcnn.models.build import merge
from fastrcnn.models.pretrained import load_classifier
from fastrcnn.models.profiles import get_profile
from fastrcnn.zoo.published import coco_weights
from fastrcnn.zoo.recipes import NAMES, RPNS, Detector, recipe

# The layers whose shape depends on the number of classes.
_CLASS_LAYERS = ("roi_head.bbox_head.fc_cls.", "roi_head.bbox_head.fc_reg.", "bbox_head.retina_cls.")
_TELL = "name it, or build it with fastrcnn.models.from_mmdet_config and load the checkpoint with load_weights"
PEERS = {"torchvision": torchvision, "detectron2": detectron2, "mmdet": mmdet}


def _name(source) -> str:
    return "the state dict" if isinstance(source, Mapping) else str(source)


def load_checkpoint(path_or_url: str | Path | Mapping) -> tuple[dict[str, Tensor], str, dict, dict]:
    """(state dict in our keys, peer, the peer's options for the model, metadata).

    Raises ValueError where the keys belong to none of the three peers, or to MMDetection 1.x, and whatever `read`
    raises.
    """
    state, meta = read(path_or_url)
    source = _name(path_or_url)
    for name, peer in PEERS.items():
        if peer.detect(state):
            for key, value in state.items():
                if key.endswith((".weight", ".bias")) and (value.dim() == 0 or value.numel() == 0):
                    raise ValueError(f"{source}: expected rows of weights in {key}, got the shape {list(value.shape)}")
            try:
                if peer is mmdet:
                    mmdet.check_version(state, meta)
                # Our own files say the profile; their keys are MMDetection's.
                profile = get_profile(str(meta.get("profile", name))).name
            except ValueError as error:
                raise ValueError(f"{source}: {error}") from None
            return peer.convert(state), profile, {**peer.profile_options(state, meta), **_own_options(meta)}, meta
    what = "not a Faster R-CNN or RetinaNet of MMDetection, torchvision or Detectron2"
    raise ValueError(f"{source}: {what} (first keys: {', '.join(list(state)[:3])})")


def _own_options(meta: dict) -> dict:
    """What a file of ours says of the peer's options (see `model_metadata`)."""
    said = json.loads(meta.get("overrides", "{}"))
    backbone, pixels = said.get("backbone", {}), dict(said.get("data_preprocessor", {}))
    options = dict(style=backbone.get("style"), norm_eps=backbone.get("norm_cfg", {}).get("eps"),
                   pad_size_divisor=pixels.pop("pad_size_divisor", None), data_preprocessor=pixels or None)  # fmt: skip
    return {key: value for key, value in options.items() if value is not None}


def _unsaid(state: dict[str, Tensor], profile: str, meta: dict) -> dict:
    """The peer's options that its files do not say; our own files say them."""
    return detectron2.defaults(state) if profile == "detectron2" and "overrides" not in meta else {}


def _num_classes(state: dict[str, Tensor]) -> int:
    """Foreground classes of a state dict in our keys; an RPN's is one."""
    if "bbox_head.retina_cls.weight" in state:  # A * C channels, where the box layer has A * 4
        return 4 * len(state["bbox_head.retina_cls.weight"]) // len(state["bbox_head.retina_reg.weight"])
    return len(state["roi_head.bbox_head.fc_cls.weight"]) - 1 if "roi_head.bbox_head.fc_cls.weight" in state else 1


def _named_by(state: dict[str, Tensor]) -> tuple[str, dict]:
    """The zoo's name, and what differs from it, for a state dict in our keys, from its depths and widths."""
    c4 = "roi_head.shared_head.layer4.0.conv1.weight" in state
    stages = [f"backbone.layer{i}." for i in (1, 2, 3)] + ["roi_head.shared_head.layer4." if c4 else "backbone.layer4."]
    blocks = tuple(len({k.removeprefix(s).split(".")[0] for k in state if k.startswith(s)}) for s in stages)
    bottleneck = "backbone.layer1.0.conv3.weight" in state
    depth = {(2, 2, 2, 2): 18, (3, 4, 6, 3): 50 if bottleneck else 34, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}.get(
        blocks
    )
    if depth is not None and bottleneck and "roi_head.bbox_head.fc_cls.weight" in state and _no_neck(state):
        deeper = dict(backbone=dict(depth=depth), **(dict(roi_head=dict(shared_head=dict(depth=depth))) if c4 else {}))
        return "r50_c4" if c4 else "r50_dc5", {} if depth == 50 else deeper
    if depth is None or "neck.fpn_convs.0.conv.weight" not in state:
        raise ValueError(f"cannot tell the model from the checkpoint (blocks per stage {blocks}): {_TELL}")
    alone = "roi_head.bbox_head.fc_cls.weight" not in state
    kind = "retinanet_" if "bbox_head.retina_cls.weight" in state else "rpn_" if alone else ""
    if "rpn_head.rpn_conv.1.conv.weight" in state or "bbox_head.cls_convs.0.gn.weight" in state:
        return f"{kind}r{depth}_fpn_v2", {}
    conv2 = state["backbone.layer1.0.conv2.weight"]
    if bottleneck and conv2.dim() == 4 and conv2.shape[0] != conv2.shape[1]:
        groups = conv2.shape[0] // conv2.shape[1]
        return f"{kind}x{depth}_{groups}x{conv2.shape[1]}d_fpn", {}
    name = f"{kind}r{depth}_fpn"
    if name not in (*NAMES, *RPNS):
        raise ValueError(f"the checkpoint is of {name!r}, which is no named model: {_TELL}")
    return name, {}


def _no_neck(state: dict[str, Tensor]) -> bool:
    return not any(key.startswith("neck.") for key in state)


def coco_address(name: str, profile: str | None = None) -> str:
    """The https address of published COCO weights for a named model. Raises ValueError where there are none."""
    return coco_weights(name, profile).address


def infer_model(path_or_url: str | Path | Mapping, name: str | None = None, **overrides) -> Detector:
    """Builds the model a checkpoint was saved from, from its keys, shapes and metadata, and loads it. In evaluation mode.

    name: the model, where the checkpoint does not tell; overrides: as in `fastrcnn.models.faster_rcnn`. Raises ValueError
    where the checkpoint does not tell or does not fit.
    """
    state, profile, options, meta = load_checkpoint(path_or_url)
    model = _build(state, profile, meta, _num_classes(state), name, overrides)
    _apply(model, state, profile, options, meta, _name(path_or_url), None)
    return model.eval()


def _build(state, profile, meta, num_classes, name, overrides) -> Detector:
    name, differs = (name or meta["model"], {}) if name or "model" in meta else _named_by(state)
    if "overrides" in meta:  # our own files carry what differs from the named model, as JSON
        differs = json.loads(meta["overrides"])
    unsaid = _unsaid(state, profile, meta)
    if "style" in unsaid:
        unsaid["backbone"] = dict(style=unsaid.pop("style"))
    overrides = merge(merge(unsaid, differs), overrides)
    return recipe(name, num_classes, profile, **overrides)


def pretrained_model(
    path_or_url: str | Path | Mapping, num_classes: int, name: str | None = None, **overrides
) -> Detector:
    """A model of `num_classes` to train, that starts from a checkpoint: a detector of any peer, whose last layers are left
    fresh where it has other classes, or an image classifier (a torchvision ResNet or ResNeXt), for the backbone alone.

    name: the model (default: told by a detector's keys; "r50_fpn" for a classifier); overrides: as in
    `fastrcnn.models.faster_rcnn`. Raises ValueError where the checkpoint does not fit.
    """
    content, meta = read(path_or_url)
    if "layer1.0.conv1.weight" in content:
        model = recipe(name or "r50_fpn", num_classes, **overrides)
        body = {f"backbone.{k}": v for k, v in content.items() if not k.startswith("fc.")}
        others = {k: v for k, v in model.state_dict().items() if not k.startswith("backbone.")}
        _apply(model, {**others, **body}, model.profile.name, {}, {}, _name(path_or_url), None)
        return model
    state, profile, options, meta = load_checkpoint({"state_dict": content, "meta": meta})
    same_classes = _num_classes(state) == num_classes
    model = _build(state, profile, meta, num_classes, name, overrides)
    if not same_classes:
        state = {**state, **{k: v for k, v in model.state_dict().items() if k.startswith(_CLASS_LAYERS)}}
    _apply(model, state, profile, options, meta, _name(path_or_url), None)
    return model


def load_weights(model: Detector, path_or_url: str | Path | Mapping, norm_eps: float | None = None) -> Detector:
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
        if shapes and any(s.startswith(_CLASS_LAYERS) for s in shapes):
            hint = (
                f". The file has {_num_classes(state)} classes: build the model with num_classes={_num_classes(state)}"
            )
        raise ValueError(f"{source} does not fit this model. " + "; ".join(problems) + hint)


def _apply(model, state, profile, options, meta, source, norm_eps) -> None:
    own = model.state_dict()
    _check_keys(own, state, source)
    model.load_state_dict({k: v for k, v in state.items() if k in own}, strict=False)
    # Nothing of an earlier checkpoint stays. Within the profile it was built for, the model's own choices (a caffe-style
    # C4, say) are what the file does not contradict; elsewhere the peer's defaults are.
    built_for, built = model.built_with
    if built_for != profile or model.profile.name != profile:
        model.set_profile(profile)
    if built_for == profile:
        defaults = built
    else:
        defaults = {"norm_eps": built.get("norm_eps"), **_unsaid(state, profile, meta)}
        if model.neck is None:  # Detectron2 pads to a multiple of 32 for a pyramid alone
            defaults["pad_size_divisor"] = 1 if profile == "detectron2" else 32
    options = merge(defaults, options)
    if norm_eps is not None:
        options["norm_eps"] = norm_eps
    model.set_peer_options(**options)
    names = meta.get("class_names")
    names = names.split("\n") if isinstance(names, str) else mmdet.class_names(meta)
    model.class_names = names if names and len(names) == model.num_classes else None


def load_pretrained(module: nn.Module, checkpoint: str | Path, prefix: str = "") -> nn.Module:
    """Loads a classifier's (or, with prefix "backbone", a detector's) weights into a backbone, in place; returns it.

    checkpoint: a file, an https address or a short name such as "torchvision://resnet50". Raises ValueError naming what
    does not fit, otherwise what `pretrained_state` raises. `module` is untouched when an error is raised.
    """
    load_classifier(module, pretrained_state(checkpoint, prefix), str(checkpoint))
    return module
