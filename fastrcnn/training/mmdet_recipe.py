"""MMDetection's schedule and training pipeline, of its versions 2 and 3, as a recipe."""

from collections.abc import Callable, Iterator
from typing import Any

from fastrcnn.training.recipe import Recipe, get_recipe
from fastrcnn.zoo.mmdet_config import all_pairs, config_sizes
from fastrcnn.zoo.recipes import Detector

GPUS = 8  # that a config means where it does not say for how many pictures its rate is
# Transforms that ask for nothing of their own here.
_PLAIN = {"LoadImageFromFile", "LoadAnnotations", "PackDetInputs", "DefaultFormatBundle", "Collect", "Normalize", "Pad",
          "FilterAnnotations", "ToTensor", "ImageToTensor", "Transpose", "RandomCrop"}  # fmt: skip
_OPTIMIZER = {"type", "lr", "momentum", "weight_decay"}


def recipe_of(
    model: Detector, recipe: str | Recipe | None = None, say: Callable[[str], None] = print, **changes: Any
) -> Recipe:
    """`get_recipe`, and for "config" that of the configuration that the model came with; what of it cannot be done is said.
    Raises what they raise."""
    if recipe == "config":
        if not model.config:
            raise ValueError("recipe: the model came with no configuration of a training, expected a name of a recipe")
        recipe, notes = recipe_from_config(model.config)
        for note in notes:
            say(f"config: {note}")
    return get_recipe(recipe or "finetune", **changes)


def recipe_from_config(config: dict[str, Any]) -> tuple[Recipe, list[str]]:
    """(recipe, what of the config it leaves out) of a whole MMDetection config as `model.config` has it. Raises ValueError
    where it holds no schedule, or one that cannot be followed."""
    notes: list[str] = []
    wrapper = config.get("optim_wrapper")
    numbers = _new(config, wrapper, notes) if isinstance(wrapper, dict) else _old(config, notes)
    numbers |= _pictures(config, notes)
    times = 1
    for part in _datasets(config):
        times *= part.get("times", 1) if _kind(part) == "RepeatDataset" else 1
        if _kind(part) not in ("RepeatDataset", "CocoDataset", "None"):
            notes.append(f"{_kind(part)}: the dataset is yours, its wrapper is left out")
    if "epochs" in numbers and times > 1:  # an epoch there is several of the pictures
        numbers["epochs"] *= times
        numbers["milestones"] = tuple(m * times for m in numbers["milestones"])
    for hook in config.get("custom_hooks") or ():
        if isinstance(hook, dict) and _kind(hook) == "EMAHook":
            numbers["ema"] = 1 - hook.get("momentum", 0.0002)
        elif isinstance(hook, dict) and _kind(hook) not in ("NumClassCheckHook", "CheckInvalidLossHook"):
            notes.append(f"{_kind(hook)}: hooks are left out")
    try:
        return Recipe("config", **numbers), notes
    except TypeError as error:
        raise ValueError(f"config: {error}") from None


def _kind(d: dict[str, Any]) -> str:
    return str(d.get("type")).rpartition(".")[2]


