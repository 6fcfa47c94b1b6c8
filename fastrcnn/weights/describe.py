"""The model that a checkpoint is of, as the arguments of its class: from the keys, or as our own files say it."""

import json
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastrcnn.checkpoints.checkpoint import Checkpoint, metadata_json
from fastrcnn.checkpoints.peer_options import OURS
from fastrcnn.models.build import merge
from fastrcnn.zoo.config_file import check_amount
from fastrcnn.zoo.recipes import DETECTORS, NAMES, RECIPES, RPNS, Detector, detector, recipe_config

# The layers whose shape depends on the number of classes.
CLASS_LAYERS = ("roi_head.bbox_head.fc_cls.", "roi_head.bbox_head.fc_reg.", "bbox_head.retina_cls.")
_TELL = "name it, or build it with fastrcnn.models.from_mmdet_config and load the checkpoint with load_weights"
_LONGEST, _DEEPEST = 5000, 20  # lists and nests of a configuration in a file


def _names_a_file(init_cfg: object) -> bool:
    return isinstance(init_cfg, dict) and "checkpoint" in init_cfg


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy of a configuration as JSON keeps it. What it names to start from (files, addresses) is left out: the weights
    are there. Raises ValueError for anything but data, or beyond what any model needs."""
    if depth > _DEEPEST:
        raise ValueError(f"{where}: nested too deeply")
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise ValueError(f"{where}: expected names as keys, got {[k for k in value if not isinstance(k, str)][:3]}")
        kept = {k: v for k, v in value.items() if k != "pretrained" and not (k == "init_cfg" and _names_a_file(v))}
        return {key: _plain(v, f"{where}.{key}" if where else key, depth + 1) for key, v in kept.items()}
    if isinstance(value, list | tuple):
        if len(value) > _LONGEST:
            raise ValueError(f"{where}: expected at most {_LONGEST} items, got {len(value)}")
        return [_plain(v, f"{where}[{i}]", depth + 1) for i, v in enumerate(value)]
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, nn.Module):
        kind = type(value).__name__
        raise ValueError(f"{where}: a {kind} was handed in as a module, which no file can describe: build the model from "
                         "MMDetection's dicts, or keep its state_dict() with torch.save")  # fmt: skip
    if value is not None and not isinstance(value, str | bool | int | float):
        raise ValueError(f"{where}: expected plain data, got a {type(value).__name__}")
    check_amount(value, where.rpartition(".")[2], where)
    return value


def description(model: Detector) -> str:
    """What `config_of` reads back: JSON of the arguments that a model was built with, and the sizes that it resizes to now.
    Raises ValueError naming the part that is no data."""
    built = getattr(model, "built", None)
    if built is None or DETECTORS.get(built.arguments["type"]) is not type(model):
        raise ValueError(f"a file describes {', '.join(DETECTORS)}, got a {type(model).__name__} of its own")
    pixels = model.data_preprocessor
    return json.dumps(_plain(built.arguments | dict(min_size=pixels.min_size, max_size=pixels.max_size), ""))


def _named_by(state: dict[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """The zoo's name, and what differs from it, for a state dict in our keys, from its depths and widths."""
    c4 = "roi_head.shared_head.layer4.0.conv1.weight" in state
    stages = [f"backbone.layer{i}." for i in (1, 2, 3)] + ["roi_head.shared_head.layer4." if c4 else "backbone.layer4."]
    blocks = tuple(len({k.removeprefix(s).split(".")[0] for k in state if k.startswith(s)}) for s in stages)
    bottleneck = "backbone.layer1.0.conv3.weight" in state
    depths: dict[tuple[int, ...], int] = {
        (2, 2, 2, 2): 18, (3, 4, 6, 3): 50 if bottleneck else 34, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}  # fmt: skip
    depth = depths.get(blocks)
    has_neck = any(key.startswith("neck.") for key in state)
    if depth is not None and bottleneck and "roi_head.bbox_head.fc_cls.weight" in state and not has_neck:
        deeper = dict(backbone=dict(depth=depth), **(dict(roi_head=dict(shared_head=dict(depth=depth))) if c4 else {}))
        return "r50_c4" if c4 else "r50_dc5", {} if depth == 50 else deeper
    if depth is None or "neck.fpn_convs.0.conv.weight" not in state:
        raise ValueError(f"cannot tell the model from the checkpoint (blocks per stage {blocks}): {_TELL}")
    alone = "roi_head.bbox_head.fc_cls.weight" not in state
    kind = "retinanet_" if "bbox_head.retina_cls.weight" in state else "rpn_" if alone else ""
    if "rpn_head.rpn_conv.1.conv.weight" in state or "bbox_head.cls_convs.0.gn.weight" in state:
        return f"{kind}r{depth}_fpn_v2", {}
    conv2 = state.get("backbone.layer1.0.conv2.weight")
    if bottleneck and conv2 is not None and conv2.dim() == 4 and conv2.shape[0] != conv2.shape[1]:
        groups = conv2.shape[0] // conv2.shape[1]
        return f"{kind}x{depth}_{groups}x{conv2.shape[1]}d_fpn", {}
    name = f"{kind}r{depth}_fpn"
    if name not in (*NAMES, *RPNS):
        raise ValueError(f"the checkpoint is of {name!r}, which is no named model: {_TELL}")
    return name, {}


