"""Box heads: RoI features to class logits and box deltas, and their losses (MMDetection's ConvFCBBoxHead and its kin)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastrcnn.layers import ConvModule
from fastrcnn.models.box_coder import build_box_coder
from fastrcnn.models.losses import avg_factor, box_loss, build_loss, positive_weight


class ConvFCBBoxHead(nn.Module):
    """Shared convolutions and fully connected layers, then optional own ones for classes and for boxes.

    num_classes counts foreground; the background is the last class. Keys: shared_convs.{i}.conv, shared_fcs.{i}, cls_*,
    reg_*, fc_cls, fc_reg. Source: MMDetection's ConvFCBBoxHead.
    """

    def __init__(
        self,
        num_shared_convs: int = 0,
        num_shared_fcs: int = 0,
        num_cls_convs: int = 0,
        num_cls_fcs: int = 0,
        num_reg_convs: int = 0,
        num_reg_fcs: int = 0,
        conv_out_channels: int = 256,
        fc_out_channels: int = 1024,
        conv_cfg: dict | None = None,
        norm_cfg: dict | None = None,
        in_channels: int = 256,
        roi_feat_size: int | tuple[int, int] = 7,
        num_classes: int = 80,
        with_avg_pool: bool = False,
        reg_class_agnostic: bool = False,
        reg_decoded_bbox: bool = False,
        bbox_coder: dict = dict(
            type="DeltaXYWHBBoxCoder", target_means=(0.0, 0.0, 0.0, 0.0), target_stds=(0.1, 0.1, 0.2, 0.2)
        ),
        loss_cls: dict = dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
        loss_bbox: dict = dict(type="SmoothL1Loss", beta=1.0, loss_weight=1.0),
    ):
        super().__init__()
        self.num_classes, self.reg_class_agnostic = num_classes, reg_class_agnostic
        self.with_avg_pool, self.reg_decoded_bbox = with_avg_pool, reg_decoded_bbox
        self.bbox_coder = build_box_coder(bbox_coder)
        self.loss_cls, self.loss_bbox = build_loss(loss_cls), build_loss(loss_bbox)
        height, width = roi_feat_size if isinstance(roi_feat_size, Sequence) else (roi_feat_size, roi_feat_size)
        area = 1 if with_avg_pool else height * width
        convs = dict(conv_cfg=conv_cfg, norm_cfg=norm_cfg)

        def branch(num_convs, num_fcs, channels, is_map):
            """(convs, fcs, width out, whether the output is still a map)."""
            widths = [channels] + [conv_out_channels] * num_convs
            conv_list = nn.ModuleList(ConvModule(a, b, 3, padding=1, **convs) for a, b in zip(widths, widths[1:]))
            width = widths[-1] * (area if is_map and num_fcs else 1)
            fc_widths = [width] + [fc_out_channels] * num_fcs
            fcs = nn.ModuleList(nn.Linear(a, b) for a, b in zip(fc_widths, fc_widths[1:]))
            return conv_list, fcs, fc_widths[-1], is_map and not num_fcs

        self.shared_convs, self.shared_fcs, width, is_map = branch(num_shared_convs, num_shared_fcs, in_channels, True)
        if not is_map and (num_cls_convs or num_reg_convs):
            raise ValueError("num_cls_convs, num_reg_convs: expected 0 after shared fully connected layers")
        self.cls_convs, self.cls_fcs, cls_width, cls_map = branch(num_cls_convs, num_cls_fcs, width, is_map)
        self.reg_convs, self.reg_fcs, reg_width, reg_map = branch(num_reg_convs, num_reg_fcs, width, is_map)
        self.fc_cls = nn.Linear(cls_width * (area if cls_map else 1), num_classes + 1)
        self.fc_reg = nn.Linear(reg_width * (area if reg_map else 1), 4 * (1 if reg_class_agnostic else num_classes))
        self.init_weights()

    def init_weights(self) -> None:
        for name, m in self.named_modules():
            if isinstance(m, nn.Linear) and name not in ("fc_cls", "fc_reg"):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
            elif isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
        for layer, std in ((self.fc_cls, 0.01), (self.fc_reg, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def _flat(self, x: Tensor) -> Tensor:
        """A map [K, C, h, w] as a vector a RoI: averaged with with_avg_pool, else row by row."""
        return x.mean((2, 3)) if self.with_avg_pool and x.dim() == 4 else x.flatten(1)

    def _run(self, x: Tensor, convs: nn.ModuleList, fcs: nn.ModuleList) -> Tensor:
        for conv in convs:
            x = conv(x)
        for fc in fcs:
            x = torch.relu(fc(self._flat(x)))
        return x

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """RoI features [K, C, 7, 7] -> class logits [K, num_classes + 1], deltas [K, 4 * num_classes] (or [K, 4])."""
        x = self._run(x, self.shared_convs, self.shared_fcs)
        cls, reg = self._run(x, self.cls_convs, self.cls_fcs), self._run(x, self.reg_convs, self.reg_fcs)
        return self.fc_cls(self._flat(cls)), self.fc_reg(self._flat(reg))

    def loss(
        self, logits: Tensor, deltas: Tensor, rois: Tensor, labels: Tensor, gt_boxes: Tensor, pos_weight: float = -1
    ):
        """(class loss, box loss). rois [K, 5], of which those with a negative image index are padding; labels [K] with
        num_classes for background, gt_boxes [K, 4] (background rows are not read); pos_weight: of the positives in the
        class loss, where it is above 0."""
        sampled, positive = rois[:, 0] >= 0, labels < self.num_classes
        count = avg_factor(sampled.sum(), 1, self.training)
        loss_cls = self.loss_cls(logits, labels, count, positive_weight(positive, pos_weight) * sampled)
        column = torch.zeros_like(labels) if self.reg_class_agnostic else labels.clamp(max=self.num_classes - 1)
        moves = deltas.view(len(deltas), -1, 4).gather(1, column[:, None, None].expand(-1, 1, 4))[:, 0]
        return loss_cls, box_loss(self, moves, rois[:, 1:], gt_boxes, count, positive & sampled)


class BBoxHead(ConvFCBBoxHead):
    """No layers of its own: classes and boxes straight from the (averaged) RoI features, as behind a shared head."""


class Shared2FCBBoxHead(ConvFCBBoxHead):
    """Two shared fully connected layers."""

    def __init__(self, fc_out_channels: int = 1024, **kwargs):
        super().__init__(num_shared_fcs=2, fc_out_channels=fc_out_channels, **kwargs)


class Shared4Conv1FCBBoxHead(ConvFCBBoxHead):
    """Four shared convolutions and one shared fully connected layer."""

    def __init__(self, fc_out_channels: int = 1024, **kwargs):
        super().__init__(num_shared_convs=4, num_shared_fcs=1, fc_out_channels=fc_out_channels, **kwargs)


BBOX_HEADS = {c.__name__: c for c in (BBoxHead, ConvFCBBoxHead, Shared2FCBBoxHead, Shared4Conv1FCBBoxHead)}
