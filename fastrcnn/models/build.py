"""Modules from MMDetection's dicts: dict(type="ResNet", depth=50, ...)."""

import re
from collections.abc import Callable

from torch import nn


def build(cfg: dict | nn.Module, table: dict[str, Callable[..., nn.Module]], what: str) -> nn.Module:
    """The module that `cfg` describes, by its type's entry in `table`; a module is returned as it is.

    Raises ValueError naming `what`, and the unknown type or the option that is not supported.
    """
    if isinstance(cfg, nn.Module):
        return cfg
    if not isinstance(cfg, dict):
        raise TypeError(f"{what}: expected a module or a dict, got {type(cfg).__name__}")
    options = dict(cfg)
    kind = options.pop("type", None)
    if kind not in table:
        raise ValueError(f"{what}: unknown type {kind!r}, expected one of {sorted(table)}")
    try:
        return table[kind](**options)
    except TypeError as error:
        option = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if option is None or option[1] not in options:
            raise
        raise ValueError(f"{what}: {kind} has no option {option[1]!r}, or it is not supported") from None


def settings(defaults: dict, given: dict | None, what: str) -> dict:
    """`given` laid over `defaults`. Raises ValueError for an option that is not among them, so that none is ignored."""
    given = given or {}
    unknown = sorted(set(given) - set(defaults) - {"debug"})
    if unknown:
        raise ValueError(f"{what}: options that are not supported: {unknown}, expected some of {sorted(defaults)}")
    return {**defaults, **given}