def _own(checkpoint: Checkpoint, name: str | None, source: str) -> dict[str, Any]:
    """The configuration in one of our own files, after a look whether it is that of the weights beside it: nothing of its
    size is built before."""
    meta = checkpoint.meta
    try:
        if "detector" in meta:
            config: dict[str, Any] = _plain(metadata_json(meta, "detector", dict), "")
        else:  # version 0.1 kept what differs from a named model
            overrides = _plain(metadata_json(meta, "overrides", dict), "")
            config = recipe_config(name or str(meta.get("model")), checkpoint.num_classes, checkpoint.peer, overrides)
        with torch.device("meta"):
            shapes = detector(config).state_dict()
    except Exception as error:  # what a file says runs into any kind
        raise ValueError(f"{source}: its metadata describe no model ({type(error).__name__}: {error})") from None
    check_keys(shapes, checkpoint, source)
    if name is not None and "detector" in meta:
        network = ("type", "depth", "groups", "base_width")
        asked = recipe_config(name, None, checkpoint.peer)
        found = [(c["type"], *(c["backbone"].get(key) for key in network)) for c in (asked, config)]
        if found[0] != found[1]:
            raise ValueError(f"{source} does not fit this model: it holds a {found[1]}, {name} is a {found[0]}")
    return config


def config_of(
    checkpoint: Checkpoint, num_classes: int, name: str | None, overrides: dict[str, Any], source: str
) -> dict[str, Any]:
    """The configuration, for `zoo.recipes.detector`, of the model that a checkpoint is of, with so many classes.

    name: the model, where the checkpoint does not tell; overrides: laid over it. Raises ValueError where it does not tell,
    or says what does not fit its weights.
    """
    if {"detector", "overrides"} & set(checkpoint.meta):
        config = _own(checkpoint, name, source)
        for parts in (("roi_head", "bbox_head"), ("bbox_head",)):
            if parts[0] in config:
                changed: dict[str, Any] = dict(num_classes=num_classes)
                for part in reversed(parts):
                    changed = {part: changed}
                config = merge(config, changed)
        return merge(config, overrides)
    told = checkpoint.meta.get("model")
    told = told if isinstance(told, str) else None  # of somebody else's file it may be anything
    named = name or (told if told in RECIPES else None)
    name, differs = (named, {}) if named else _named_by(checkpoint.state)
    unsaid = checkpoint.unsaid.said()
    own = dict(backbone=dict(style=unsaid["style"])) if "style" in unsaid else {}
    if "std" in unsaid:
        own["data_preprocessor"] = dict(std=unsaid["std"])
    return recipe_config(name, num_classes, checkpoint.peer, own, differs, overrides)


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")


_OPTIONAL = (*OURS, "num_batches_tracked")  # what peers' files and exports are without


def check_keys(own: dict[str, Tensor], checkpoint: Checkpoint, source: str) -> None:
    """Raises ValueError naming what the state dict `own` of a model has that the checkpoint has not or in another shape,
    and what is left over."""
    state = checkpoint.state
    missing = [k for k in own if k not in state and not k.endswith(_OPTIONAL)]
    unexpected = [k for k in state if k not in own and not k.endswith(_OPTIONAL)]
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
        hint, n = "", checkpoint.num_classes
        rows = [k for k in own if k.startswith(CLASS_LAYERS) and k in state and state[k].shape[:1] != own[k].shape[:1]]
        if rows:
            hint = f". The file has {n} classes: build the model with num_classes={n}"
        raise ValueError(f"{source} does not fit this model. " + "; ".join(problems) + hint)