def _datasets(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The training dataset, outermost wrapper first."""
    loader, data = config.get("train_dataloader"), config.get("data")
    part = (loader or {}).get("dataset") if isinstance(loader, dict) else (data or {}).get("train")
    while isinstance(part, dict):
        yield part
        part = part.get("dataset")


def _optimizer(given: object, notes: list[str]) -> dict[str, Any]:
    if not isinstance(given, dict) or _kind(given) not in ("SGD", "AdamW"):
        raise ValueError(f"config: optimizer: expected SGD or AdamW, got {given!r}")
    if odd := sorted(set(given) - _OPTIMIZER - {"paramwise_cfg"}):
        notes.append(f"optimizer options {', '.join(odd)} are left out")
    plain = dict(optimizer=_kind(given), lr=given["lr"], weight_decay=given.get("weight_decay", 0.0))
    return plain | (dict(momentum=given.get("momentum", 0.0)) if _kind(given) == "SGD" else {})


def _paramwise(cfg: dict[str, Any] | None, notes: list[str]) -> dict[str, Any]:
    names = dict(norm_decay_mult="norm_decay", bias_decay_mult="bias_decay")
    if odd := sorted(set(cfg or {}) - set(names) - {"bypass_duplicate"}):
        notes.append(f"paramwise_cfg options {', '.join(odd)} are left out")
    return {new: cfg[old] for old, new in names.items() if cfg and old in cfg}


def _new(config: dict[str, Any], wrapper: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """MMDetection 3: optim_wrapper, param_scheduler, train_cfg, train_dataloader."""
    numbers = _optimizer(wrapper.get("optimizer"), notes) | _paramwise(wrapper.get("paramwise_cfg"), notes)
    numbers["accumulate"] = wrapper.get("accumulative_counts", 1)
    if wrapper.get("clip_grad"):
        numbers["clip_norm"] = float(wrapper["clip_grad"]["max_norm"])
    if _kind(wrapper) == "AmpOptimWrapper":
        numbers["precision"] = "bf16" if wrapper.get("dtype") == "bfloat16" else "fp16"
    loop = config.get("train_cfg") or {}
    if "max_iters" in loop:
        numbers["steps"] = loop["max_iters"]
    elif "max_epochs" in loop:
        numbers["epochs"] = loop["max_epochs"]
    else:
        raise ValueError(f"config: train_cfg: expected max_epochs or max_iters, got {loop!r}")
    numbers |= dict(warmup=0, milestones=())
    rules = config.get("param_scheduler") or []
    for rule in rules if isinstance(rules, list | tuple) else [rules]:
        kind = _kind(rule)
        if kind == "LinearLR" and not rule.get("by_epoch", True):
            numbers |= dict(warmup=rule["end"] - 1, warmup_factor=rule.get("start_factor", 1 / 3))
        elif kind == "MultiStepLR" and rule.get("by_epoch", True) == ("epochs" in numbers):
            numbers |= dict(schedule="step", milestones=tuple(rule["milestones"]), gamma=rule.get("gamma", 0.1))
        elif kind == "CosineAnnealingLR":
            numbers |= dict(schedule="cosine")
            if rule.get("eta_min") or rule.get("begin"):
                notes.append("CosineAnnealingLR: it goes from the end of the warm-up to the end of the run, and to 0")
        else:
            raise ValueError(f"config: param_scheduler: cannot follow {rule!r}")
    loader = config.get("train_dataloader") or {}
    return numbers | _batch(config, loader.get("batch_size", 2))


def _old(config: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """MMDetection 2: optimizer, optimizer_config, lr_config, runner, data."""
    if not isinstance(config.get("optimizer"), dict):
        raise ValueError("config: expected optim_wrapper or optimizer, and a schedule: this is a model alone")
    given = config["optimizer"]
    numbers = _optimizer(given, notes) | _paramwise(given.get("paramwise_cfg"), notes)
    clip = (config.get("optimizer_config") or {}).get("grad_clip")
    if clip:
        numbers["clip_norm"] = float(clip["max_norm"])
    if config.get("fp16") is not None:
        numbers["precision"] = "fp16"
    runner = config.get("runner") or {}
    if "max_iters" in runner:
        numbers["steps"] = runner["max_iters"]
    elif "max_epochs" in runner or "total_epochs" in config:
        numbers["epochs"] = runner.get("max_epochs", config.get("total_epochs"))
    else:
        raise ValueError("config: expected runner or total_epochs")
    rule = config.get("lr_config") or {}
    policy = rule.get("policy", "fixed").lower()
    if policy == "step":
        steps = rule["step"]
        numbers["milestones"] = (steps,) if isinstance(steps, int) else tuple(steps)
        numbers["gamma"] = rule.get("gamma", 0.1)
    elif policy in ("cosineannealing", "fixed"):
        numbers |= dict(schedule="cosine" if policy != "fixed" else "step", milestones=())
    else:
        raise ValueError(f"config: lr_config: cannot follow the policy {rule['policy']!r}")
    if rule.get("warmup") not in (None, "linear"):
        raise ValueError(f"config: lr_config: expected a linear warm-up, got {rule['warmup']!r}")
    has = rule.get("warmup") == "linear" and not rule.get("warmup_by_epoch")
    numbers |= dict(warmup=rule.get("warmup_iters", 0) if has else 0, warmup_factor=rule.get("warmup_ratio", 0.1))
    return numbers | _batch(config, (config.get("data") or {}).get("samples_per_gpu", 2))


def _batch(config: dict[str, Any], size: int) -> dict[str, Any]:
    base = (config.get("auto_scale_lr") or {}).get("base_batch_size")
    return dict(batch_size=size, base_batch=base or GPUS * size)


def _pictures(config: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """flip, multi_scale, lsj, min_crop_size, photometric of the training pipeline."""
    pipeline = next((d["pipeline"] for d in _datasets(config) if isinstance(d.get("pipeline"), list | tuple)),
                    config.get("train_pipeline"))  # fmt: skip
    if pipeline is None:
        return {}
    numbers, crop, resized = dict(flip=0.0), None, False
    for d in pipeline:
        kind = _kind(d)
        if kind == "RandomFlip":
            if d.get("direction", "horizontal") != "horizontal":
                notes.append(f"RandomFlip: flips horizontally, not {d['direction']}")
            numbers["flip"] = float(d.get("prob", d.get("flip_ratio", 0.5)) or 0.0)
        elif kind in ("Resize", "RandomResize", "RandomChoiceResize"):
            numbers |= _scales(d, notes, config_sizes(config))
            resized = True
        elif not resized and (kind == "MinIoURandomCrop" or d.get("crop_type") == "relative_range"):
            numbers["min_crop_size"] = _crop_share(d, notes)
            continue
        elif kind == "PhotoMetricDistortion":
            numbers["photometric"] = True
        elif kind not in _PLAIN:
            notes.append(f"{kind}: a transform that is left out")
        crop = d if kind == "RandomCrop" else crop
    if crop is not None and "lsj" in numbers:
        size = crop["crop_size"]
        numbers["crop"] = size if isinstance(size, int) else max(size)
    elif crop is not None:
        notes.append("RandomCrop: left out, but for one by relative_range before all resizes, or of crop_size pixels "
                     "behind a RandomResize by a range of ratios")  # fmt: skip
    return numbers


def _crop_share(d: dict[str, Any], notes: list[str]) -> float:
    """The least share of a side that a random crop of the whole picture leaves."""
    if _kind(d) == "MinIoURandomCrop":
        notes.append(
            "MinIoURandomCrop: every crop holds the middle of a box, no overlap is asked for, no ratio of the sides"
        )
    size = d.get("min_crop_size", 0.3) if _kind(d) == "MinIoURandomCrop" else d["crop_size"]
    shares = tuple(size) if isinstance(size, list | tuple) else (size,)
    if len(set(shares)) > 1:
        notes.append(f"{_kind(d)}: both sides keep at least {min(shares)}, not {shares[0]} and {shares[1]}")
    return float(min(shares))


def _scales(d: dict[str, Any], notes: list[str], own: tuple[int, int]) -> dict[str, Any]:
    """What a resize of the training pipeline draws, as factors of the model's own short side. own: (long, short)."""
    scales: Any = d.get("scales", d.get("scale", d.get("img_scale")))
    if "ratio_range" in d:
        side = scales if isinstance(scales, int) else max(scales)
        return dict(lsj=tuple(d["ratio_range"]), crop=side)
    if scales is None:
        return {}
    longs, shorts = zip(*all_pairs(scales))
    if set(longs) != {own[0]}:
        notes.append(f"{_kind(d)}: the long side's limit stays the model's")
    if len(set(shorts)) > 1 and (_kind(d) == "RandomChoiceResize" or d.get("multiscale_mode", "range") == "value"):
        notes.append(f"{_kind(d)}: a short side from {min(shorts)} to {max(shorts)} is drawn, not one of {len(shorts)}")
    factors = min(shorts) / own[1], max(shorts) / own[1]
    return {} if factors == (1.0, 1.0) else dict(multi_scale=factors)
