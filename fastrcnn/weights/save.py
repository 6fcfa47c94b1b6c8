"""Writes our own checkpoints, and the peers' keys for those who go back."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fastrcnn._write import beside, write_whole
from fastrcnn.checkpoints import detectron2
from fastrcnn.checkpoints.checkpoint import PEERS
from fastrcnn.checkpoints.peer_options import EXTRA_STATE, to_text
from fastrcnn.layers.builders import ConvWS2d
from fastrcnn.models.build import merge
from fastrcnn.models.resnet import Bottleneck
from fastrcnn.models.rpn_head import RPNHead
from fastrcnn.weights.describe import description
from fastrcnn.zoo.recipes import Detector


def _check_layers(model, peer: str, style: str) -> None:
    """Raises ValueError for layers with the peer's keys that compute something else than the peer's."""
    setting = " (MODEL.RESNETS.STRIDE_IN_1X1)" if peer == "detectron2" else ""
    for name, m in model.named_modules():
        if isinstance(m, Bottleneck) and max(m.conv1.stride + m.conv2.stride) > 1:
            found = "caffe" if max(m.conv1.stride) > 1 else "pytorch"
            if found != style:
                raise ValueError(f"{name}: expected style {style!r} as in {peer}'s own models{setting}, got {found!r}")
        if isinstance(m, nn.GroupNorm) and m.num_groups != 32:
            raise ValueError(f"{name}: expected the 32 groups of {peer}'s group norms, got {m.num_groups}")
        if isinstance(m, ConvWS2d):
            raise ValueError(f"{name}: {peer} has no convolution with standardised weights (ConvWS)")


def export_weights(model: Detector, peer: str) -> dict[str, Tensor]:
    """The model's state dict in the keys of "mmdet", "torchvision" or "detectron2", for `load_state_dict` there.

    The weights give the same detections there only where the model follows that peer's profile and is built as the peer's
    own, so another one is refused: ValueError. So is a key that the peer's own models have no place for.
    """
    if peer not in PEERS:
        raise ValueError(f"peer: expected one of {', '.join(PEERS)}, got {peer!r}")
    if model.profile.name != peer:
        raise ValueError(
            f"the model follows the profile {model.profile.name!r}: its weights would give other boxes in {peer}"
        )
    state, head = _tensors(model), getattr(model, "rpn_head", None)
    if peer == "detectron2" and isinstance(head, RPNHead):
        anchors = head.anchor_generator  # ratio by ratio, or already in Detectron2's order
        exported = detectron2.export(state, len(anchors.ratios) if anchors.scale_major else 1)
    else:
        exported = PEERS[peer].export(state)
    if peer != "mmdet":
        _check_layers(model, peer, PEERS[peer].own_style(state))
    return exported


def _tensors(model: Detector) -> dict[str, Tensor]:
    """Copies of a model's tensors on the CPU, each in a memory of its own."""
    state = {k: v for k, v in model.state_dict().items() if k != EXTRA_STATE}
    return {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in state.items()}


def _categories(model: Detector) -> dict[str, str]:
    """The classes as COCO's list of dicts: names in the order of the labels, and ids where the model has some."""
    names, ids = model.class_names, model.category_ids
    if names is None and ids is None:
        return {}
    for what, values in (("class_names", names), ("category_ids", ids)):
        if values is not None and len(values) != model.num_classes:
            raise ValueError(f"{what}: expected one for each of the {model.num_classes} classes, got {len(values)}")
    rows: list[dict] = [{} for _ in range(model.num_classes)]
    for row, name in zip(rows, names or ()):
        row["name"] = str(name)
    for row, number in zip(rows, ids or ()):
        row["id"] = int(number)
    return dict(categories=json.dumps(rows))


def model_metadata(name: str, model: Detector, overrides: dict) -> dict[str, str]:
    """Metadata in the form of version 0.1, for those who write a safetensors file themselves: the model is the named one
    with `overrides` (`model.zoo_overrides`) laid over it. `save` writes all of it, and more."""
    o = model.peer_options
    pixels = dict(mean=o.mean, std=o.std, bgr_to_rgb=o.bgr_to_rgb)
    backbone = {} if o.style is None else dict(style=o.style)
    if o.norm_eps is not None:
        backbone["norm_cfg"] = dict(eps=o.norm_eps)
    overrides = merge(
        {k: v for k, v in overrides.items() if v is not None}, dict(data_preprocessor=pixels, backbone=backbone)
    )
    names = "\n".join(model.class_names or [])
    return dict(model=name, profile=model.profile.name, overrides=json.dumps(overrides), class_names=names)


def writable(path: str | Path) -> Path:
    """`path`, where `save` can write: its folder is made. Ask before a long training.

    Raises ValueError for a suffix other than .safetensors, .pth and .pt, OSError where nothing can be written.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() not in (".safetensors", ".pth", ".pt"):
        raise ValueError(f"{path}: expected a name that ends in .safetensors, .pth or .pt")
    if path.exists() and not path.is_file():
        raise OSError(f"{path}: is no file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        trial = beside(path)
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror})") from None
    return path


def described(model: Detector) -> dict[str, str]:
    """What a file says of a model beside its weights. Ask before a long training: raises ValueError for a model that a file
    cannot describe, and for names or ids that are not one for each class."""
    meta = dict(detector=description(model), peer=to_text(model.profile.name, model.peer_options), **_categories(model))
    if model.config is not None:
        meta["mmdet_config"] = json.dumps(model.config, default=str)
    return meta


def _in_order(encoded: bytes) -> bytes:
    """A safetensors file with its metadata sorted: the package writes them in another order each time, and the same
    weights are to be the same file."""
    end = 8 + int.from_bytes(encoded[:8], "little")
    header = json.loads(encoded[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text + encoded[end:]


def save(model: Detector, path: str | Path, notes: Mapping[str, str] | None = None) -> Path:
    """Writes a model so that `infer_model`, `load_weights` and `--weights` give the same model again: weights, structure,
    profile, class names and category ids. Returns the path.

    path: .safetensors (needs the package safetensors), .pth or .pt; its folder is made, and a file of that name is replaced
    only when the new one is whole. notes: texts to keep in the file's metadata. Raises what `writable` and `described`
    raise, and ImportError.
    """
    path = writable(path)
    meta, state = {**(notes or {}), **described(model)}, _tensors(model)
    if path.suffix.lower() == ".safetensors":
        try:
            from safetensors.torch import save as to_bytes
        except ImportError:
            raise ImportError("writing .safetensors needs the package safetensors: pip install safetensors") from None
        encoded = _in_order(to_bytes(state, meta))
        write_whole(path, lambda file: file.write(encoded))
    else:
        write_whole(path, lambda file: torch.save(dict(meta=meta, state_dict=state), file))
    return path
