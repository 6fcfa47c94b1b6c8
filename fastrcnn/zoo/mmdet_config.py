"""Models from MMDetection's configs, of its versions 2 and 3."""

import inspect
from pathlib import Path

from fastrcnn.models.build import build
from fastrcnn.zoo.config_file import check_amount, read_config
from fastrcnn.zoo.recipes import DETECTORS, Detector

# Of a data_preprocessor: what shapes the model's input, and what a trainer of boxes reads or does not need.
_PIXELS = dict(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), bgr_to_rgb=False, pad_size_divisor=1)
_LEFT_TO_TRAINING = {"type", "batch_augments", "pad_mask", "mask_pad_value", "pad_seg", "seg_pad_value",
                     "boxtype2tensor", "non_blocking"}  # fmt: skip


def _typed(content, seen: set[int]) -> list[dict]:
    """Every dict with a type in `content`, outermost first. seen: the containers that were looked into."""
    if not isinstance(content, dict | list | tuple) or id(content) in seen:
        return []
    seen.add(id(content))
    here = [content] if isinstance(content, dict) and isinstance(content.get("type"), str) else []
    inner = content.values() if isinstance(content, dict) else content
    return here + [d for v in inner for d in _typed(v, seen)]


def _test_transforms(config: dict) -> list[tuple[str, dict]]:
    """(type, dict) of the transforms of the test pipeline, without the scope before a type's name; where there is none, the
    training pipeline's resize to one size."""
    data = config.get("data") if isinstance(config.get("data"), dict) else {}
    for part in (config.get("test_dataloader"), data.get("test"), config.get("test_pipeline")):
        found = [(d["type"].rpartition(".")[2], d) for d in _typed(part, set())]
        if any("Resize" in kind or kind == "MultiScaleFlipAug" for kind, _ in found):
            return found
    for part in (config.get("train_dataloader"), data.get("train"), config.get("train_pipeline")):
        found = [(d["type"].rpartition(".")[2], d) for d in _typed(part, set())]
        if found := [("Resize", d) for kind, d in found if kind == "Resize" and d.get("keep_ratio")]:
            scale = found[0][1].get("scale", found[0][1].get("img_scale"))
            return found[:1] if isinstance(scale, int | list | tuple) and len(all_pairs(scale)) == 1 else []
    return []


def all_pairs(scale) -> list[tuple[int, int]]:
    """`_pair` of each of a resize's scales."""
    several = isinstance(scale, list | tuple) and scale and isinstance(scale[0], list | tuple)
    return [_pair(s) for s in scale] if several else [_pair(scale)]


def config_sizes(config: dict) -> tuple[int, int]:
    """(long side, short side) that a config's pictures are resized to where nothing is drawn."""
    found = _size_options(_test_transforms(config))
    return found.get("max_size", 1333), found.get("min_size", 800)


def _pair(scale) -> tuple[int, int]:
    """(long side, short side) of a scale, or of the first of several."""
    scale = scale[0] if isinstance(scale, list) and scale and not isinstance(scale[0], int) else scale
    pair = (scale, scale) if isinstance(scale, int) else tuple(scale)
    if len(pair) != 2 or not all(isinstance(v, int) and v > 0 for v in pair):
        raise ValueError(f"config: expected a scale of two numbers of pixels, got {scale!r}")
    return max(pair), min(pair)


def _size_options(transforms: list[tuple[str, dict]]) -> dict:
    """min_size and max_size. Raises ValueError for a resize that `DataPreprocessor` does not do."""
    options = {}
    for kind, d in transforms:
        scale = d.get("img_scale", d.get("scale"))
        if (kind == "MultiScaleFlipAug" and scale is None) or (kind == "Resize" and "scale_factor" in d):
            raise ValueError(f"config: a test pipeline that resizes by a factor is not supported: {d}")
        if "Resize" in kind:  # MMDetection 2 keeps the ratio by default, 3 does not
            fixed = dict(keep_ratio="scale" not in d, backend="cv2", interpolation="bilinear")
            odd = [k for k, default in fixed.items() if d.get(k, default) != (True if k == "keep_ratio" else default)]
            if kind != "Resize" or odd:
                raise ValueError(f"config: a test pipeline with {kind} {odd or ''} is not supported: {d}")
        if kind in ("Resize", "MultiScaleFlipAug") and scale is not None and not options:
            options["max_size"], options["min_size"] = _pair(scale)
    return options


