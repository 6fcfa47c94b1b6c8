"""What every detector shares: preprocessing, features, targets, torchvision's calling convention."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastrcnn.checkpoints.peer_options import EXTRA_STATE, PeerOptions, from_text, to_text
from fastrcnn.checkpoints.pretrained import pretrained_state
from fastrcnn.models.build import build
from fastrcnn.models.fpn import FPN
from fastrcnn.models.preprocess import DataPreprocessor
from fastrcnn.models.profiles import get_profile
from fastrcnn.models.resnet import ResNet, ResNetV1d, ResNeXt
from fastrcnn.ops._checks import coordinates

BACKBONES = {"ResNet": ResNet, "ResNeXt": ResNeXt, "ResNetV1d": ResNetV1d}


@dataclass(frozen=True)
class Built:
    """What a detector was built with, for a return to its first profile and for a file that says how to build it again."""

    profile: str
    options: PeerOptions
    trains_norms: bool
    arguments: dict  # of the constructor, its type among them; parts that were handed in as modules stand as modules


class BaseDetector(nn.Module):
    """Backbone and neck in front of the heads that a subclass adds, with its `predict` and `loss`.

    backbone, neck (or None): modules or MMDetection's dicts; profile: whose semantics, "mmdet", "torchvision" or
    "detectron2"; min_size, max_size: pixels of the short and at most of the long side after resizing;
    data_preprocessor: MMDetection's mean, std, bgr_to_rgb, pad_size_divisor.
    """

    reads_labels = True  # of the targets; an RPN's objects are one class whatever they are called

    def __init__(
        self,
        backbone: dict | nn.Module,
        neck: dict | nn.Module | None,
        profile: str = "mmdet",
        min_size: int = 800,
        max_size: int = 1333,
        data_preprocessor: dict | None = None,
    ):
        super().__init__()
        self.profile = get_profile(profile)
        self.data_preprocessor = DataPreprocessor(self.profile, min_size, max_size, **(data_preprocessor or {}))
        self.backbone = build(backbone, BACKBONES, "backbone")
        self.neck = None if neck is None else build(neck, {"FPN": FPN}, "neck")
        self.class_names: list[str] | None = None
        self.category_ids: list[int] | None = None  # by label, of the annotations that it was trained on
        self.config: dict | None = None  # MMDetection's whole one, data and schedule, where the model is from one

    def _built(self, dense_head: nn.Module, arguments: dict) -> None:
        """What a subclass says when its parts stand: the head that proposes or detects on every level, and the arguments of
        its constructor (its first locals)."""
        dense_head.pad_size_divisor = self.data_preprocessor.pad_size_divisor
        given = {k: v for k, v in arguments.items() if k not in ("self", "__class__")}
        given = {k: v if isinstance(v, nn.Module) else copy.deepcopy(v) for k, v in given.items()}
        trained = any(p.requires_grad for m in self._norms() for p in m.parameters())
        self.built = Built(self.profile.name, self.peer_options, trained, {"type": type(self).__name__, **given})

    def _norms(self) -> list[nn.Module]:
        return [m for m in self.backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    @property
    def label_offset(self) -> int:
        """The first label of an object outside the network: 1 where the peer keeps 0 for the background."""
        return self.profile.label_offset

    @property
    def dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    def init_weights(self) -> None:
        """Fresh weights everywhere, and the pretrained ones that the backbone or a shared head names, as MMDetection's
        `init_weights` does. Building alone reads no file. Raises what `pretrained_state` raises, and ValueError where the
        file does not fit."""
        states = {m: pretrained_state(*m.pretrained) for m in self.modules() if getattr(m, "pretrained", None)}
        for child in self.children():
            if hasattr(child, "init_weights"):
                child.init_weights(*[states[m] for m in child.modules() if m in states])

    def set_profile(self, name: str) -> None:
        """Takes over every default of a peer, those that are constructor arguments in MMDetection included; where the model
        was built for this peer, what it was built with says more than the profile (a caffe-style C4, say)."""
        self.profile = get_profile(name)
        self.set_peer_options(PeerOptions())
        if isinstance(self.backbone, ResNet):
            trained = self.profile.trains_norms and self.backbone.style == "pytorch"
            self.backbone.train_norms(self.built.trains_norms if name == self.built.profile else trained)

    @property
    def peer_options(self) -> PeerOptions:
        """What the model has beside its profile and a checkpoint may decide."""
        p, norms = self.data_preprocessor, self._norms()
        return PeerOptions(
            mean=p.mean,
            std=p.std,
            bgr_to_rgb=not p.bgr,
            pad_size_divisor=p.pad_size_divisor,
            style=self.backbone.style if isinstance(self.backbone, ResNet) else None,
            norm_eps=norms[0].eps if norms else None,
        )

    def _default_options(self) -> PeerOptions:
        """Those of the profile: what the model was built with, where it was built for it, else the peer's own."""
        p, built = self.profile, self.built
        if p.name == built.profile:
            return built.options
        style = p.resnet_style or ("caffe" if self.neck is None else "pytorch")
        style = "pytorch" if isinstance(self.backbone, ResNeXt) else style
        pad = built.options.pad_size_divisor
        if self.neck is None:  # Detectron2 pads to a multiple of 32 for a pyramid alone
            pad = 1 if p.name == "detectron2" else 32
        return PeerOptions(p.mean, p.std, not p.bgr, pad, style, built.options.norm_eps)

    def set_peer_options(self, options: PeerOptions) -> None:
        """Takes over what a checkpoint says; what it does not say becomes the profile's again."""
        o = options.over(self._default_options())
        self.data_preprocessor.set_profile(self.profile, o.mean, o.std, o.bgr_to_rgb)
        for m in self.children():
            if hasattr(m, "pad_size_divisor"):  # the preprocessor and the heads that know the padded area
                m.pad_size_divisor = o.pad_size_divisor
        if isinstance(self.backbone, ResNet):
            self.backbone.set_style(o.style)
        for m in self._norms():
            m.eps = o.norm_eps

    def follow(self, profile: str, options: PeerOptions) -> None:
        """Becomes a peer's model with these options, and keeps nothing of another peer's."""
        if profile != self.profile.name:
            self.set_profile(profile)
        self.set_peer_options(options)

    # The same weights give other boxes in another profile, so a state dict says whose it is. MMDetection's has exactly
    # MMDetection's keys, and what it adds lies beside them, where torch keeps the version of each part: `torch.save`,
    # DistributedDataParallel, torch.compile and averaged models carry it along, and `load_state_dict` of MMDetection's own
    # model does not see it. In another profile a key more says it, so that no copy of the dict loses it, safetensors take
    # it, and MMDetection's own model, in which these weights would be wrong, refuses it. No buffer: it is not moved to a
    # device, averaged, broadcast or traced.

    def _save_to_state_dict(self, destination, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        text = to_text(self.profile.name, self.peer_options)
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]]["peer"] = text
        if self.profile.name != "mmdet":
            destination[prefix + EXTRA_STATE] = torch.tensor(list(text.encode()), dtype=torch.uint8, device="cpu")

    def _load_from_state_dict(
        self, state_dict, prefix: str, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        extra, text = state_dict.pop(prefix + EXTRA_STATE, None), local_metadata.get("peer")
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if extra is None and text is None:  # MMDetection's own, and files of before: the model stays what it is
            return
        try:
            self.follow(*from_text(text if extra is None else bytes(extra.long().tolist()).decode()))
        except ValueError as error:
            error_msgs.append(f"{prefix}{EXTRA_STATE}: {error}")

    def extract_feat(self, batch: Tensor) -> tuple[Tensor, ...]:
        """batch [B, 3, H, W], normalised and padded -> the maps of the neck (or backbone), finest first."""
        feats = self.backbone(batch.to(self.dtype))
        return feats if self.neck is None else self.neck(feats)

    def _sizes(self, image_sizes, batch: Tensor) -> Tensor:
        sizes = torch.as_tensor(image_sizes, device=batch.device)
        if sizes.shape != (len(batch), 2):
            raise ValueError(f"image_sizes: expected [{len(batch)}, 2] (height, width), got {list(sizes.shape)}")
        return sizes

    @staticmethod
    def _factors(scale_factors, batch: Tensor) -> Tensor | None:
        if scale_factors is None:
            return None
        return torch.as_tensor(scale_factors, dtype=torch.float32, device=batch.device)

    def _checked(self, targets, batch: Tensor) -> list[dict]:
        """Targets with labels counted from 0, on the batch's device."""
        if targets is None or len(targets) != len(batch):
            got = None if targets is None else len(targets)
            raise ValueError(f"targets: expected one for each of the {len(batch)} images, got {got}")
        checked = []
        for i, target in enumerate(targets):
            needed = ("boxes", "labels") if self.reads_labels else ("boxes",)
            missing = [key for key in needed if key not in target]
            if missing:
                raise ValueError(f"targets[{i}]: expected the keys {' and '.join(needed)}, missing {missing}")
            boxes = coordinates(target["boxes"].to(batch.device)).reshape(-1, 4)
            labels = torch.zeros(len(boxes), dtype=torch.int64, device=batch.device)
            if self.reads_labels:
                labels = target["labels"].to(batch.device).long() - self.label_offset
            if len(boxes) != len(labels):
                raise ValueError(f"targets[{i}]: {len(boxes)} boxes but {len(labels)} labels")
            degenerate = ~(boxes[:, 2:] > boxes[:, :2]).all(1)
            if bool(degenerate.any()):
                box = boxes[degenerate][0].tolist()
                raise ValueError(f"targets[{i}]: expected boxes with x2 > x1 and y2 > y1, got {box}")
            if bool(((labels < 0) | (labels >= self.num_classes)).any()):
                low = self.label_offset
                raise ValueError(f"targets[{i}]: expected labels in {low}..{low + self.num_classes - 1}, "
                                 f"got {sorted(set(target['labels'].tolist()))}")  # fmt: skip
            one = dict(boxes=boxes, labels=labels)
            if "ignore_boxes" in target:
                one["ignore_boxes"] = coordinates(target["ignore_boxes"].to(batch.device)).reshape(-1, 4)
            checked.append(one)
        return checked

    def forward(self, images: Sequence[Tensor], targets: list[dict] | None = None):
        """torchvision's convention. images: list of [3, H, W] RGB, float in 0..1 (or uint8), of any sizes.

        Training: targets (boxes in the pixels of these images) -> dict of losses. Evaluation: list of dicts boxes [N, 4]
        xyxy pixels of the original image, labels [N], scores [N].
        """
        batch, sizes, scale_factors = self.data_preprocessor(images, self.dtype)
        if not self.training:
            return self.predict(batch, sizes, scale_factors)
        if targets is None:
            raise ValueError("targets: expected one for each image in training mode, got None")
        scaled = []
        for target, factor in zip(targets, scale_factors):
            target = dict(target)
            for key in ("boxes", "ignore_boxes"):
                if key in target:
                    target[key] = coordinates(target[key].to(batch.device)) * factor.repeat(2)
            scaled.append(target)
        return self.loss(batch, sizes, scaled)
