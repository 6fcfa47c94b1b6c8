"""What a backbone (or a shared head) starts from: the weights of an image classifier."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

# What an image classifier has no weights for: the layers that detectors add to a residual block.
_ADDED = ("conv_offset", "context_block", "gen_attention_block", "nonlocal_block", "conv_block", "num_batches_tracked")


def pretrained_source(pretrained: str | None, init_cfg: dict | None) -> tuple[str, str] | None:
    """(checkpoint, key prefix in it) from MMDetection's 2.x or 3.x way to name one. Raises ValueError for both at once, and
    for another init_cfg: random initialisation is each module's own."""
    if init_cfg is None:
        return None if pretrained is None else (pretrained, "")
    if pretrained is not None or not isinstance(init_cfg, dict) or init_cfg.get("type") != "Pretrained":
        raise ValueError(f"init_cfg: expected type='Pretrained' and no `pretrained`, got {init_cfg} and {pretrained!r}")
    return init_cfg["checkpoint"], init_cfg.get("prefix") or ""


@torch.no_grad()
def load_classifier(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Loads a classifier's state dict into a backbone, in place.

    Keys that `module` has no place for (the classifier's last layer, a stage that was not built) are left; plugins and the
    offsets of deformable convolutions keep their own start. Raises ValueError naming what the state lacks or has in another
    shape; `module` is untouched then.
    """
    own = module.state_dict()
    wanted = {k for k in own if not any(part in k for part in _ADDED)}
    missing = sorted(k for k in wanted if k not in state)
    shapes = [f"{k} {list(state[k].shape)}, expected {list(own[k].shape)}"
              for k in sorted(set(own) & set(state)) if state[k].shape != own[k].shape]  # fmt: skip
    if missing or shapes:
        what = [f"lacks {', '.join(missing[:6])}"] * bool(missing) + [f"has {', '.join(shapes[:6])}"] * bool(shapes)
        raise ValueError(f"pretrained: {source} does not fit the {type(module).__name__}: it {' and '.join(what)}")
    module.load_state_dict({k: v for k, v in state.items() if k in own}, strict=False)


def take_pretrained(module: nn.Module, state: Mapping[str, Tensor] | None) -> None:
    """`load_classifier` of what `init_weights` was handed. Raises ValueError where the module names a checkpoint
    (`module.pretrained`) and nobody read it."""
    if state is None and module.pretrained is not None:
        raise ValueError(
            f"init_weights: the {type(module).__name__} starts from {module.pretrained[0]}: hand in its state dict "
            "(checkpoints.pretrained_state reads it), or call the detector's init_weights()"
        )
    if state is not None:
        load_classifier(module, state, "the state dict" if module.pretrained is None else module.pretrained[0])