def _pixel_options(config: dict, model: dict, transforms: list[tuple[str, dict]]) -> dict:
    """mean, std, bgr_to_rgb and pad_size_divisor; empty where the config does not say. MMDetection 3 has them in the
    data_preprocessor, 2 in the test pipeline."""
    given = model.get("data_preprocessor") or config.get("data_preprocessor")
    if given is not None:
        if not isinstance(given, dict) or given.get("type", "DetDataPreprocessor") != "DetDataPreprocessor":
            raise ValueError(f"data_preprocessor: expected a DetDataPreprocessor, got {given!r}")
        harmless = dict(rgb_to_bgr=False, pad_value=0)  # with these values
        unknown = sorted(k for k in set(given) - set(_PIXELS) - _LEFT_TO_TRAINING
                         if k not in harmless or given[k] != harmless[k])  # fmt: skip
        if unknown:
            raise ValueError(f"data_preprocessor: options that are not supported: {unknown}")
        return {k: default if given.get(k) is None else given[k] for k, default in _PIXELS.items()}
    norms = [d for kind, d in transforms if kind == "Normalize"]
    norm = norms[0] if norms else config.get("img_norm_cfg")
    if norm is None:
        return {}
    options = dict(mean=norm["mean"], std=norm["std"], bgr_to_rgb=norm.get("to_rgb", True))
    pads = [d for kind, d in transforms if kind == "Pad"]
    if any(d.get("size") is not None for d in pads):
        raise ValueError(f"config: a test pipeline that pads to a fixed size is not supported: {pads}")
    if norms:
        options["pad_size_divisor"] = pads[0].get("size_divisor", 1) if pads else 1
    return options


# Names that MMDetection 2 changed on its way.
_RENAMED = dict(out_size="output_size", sample_num="sampling_ratio")


def _proposal_settings(cfg: dict, what: str) -> dict:
    """An RPN's settings, from the names of MMDetection 2.0 to 2.4: NMS level by level, nms_post of each, max_num of all."""
    cfg = dict(cfg)
    old = {key: cfg.pop(key) for key in ("nms_thr", "max_num", "nms_post", "nms_across_levels") if key in cfg}
    if old.get("nms_across_levels"):
        raise ValueError(f"{what}: nms_across_levels=True is not supported")
    if "max_num" in old:
        cfg["max_per_img"] = old["max_num"]
    if old.get("nms_post", cfg.get("max_per_img", 0)) < cfg.get("max_per_img", 0):
        raise ValueError(f"{what}: nms_post={old['nms_post']} below max_num is not supported")
    if "nms_thr" in old:
        cfg["nms"] = dict(type="nms", iou_threshold=old["nms_thr"])
    return cfg


def _modernised(content, what: str = "model"):
    """A copy of the model's dicts in MMDetection 3's names."""
    if isinstance(content, list | tuple):
        return type(content)(_modernised(v, what) for v in content)
    if not isinstance(content, dict):
        check_amount(content, what.rpartition(" ")[2], f"config: {what}")
        return content
    out = {k: _modernised(v, f"{what} {k}") for k, v in content.items()}
    if out.get("type") == "RoIAlign":
        out = {_RENAMED.get(k, k): v for k, v in out.items()}
    if "iou_thr" in out and out.get("type") in ("nms", "soft_nms"):
        out["iou_threshold"] = out.pop("iou_thr")
    if what.endswith(("cfg rpn", "cfg rpn_proposal")):
        out = _proposal_settings(out, what)
    return out


