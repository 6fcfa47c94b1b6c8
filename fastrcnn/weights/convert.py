"""One peer's checkpoint as another's."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrcnn._write import write_whole
from fastrcnn.checkpoints.checkpoint import PEERS
from fastrcnn.checkpoints.peer_options import EXTRA_STATE, PeerOptions
from fastrcnn.models.base_detector import BaseDetector
from fastrcnn.models.profiles import Profile, get_profile
from fastrcnn.models.resnet import Bottleneck
from fastrcnn.models.retinanet import RetinaNet
from fastrcnn.weights.load import infer_model
from fastrcnn.weights.save import export_weights, save, writable

FORMATS = (*PEERS, "fastrcnn")
UNNAMED = "the file does not name the classes"
NORM_EPS = 1e-5  # of the norms that each peer builds for a checkpoint of one's own
# What of a profile decides boxes and no tensor holds.
RULES = dict(
    resize="how pictures are resized",
    round_anchors="rounding of anchors",
    strides_from_grid="strides told by the maps",
    symmetric_clip="bounds of deltas",
    rpn_topk_on="what proposals are ranked by",
    rpn_nms_on="what their NMS sorts by",
    sampling_ratio="samples of RoIAlign",
    aligned="alignment of RoIAlign",
    rescale_before_nms="NMS before or after scaling back",
    clip_after_rescale="boxes cut at the picture",
)
RETINANET_RULES = dict(resize=RULES["resize"], dense_anchors="anchors", dense_extra_convs="what P6 and P7 are made from",
                       dense_drops_small="small boxes")  # fmt: skip
INPUT = "model = dict(backbone=dict(style={style!r}), data_preprocessor=dict(mean={mean}, std={std}, bgr_to_rgb={rgb}))"


def _byte_input(profile: Profile, options: PeerOptions) -> tuple[Tensor, Tensor]:
    """(mean, std) of red, green and blue bytes. A profile that interpolates has values from 0 to 1."""
    values = torch.tensor([options.mean, options.std], dtype=torch.float64)
    values = values * 255 if profile.resize == "interpolate" else values
    return tuple(values if options.bgr_to_rgb else values.flip(1))


def _fold_input(
    weight: Tensor, mine: tuple[Tensor, Tensor, bool | None], theirs: tuple[Tensor, Tensor, bool | None]
) -> Tensor:
    """The first convolution's weight for another order and division of its input: (mean, std, whether it is RGB)."""
    rgb = weight.double() if mine[2] else weight.double().flip(1)
    rgb = rgb * (theirs[1] / mine[1])[:, None, None]
    return (rgb if theirs[2] else rgb.flip(1)).to(weight.dtype)


def _fold_epsilon(state: dict[str, Tensor], epsilon: float) -> None:
    """Makes scales of the backbone's frozen norms right for NORM_EPS in place of `epsilon`."""
    for key in [k for k in state if k.startswith("backbone.") and k.endswith(".running_var")]:
        scale, variance = key.replace(".running_var", ".weight"), state[key].double()
        state[scale] = (state[scale].double() * ((variance + NORM_EPS) / (variance + epsilon)).sqrt()).to(
            state[scale].dtype
        )


