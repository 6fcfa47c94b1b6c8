"""Writes our own checkpoints, and the peers' keys for those who go back."""

import json

from torch import Tensor, nn

from fastrcnn.checkpoints import detectron2, mmdet
from fastrcnn.layers.builders import ConvWS2d
from fastrcnn.models.build import merge
from fastrcnn.models.resnet import Bottleneck
from fastrcnn.models.rpn_head import RPNHead
from fastrcnn.weights.load import PEERS
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
    state, head = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}, getattr(model, "rpn_head", None)
    if peer == "mmdet":
        return mmdet.export(state)
    if peer == "detectron2" and isinstance(head, RPNHead):
        anchors = head.anchor_generator  # ratio by ratio, or already in Detectron2's order
        exported = detectron2.export(state, len(anchors.ratios) if anchors.scale_major else 1)
    else:
        exported = PEERS[peer].export(state)
    _check_layers(model, peer, PEERS[peer].own_style(state))
    return exported


def model_metadata(name: str, model: Detector, overrides: dict) -> dict[str, str]:
    """What `infer_model` reads back from a safetensors file of ours."""
    names = "\n".join(model.class_names or [])
    options = model.peer_options()
    backbone = {"style": options["style"]} if "style" in options else {}
    if "norm_eps" in options:
        backbone["norm_cfg"] = dict(eps=options["norm_eps"])
    overrides = merge(overrides, dict(data_preprocessor=options["data_preprocessor"], backbone=backbone))
    return dict(model=name, profile=model.profile.name, overrides=json.dumps(overrides), class_names=names)
