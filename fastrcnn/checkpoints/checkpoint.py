"""What a checkpoint holds, whoever wrote it."""

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fastrcnn.checkpoints import detectron2, mmdet, torchvision
from fastrcnn.checkpoints.peer_options import EXTRA_STATE, PeerOptions, from_text
from fastrcnn.checkpoints.pretrained import CLASSIFIER
from fastrcnn.checkpoints.read import check_finite, read_tensors, within

PEERS = {"torchvision": torchvision, "detectron2": detectron2, "mmdet": mmdet}
ANCHORS = tuple(anchor for peer in PEERS.values() for anchor in peer.ANCHORS)  # of which every detector has one
_NO_BOXES = re.compile(r"roi_heads?\.(mask|keypoint)_(head|predictor)\.")  # layers that the boxes do not depend on


@dataclass(frozen=True)
class Checkpoint:
    """state: tensors in our keys; peer: whose profile they follow; options: what the file says of the model beside it;
    meta: the rest that lies beside the tensors, plain data."""

    state: dict[str, Tensor]
    peer: str
    options: PeerOptions
    meta: dict

    def __getitem__(self, index: int):
        """As of the tuple of the four."""
        return (self.state, self.peer, self.options, self.meta)[index]

    @property
    def num_classes(self) -> int:
        """Foreground classes; an RPN's is one."""
        cls, reg, fc = (len(self.state.get(f"{name}.weight", ())) for name in
                        ("bbox_head.retina_cls", "bbox_head.retina_reg", "roi_head.bbox_head.fc_cls"))  # fmt: skip
        if cls and reg:  # A * C channels, where the box layer has A * 4
            return 4 * cls // reg
        return max(fc - 1, 1)

    @property
    def unsaid(self) -> PeerOptions:
        """What the peer's own model has and its files do not say. Our own files say it."""
        is_detectron2s = self.peer == "detectron2" and not {"peer", "overrides"} & set(self.meta)
        return detectron2.defaults(self.state) if is_detectron2s else PeerOptions()

    def categories(self) -> tuple[list[str] | None, list[int] | None]:
        """(class names, category ids) by label, each None where the file does not say. Raises ValueError."""
        if "categories" in self.meta:
            rows = metadata_json(self.meta, "categories", list)
            if not all(isinstance(row, dict) for row in rows):
                raise ValueError("categories: expected a list of dicts with a name and an id")
            names, ids = [row.get("name") for row in rows], [row.get("id") for row in rows]
            known = all(type(i) is int for i in ids) and len(set(ids)) == len(ids)
            return names if all(isinstance(n, str) for n in names) else None, ids if known else None
        names = self.meta.get("class_names")
        return names.split("\n") if isinstance(names, str) and names else mmdet.class_names(self.meta), None


def metadata_json(meta: dict, key: str, kind: type):
    """The list or dict that a text in one of our own files' metadata describes. Raises ValueError."""
    text = meta[key]
    try:
        content = json.loads(text) if isinstance(text, str) and len(text) <= 1_000_000 else None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, kind):
        raise ValueError(f"{key} in its metadata: expected JSON of a {kind.__name__}")
    return content


def _of_first_files(meta: dict) -> PeerOptions:
    """The peer's options in our files of version 0.1, among what differs from the named model."""
    said = metadata_json(meta, "overrides", dict) if "overrides" in meta else {}
    backbone, pixels = said.get("backbone", {}), said.get("data_preprocessor", {})
    norm = backbone.get("norm_cfg", {}) if isinstance(backbone, dict) else None
    if not isinstance(norm, dict) or not isinstance(pixels, dict):
        raise ValueError("overrides in its metadata: expected dicts of a backbone and its norm_cfg, and of the pixels")
    options = dict(pixels, style=backbone.get("style"), norm_eps=norm.get("eps"))
    return PeerOptions.read({key: value for key, value in options.items() if value is not None})


def _said(state: dict[str, Tensor], meta: dict, peer: str) -> tuple[str, PeerOptions]:
    """(profile, options) of a file in the keys of `peer`."""
    if EXTRA_STATE in state:
        meta["peer"] = bytes(state.pop(EXTRA_STATE).flatten()[:10_000].long().clamp(0, 255).tolist()).decode()
    if peer == "mmdet" and "peer" in meta:
        profile, options = from_text(meta["peer"])
        if profile == "mmdet":  # its own configuration's text says more than the model that was saved
            options = mmdet.profile_options(state, meta).over(options)
    else:
        profile, options = str(meta.get("profile", peer)), PEERS[peer].profile_options(state, meta)
        options = _of_first_files(meta).over(options)
    if profile not in PEERS:
        raise ValueError(f"profile: expected one of {', '.join(PEERS)}, got {profile!r}")
    return profile, options


def load_checkpoint(path_or_url: str | Path | Mapping) -> Checkpoint:
    """Reads a file, an address or a state dict, finds out whose it is by its keys, and puts them into ours.

    Raises ValueError where the keys belong to none of the three peers, or to MMDetection 1.x, or where weights are NaN or
    infinite, and whatever `read_tensors` raises.
    """
    tensors, meta = read_tensors(path_or_url)
    return as_checkpoint(tensors, meta, "the state dict" if isinstance(path_or_url, Mapping) else str(path_or_url))


def as_checkpoint(tensors: dict[str, Tensor], meta: dict, source: str) -> Checkpoint:
    """`load_checkpoint` of what `read_tensors` gave; source: what messages call it."""
    found = within(tensors, ANCHORS, source)
    state = {key: value for key, value in found.items() if not _NO_BOXES.match(key)}
    if len(state) < len(found):
        warnings.warn(f"{source}: its layers for masks or keypoints are left out: it finds boxes", stacklevel=2)
    for name, peer in PEERS.items():
        if not peer.detect(state):
            continue
        for key, value in state.items():
            if key.endswith((".weight", ".bias")) and (value.dim() == 0 or value.numel() == 0):
                raise ValueError(f"{source}: expected rows of weights in {key}, got the shape {list(value.shape)}")
        try:
            if peer is mmdet:
                mmdet.check_version(state, meta)
            profile, options = _said(state, meta, name)
            converted = peer.convert(state)
        except (ValueError, UnicodeDecodeError) as error:
            raise ValueError(f"{source}: {error}") from None
        check_finite(converted, source)
        return Checkpoint(converted, profile, options, meta)
    what = "not a Faster R-CNN or RetinaNet of MMDetection, torchvision or Detectron2"
    raise ValueError(f"{source}: {_told(state) or what} (first keys: {', '.join(list(state)[:3])})")


def _told(state: dict[str, Tensor]) -> str | None:
    """What a state dict is that none of the peers' modules takes, where its keys tell."""
    if "fc.weight" in state and CLASSIFIER[0] in state:
        return "an image classifier, which finds no boxes: `fastrcnn train --weights` starts from it"
    if any(key.startswith(("roi_heads.box_predictor.", "head.classification_head.")) for key in state):
        return "a detector of torchvision's whose kind or body is not supported (FCOS, SSD, MobileNet): a ResNet is"
    return None
