"""Modules from MMDetection's dicts: dict(type="ResNet", depth=50, ...)."""

from collections.abc import Callable

from torch import nn

from fastrcnn.layers import construct


def build(cfg: dict | nn.Module, table: dict[str, Callable[..., nn.Module]], what: str) -> nn.Module:
    """The module that `cfg` describes, by its type's entry in `table`; a module is returned as it is.

    Raises ValueError naming `what`, and the unknown type or the option that is not supported.
    """
    if isinstance(cfg, nn.Module):
        return cfg
    if not isinstance(cfg, dict):
        types = [c.get("type") for c in cfg if isinstance(c, dict)] if isinstance(cfg, list | tuple) else []
        several = f" of {', '.join(map(str, types))}" if types else ""
        raise ValueError(f"{what}: expected a module or a dict, got a {type(cfg).__name__}{several}")
    options = dict(cfg)
    kind = options.pop("type", None)
    if kind not in table:
        raise ValueError(f"{what}: unknown type {kind!r}, expected one of {sorted(table)}")
    return construct(table[kind], what, kind, **options)


def settings(defaults: dict, given: dict | None, what: str) -> dict:
    """`given` laid over `defaults`. Raises ValueError for an option that is not among them, so that none is ignored."""
    given = given or {}
    unknown = sorted(set(given) - set(defaults) - {"debug"})
    if unknown:
        raise ValueError(f"{what}: options that are not supported: {unknown}, expected some of {sorted(defaults)}")
    return {**defaults, **given}


def merge(base: dict, overrides: dict) -> dict:
    """`overrides` laid over `base`, dict by dict; a dict with _delete_=True replaces instead (MMDetection's rule)."""
    out = dict(base)
    for key, value in overrides.items():
        if key == "_delete_":
            continue  # False: it is read where it is True
        if isinstance(value, dict) and isinstance(out.get(key), dict) and not value.get("_delete_"):
            out[key] = merge(out[key], value)
        else:
            out[key] = {k: v for k, v in value.items() if k != "_delete_"} if isinstance(value, dict) else value
    return out