def become(model: BaseDetector, peer: str) -> list[str]:
    """Turns a model of any profile, in place, into one of `peer`'s that computes the same features, as the peer builds it
    by default, and returns a sentence on each thing that no tensor can hold.

    Order and division of the input's channels are folded into the first convolution, the epsilon of the backbone's norms
    into their scales. Raises ValueError for what the peer's own models are not.
    """
    own, other, old, notes = model.profile, get_profile(peer), model.peer_options, []
    state = {k: v for k, v in model.state_dict().items() if k != EXTRA_STATE}
    if old.norm_eps is not None and old.norm_eps != NORM_EPS:
        _fold_epsilon(state, old.norm_eps)
    style = old.style if peer == "mmdet" or old.style is None else PEERS[peer].own_style(state)
    if style != old.style and any(isinstance(m, Bottleneck) for m in model.modules()):
        if peer == "torchvision":
            raise ValueError(
                "torchvision's bottlenecks have their stride on the 3x3 convolution, this model's on the 1x1"
            )
        notes.append(f"set MODEL.RESNETS.STRIDE_IN_1X1 to {old.style == 'caffe'}")
    if peer == "mmdet" and old.style == "caffe":
        notes.append("set style='caffe' of the backbone")
    if own.name != peer:
        model.follow(peer, PeerOptions(style=style, norm_eps=NORM_EPS))
        first = next(k for k in ("backbone.conv1.weight", "backbone.stem.0.weight") if k in state)
        mean, std = _byte_input(own, old)
        their_mean, their_std = _byte_input(other, model.peer_options)
        if state[first].shape[1] == 3:
            theirs = their_mean, their_std, model.peer_options.bgr_to_rgb
            state[first] = _fold_input(state[first], (mean, std, old.bgr_to_rgb), theirs)
        if not torch.allclose(mean, their_mean, rtol=0, atol=0.1):
            notes.append(f"set the mean of red, green and blue bytes to {[round(v, 3) for v in mean.tolist()]}")
        rules = RETINANET_RULES if isinstance(model, RetinaNet) else RULES
        differs = [said for rule, said in rules.items() if getattr(own, rule) != getattr(other, rule)]
        notes.append(f"{peer} does otherwise than {own.name}, so that boxes come near and are not the same: "
                     f"{', '.join(differs)}")  # fmt: skip
    else:
        model.set_peer_options(PeerOptions(old.mean, old.std, old.bgr_to_rgb, old.pad_size_divisor, style, NORM_EPS))
    model.load_state_dict(state, strict=False)
    return notes


def convert_checkpoint(
    source: str | Path, to: str, out: str | Path, class_names: Sequence[str] | None = None
) -> list[str]:
    """Writes the checkpoint of any peer as one of `to`: "mmdet" (state_dict, and meta with the class names), "torchvision"
    (a state dict), "detectron2" (model), or "fastrcnn" (what `save` writes, which gives the peer's own numbers).
    class_names: by label, in the place of those that the checkpoint has.

    Returns a sentence on each thing to know that the file cannot hold. Raises ValueError where the peer has no such model,
    OSError.
    """
    if to not in FORMATS:
        raise ValueError(f"to: expected one of {', '.join(FORMATS)}, got {to!r}")
    path = writable(out)
    model = infer_model(source)
    if class_names is not None:
        model.name_classes(class_names)
    if to == "fastrcnn":
        save(model, path)
        return [] if model.class_names else [UNNAMED]
    if path.suffix.lower() == ".safetensors":
        raise ValueError(
            f"out: {to} reads what torch.save writes: expected a name that ends in .pth or .pt, got {path}"
        )
    names = model.class_names
    try:
        notes = become(model, to)
        state = export_weights(model, to)
    except ValueError as error:
        raise ValueError(f"{source} as {to}: {error}") from None
    try:
        infer_model(dict(state))
    except ValueError:
        notes.append(f"{to} has no model of these depths and widths by name: build it there as this one was built")
    if names is None:
        notes.append(UNNAMED)
    elif to != "mmdet":
        notes.append(f"the classes are, in this order: {', '.join(names)}")
    o = model.peer_options
    meta: dict[str, Any] = dict(cfg=INPUT.format(style=o.style, mean=o.mean, std=o.std, rgb=o.bgr_to_rgb))
    if names is not None:
        meta["dataset_meta"] = dict(CLASSES=tuple(names))
    content = dict(mmdet=dict(meta=meta, state_dict=state), torchvision=state, detectron2=dict(model=state))[to]
    write_whole(path, lambda file: torch.save(content, file))
    return notes
