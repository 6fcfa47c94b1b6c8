"""What heads with anchors on every level of a pyramid share (MMDetection's AnchorHead): RPN and RetinaNet build on it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastrcnn.models.anchors import AnchorGenerator, build_anchor_generator
from fastrcnn.models.box_coder import DeltaXYWHBBoxCoder, build_box_coder
from fastrcnn.models.frame import Frame
from fastrcnn.models.losses import build_loss
from fastrcnn.models.matching import assign, check_assigner
from fastrcnn.models.profiles import Profile, get_profile


def flat_levels(maps: Sequence[Tensor], columns: int) -> Tensor:
    """Maps [B, A * columns, H, W] of all levels as [B, sum of H * W * A, columns], in the order of the anchors."""
    return torch.cat([x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, columns) for x in maps], 1)


def init_normal(module: nn.Module) -> None:
    """Every convolution as MMDetection starts those of dense heads: weights of deviation 0.01, biases of 0."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.normal_(m.weight, std=0.01)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


class DenseHead(nn.Module):
    """Anchors, box coder, losses and assignment. A subclass adds the layers, `forward`, `predict` and `loss`."""

    pad_size_divisor = 32  # of the images, as the detector pads them

    def __init__(
        self,
        anchor_generator: dict | AnchorGenerator,
        bbox_coder: dict | DeltaXYWHBBoxCoder,
        loss_cls: dict | nn.Module,
        loss_bbox: dict | nn.Module,
        reg_decoded_bbox: bool,
        train_cfg: dict,
        test_cfg: dict,
        profile: str | Profile,
    ):
        super().__init__()
        self.anchor_generator = build_anchor_generator(anchor_generator)
        self.bbox_coder = build_box_coder(bbox_coder)
        self.loss_cls, self.loss_bbox = build_loss(loss_cls), build_loss(loss_bbox)
        self.reg_decoded_bbox = reg_decoded_bbox
        self.train_cfg = {**train_cfg, "assigner": check_assigner(train_cfg["assigner"])}
        self.test_cfg = test_cfg
        self.num_anchors = self.anchor_generator.num_base_anchors
        self.set_profile(profile)

    def set_profile(self, profile: str | Profile) -> None:
        self.profile = get_profile(profile) if isinstance(profile, str) else profile
        self.bbox_coder.symmetric_clip = self.profile.symmetric_clip
        self._base_by_device: dict[torch.device, list[Tensor]] = {}

    def base_anchors(self, device: torch.device) -> list[Tensor]:
        """Base anchors [A, 4] a level, in float32 whatever the weights are, copied to each device once."""
        base = self._base_by_device.get(device)
        if base is None:
            base = [b.to(device) for b in self.anchor_generator.base_anchors(self.profile.round_anchors)]
            if not torch.compiler.is_compiling():  # what a compiler sees are no tensors to keep
                self._base_by_device[device] = base
        return base

    def grid_shape(self, frame: Frame) -> Sequence[int] | None:
        return frame.padded if self.profile.strides_from_grid else None

    def anchors(self, maps: Sequence[Tensor], frame: Frame) -> list[Tensor]:
        """All anchors [H * W * A, 4] of each level, for the head's output maps; float64 beside float64, else float32."""
        device, dtype = maps[0].device, torch.promote_types(torch.float32, maps[0].dtype)
        return self.anchor_generator.grid(
            [x.shape[2:] for x in maps],
            batch_shape=self.grid_shape(frame),
            device=device,
            bases=[base.to(dtype) for base in self.base_anchors(device)],
        )

    @torch.no_grad()
    def assigned(self, maps: Sequence[Tensor], frame: Frame, targets: list[dict]) -> tuple[Tensor, Tensor, Tensor]:
        """(anchors [N, 4], ground-truth index of each [B, N], or -1 background or -2 ignored, best IoU [B, N])."""
        anchors = candidates = torch.cat(self.anchors(maps, frame))
        inside = None
        if self.profile.anchors_inside:
            sizes, border = [x.shape[2:] for x in maps], self.train_cfg["allowed_border"]
            inside = self.anchor_generator.inside(sizes, frame.sizes, border, self.pad_size_divisor, anchors.device)
            candidates = torch.where(inside[..., None], anchors, -1e6)
        matches, max_iou = assign(candidates, targets, self.train_cfg["assigner"], self.profile)
        return anchors, matches if inside is None else torch.where(inside, matches, -2), max_iou