def from_mmdet_config(path_or_dict: str | Path | dict) -> Detector:
    """Builds the model of an MMDetection 2.x or 3.x config file, or of a dict: a whole config, or its `model` alone.

    `model.config` keeps the whole config, data and schedule (batch_augments included), as plain data. Weights to start
    from that it names are fetched by `model.init_weights()`, not here. Raises FileNotFoundError, or ValueError naming what
    is not understood or not supported.
    """
    config = dict(path_or_dict) if isinstance(path_or_dict, dict) else read_config(path_or_dict)
    try:
        return _from_config(config)
    except RecursionError:
        raise ValueError("config: nested too deeply") from None


def _from_config(config: dict) -> Detector:
    if "model" not in config and "type" not in config:
        raise ValueError(f"config: expected a key 'model' or 'type', got {sorted(config)}")
    model = config.get("model", config)
    if not isinstance(model, dict):
        raise ValueError(f"config: model: expected a dict, got {model!r}")
    model = dict(model)
    # MMDetection 2.0 kept these two beside the model.
    for key in ("train_cfg", "test_cfg"):
        if key not in model and isinstance(config.get(key), dict) and "type" not in config[key]:
            model[key] = config[key]
    model = _modernised(model)
    kind = model.pop("type", None)
    if not isinstance(kind, str) or kind.rpartition(".")[2] not in DETECTORS:
        raise ValueError(f"config: model type {kind!r} is not supported, expected one of {sorted(DETECTORS)}")
    kind = kind.rpartition(".")[2]
    transforms = _test_transforms(config)
    options, pixels = _size_options(transforms), _pixel_options(config, model, transforms)
    if pixels:
        options["data_preprocessor"] = pixels
    model.pop("data_preprocessor", None)
    start = model.pop("pretrained", None)
    if start and isinstance(model.get("backbone"), dict):  # MMDetection 2.x named the backbone's start here
        model["backbone"] = {**model["backbone"], "pretrained": start}
    model = {k: v for k, v in model.items() if k != "init_cfg" or v is not None}
    model.setdefault("neck", None)
    parameters = inspect.signature(DETECTORS[kind]).parameters
    unknown = sorted(set(model) - set(parameters))
    if unknown:
        raise ValueError(f"config: options of the model that are not supported: {unknown}")
    missing = sorted(k for k, p in parameters.items() if p.default is p.empty and model.get(k) is None and k != "neck")
    if missing:
        raise ValueError(f"config: a {kind} needs {missing}")
    built = build({"type": kind, **model, **options}, DETECTORS, "config")
    built.config = config
    names = _class_names(config)
    if names is not None and len(names) == built.num_classes:
        built.class_names = names
    return built


def _class_names(config: dict) -> list[str] | None:
    """What the config calls its classes: of the whole (MMDetection's `metainfo` or `classes`), else of the data that it
    tests on, else of those that it trains on. Raises ValueError for what is no list of names."""
    parts = [config, *(config.get(f"{part}_dataloader") for part in ("test", "val", "train")), config.get("data")]
    for part in parts:
        for found in _metainfos(part, 0 if part is config else 4):
            names = found.get("classes", found.get("CLASSES"))
            if names is None:
                continue
            if isinstance(names, list | tuple) and all(isinstance(name, str) for name in names):
                return list(names)
            raise ValueError(f"config: classes: expected a list or tuple of names, got {str(names)[:60]!r}")
    return None


def _metainfos(part, depth: int) -> list[dict]:
    """The dicts with class names in a dataset's configuration, those of its wrappers (`dataset`, `datasets`) included."""
    if isinstance(part, list | tuple):
        return [found for one in part for found in _metainfos(one, depth - 1)] if depth > 0 else []
    if not isinstance(part, dict):
        return []
    here = [d for d in (part.get("metainfo"), part) if isinstance(d, dict) and {"classes", "CLASSES"} & set(d)]
    inner = [part.get(key) for key in ("dataset", "datasets", "test", "val", "train")] if depth > 0 else []
    return here + [found for one in inner for found in _metainfos(one, depth - 1)]
