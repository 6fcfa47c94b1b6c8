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
from fastrcnn.models.frame import Frame
from fastrcnn.models.padded import Padded
from fastrcnn.models.preprocess import DataPreprocessor
from fastrcnn.models.profiles import get_profile
from fastrcnn.models.resnet import ResNet, ResNetV1d, ResNeXt
from fastrcnn.models.timm_backbone import TimmBackbone
from fastrcnn.ops._checks import coordinates

BACKBONES = {"ResNet": ResNet, "ResNeXt": ResNeXt, "ResNetV1d": ResNetV1d, "timm": TimmBackbone}


@dataclass(frozen=True)
class Built:
    """What a detector was built with, for a return to its first profile and for a file that says how to build it again."""

    profile: str
    options: PeerOptions
    trains_norms: bool
    arguments: dict  # of the constructor, its type among them; parts that were handed in as modules stand as modules


class BaseDetector(nn.Module):
    """Backbone and neck in front of the heads that a subclass adds. What it finds and how it learns are a subclass's
    `detect(batch, frame, waits=False)` -> (Padded with labels that count from 0 in every profile, which images [B] lack
    detections because there were too many candidates), of static shapes unless the host `waits`; and
    `losses(batch, frame, targets)`, `loss` of targets that `inside` has checked.

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
        self.backbone = build(backbone, BACKBONES, "backbone")
        pixels = {"in_channels": getattr(self.backbone, "in_channels", 3), **(data_preprocessor or {})}
        self.data_preprocessor = DataPreprocessor(self.profile, min_size, max_size, **pixels)
        if isinstance(self.backbone, TimmBackbone) and isinstance(neck, dict):
            neck = dict(neck, in_channels=self.backbone.channels)
        self.neck = None if neck is None else build(neck, {"FPN": FPN}, "neck")
        self.class_names: list[str] | None = None
        self.category_ids: list[int] | None = None  # by label, of the annotations that it was trained on
        self.config: dict | None = None  # MMDetection's whole one, data and schedule, where the model is from one

    def name_classes(self, names: Sequence[str]) -> None:
        """Sets `class_names`. Raises ValueError where there are not as many as classes, background not counted."""
        if len(names) != self.num_classes:
            raise ValueError(
                f"class_names: expected one for each of {self.num_classes} classes (background is none), got {len(names)}"
            )
        self.class_names = list(names)

    def _built(self, dense_head: nn.Module, arguments: dict) -> None:
        """What a subclass says when its parts stand: the head that proposes or detects on every level, and the arguments of
        its constructor (its first locals)."""
        dense_head.pad_size_divisor = self.data_preprocessor.pad_size_divisor
        given = {k: v for k, v in arguments.items() if k not in ("self", "__class__")}
        given = {k: v if isinstance(v, nn.Module) else copy.deepcopy(v) for k, v in given.items()}
        trained = any(p.requires_grad for m in self._norms() for p in m.parameters())
        self.built = Built(self.profile.name, self.peer_options, trained, {"type": type(self).__name__, **given})

    @property
    def zoo_overrides(self) -> dict:
        """The constructor's arguments, as they can be laid over a named model (see `weights.model_metadata`)."""
        return {k: v for k, v in self.built.arguments.items() if k not in ("type", "profile")}

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
        return PeerOptions(*self.data_preprocessor.colours(p), not p.bgr, pad, style, built.options.norm_eps)

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

    def prepare(
        self,
        images: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]] | None = None,
        least: tuple[int, int] = (1, 1),
    ) -> tuple[Tensor, Frame]:
        """(batch [B, C, H, W], its geometry) of images [C, H, W] (3 are RGB), float in 0..1 or uint8, of any sizes; sizes,
        least: as `DataPreprocessor` takes them."""
        batch, sizes, factors = self.data_preprocessor(images, self.dtype, sizes, least)
        return batch, Frame(sizes, tuple(batch.shape[2:]), factors)

    @torch.no_grad()
    def predict_padded(self, batch: Tensor, image_sizes, scale_factors=None) -> Padded:
        """`predict` with static shapes and no host synchronisation: boxes [B, D, 4], scores [B, D], labels [B, D],
        counts [B], zeros beyond an image's counts[b] rows. D is the test_cfg's max_per_img; where that is not above 0, the
        number of candidates. Cannot warn, as `predict` does, where more than post_process.MOST_CANDIDATES class scores of
        an image are above the score threshold and this may have cost a detection. Arguments and errors as in `predict`.
        """
        found, _ = self.detect(batch, Frame.of(batch, image_sizes, scale_factors))
        return found._replace(labels=found.labels + self.label_offset * found.valid())

    @torch.no_grad()
    def predict(self, batch: Tensor, image_sizes, scale_factors=None) -> list[dict[str, Tensor]]:
        """Detections of each image: dict of boxes [N, 4] xyxy pixels, scores [N], labels [N], by descending score.

        batch [B, 3, H, W], normalised and padded; image_sizes [B, 2] (height, width) before padding; scale_factors [B, 2]
        (width, height), new over old: boxes come back in the old image's coordinates; None leaves them as they are.
        Labels are the profile's; a stand-alone RPN's proposals all have label 0. Raises ValueError naming the argument.
        """
        found, lost = self.find(batch, Frame.of(batch, image_sizes, scale_factors))
        return self.outside(found.lists(lost))

    def find(self, batch: Tensor, frame: Frame) -> tuple[Padded, Tensor]:
        """`detect` for a caller who takes what is found to the host: on a CPU it may wait before, too, where that saves."""
        return self.detect(batch, frame, batch.device.type == "cpu" and not torch.compiler.is_compiling())

    def loss(self, batch: Tensor, image_sizes, targets: list[dict]) -> dict[str, Tensor]:
        """The losses under the profile's names (those of an FCOS that proposes under MMDetection's).

        batch [B, 3, H, W], normalised and padded; image_sizes [B, 2] (height, width) before padding; targets: dicts with
        boxes [M, 4] xyxy pixels of the batch, labels [M] (the profile's; a stand-alone RPN needs none), and optionally
        ignore_boxes [R, 4]. Raises TypeError or ValueError naming the target.
        """
        frame = Frame.of(batch, image_sizes)
        return self.losses(batch, frame, self.inside(targets, len(batch), batch.device))

    def outside(self, found: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Detections, or targets, as a caller has them: labels, where there are some, in the profile's numbers. `inside` is
        the way back, for targets; no other place knows the offset."""
        return [{**f, "labels": f["labels"] + self.label_offset} if "labels" in f else f for f in found]

    def inside(self, targets: list[dict], count: int, device: torch.device) -> list[dict]:
        """`count` targets, checked, with labels counted from 0, on `device`. Raises as `loss` does."""
        if targets is None or len(targets) != count:
            got = None if targets is None else len(targets)
            raise ValueError(f"targets: expected one for each of the {count} images, got {got}")
        return [self._inside(f"targets[{i}]", target, device) for i, target in enumerate(targets)]

    def _inside(self, name: str, target: dict, device: torch.device) -> dict:
        needed = ("boxes", "labels") if self.reads_labels else ("boxes",)
        missing = [key for key in needed if key not in target]  # checked where it lies: on the host nothing waits
        if missing:
            raise ValueError(f"{name}: expected the keys {' and '.join(needed)}, missing {missing}")
        checked = {k: _boxes(f"{name}[{k!r}]", target[k]) for k in ("boxes", "ignore_boxes") if k in target}
        boxes = checked["boxes"]
        degenerate = ~(boxes[:, 2:] > boxes[:, :2]).all(1)
        if bool(degenerate.any()):
            raise ValueError(f"{name}: expected boxes with x2 > x1 and y2 > y1, got {boxes[degenerate][0].tolist()}")
        if not self.reads_labels:
            return _moved({**checked, "labels": torch.zeros(len(boxes), dtype=torch.int64)}, device)
        labels = torch.as_tensor(target["labels"])
        if labels.shape != boxes.shape[:1]:
            expected = f"expected shape [{len(boxes)}], got {list(labels.shape)}"
            raise ValueError(f"{name}: {len(boxes)} boxes but {labels.numel()} labels: {expected}")
        if len(labels) and (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool):
            raise TypeError(f"{name}: expected integer labels, got {labels.dtype}")
        low, inner = self.label_offset, labels.long() - self.label_offset
        if bool(((inner < 0) | (inner >= self.num_classes)).any()):
            expected = f"{low}..{low + self.num_classes - 1}"
            raise ValueError(f"{name}: expected labels in {expected}, got {sorted(set(labels.tolist()))}")
        return _moved({**checked, "labels": inner}, device)

    def forward(self, images: Sequence[Tensor], targets: list[dict] | None = None):
        """torchvision's convention. images: list of [3, H, W] RGB, float in 0..1 (or uint8), of any sizes.

        Training: targets (boxes in the pixels of these images) -> dict of losses. Evaluation: list of dicts boxes [N, 4]
        xyxy pixels of the original image, labels [N], scores [N].
        """
        batch, frame = self.prepare(images)
        if not self.training:
            with torch.no_grad():
                found, lost = self.find(batch, frame)
                return self.outside(found.lists(lost))
        return self.losses(
            batch, frame._replace(factors=None), frame.scale(self.inside(targets, len(batch), batch.device))
        )


def _moved(target: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {k: v.to(device, non_blocking=True) for k, v in target.items()}


def _boxes(name: str, value) -> Tensor:
    """[N, 4] in the precision of boxes; a target without objects may have an empty tensor of any shape."""
    boxes = coordinates(torch.as_tensor(value))
    if boxes.numel() and (boxes.dim() != 2 or boxes.shape[1] != 4):
        raise ValueError(f"{name}: expected shape [N, 4], got {list(boxes.shape)}")
    if not bool(boxes.isfinite().all()):
        raise ValueError(f"{name}: expected finite pixels, got {boxes[~boxes.isfinite().all(1)][0].tolist()}")
    return boxes.reshape(-1, 4)


def unwrapped(module):
    """The detector inside what torch.compile, DataParallel and AveragedModel put around it; anything else as it is."""
    inner = module
    while isinstance(inner, nn.Module) and not isinstance(inner, BaseDetector):
        inner = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
    return module if inner is None else inner
