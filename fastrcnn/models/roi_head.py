"""The second stage: RoI features, the box head's word on them, detections and losses (MMDetection's StandardRoIHead)."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fastrcnn.models.bbox_head import BBOX_HEADS
from fastrcnn.models.build import build, settings
from fastrcnn.models.frame import Frame
from fastrcnn.models.losses import build_loss
from fastrcnn.models.matching import assign, check_assigner
from fastrcnn.models.padded import Padded, first_rows
from fastrcnn.models.post_process import MOST_CANDIDATES, check_nms, finish, lost
from fastrcnn.models.profiles import Profile, get_profile
from fastrcnn.models.res_layer import ResLayer
from fastrcnn.models.roi_extractors import ROI_EXTRACTORS
from fastrcnn.models.sampling import build_sampler, sample_images
from fastrcnn.ops import select_candidates
from fastrcnn.ops._boxes import take_boxes
from fastrcnn.ops._checks import coordinates

TEST_CFG = dict(score_thr=0.05, nms=dict(type="nms", iou_threshold=0.5), max_per_img=100)
TRAIN_CFG = dict(
    assigner=dict(
        type="MaxIoUAssigner", pos_iou_thr=0.5, neg_iou_thr=0.5, min_pos_iou=0.5, match_low_quality=False,
        ignore_iof_thr=-1,
    ),
    sampler=dict(type="RandomSampler", num=512, pos_fraction=0.25, neg_pos_ub=-1, add_gt_as_proposals=True),
    pos_weight=-1,
)  # fmt: skip


def padded_rois(boxes: Tensor, counts: Tensor) -> Tensor:
    """boxes [B, P, 4] -> RoIs [B P, 5]; what is beyond an image's first counts[b] is no image's, index -1: not pooled."""
    image = torch.arange(boxes.shape[0], device=boxes.device, dtype=boxes.dtype)[:, None]
    return torch.cat([torch.where(first_rows(boxes, counts), image, -1.0)[..., None], boxes], -1).flatten(0, 1)


def class_scores(logits: Tensor) -> Tensor:
    """logits [..., classes + 1] -> [..., classes]: the background is last."""
    return F.softmax(coordinates(logits), -1)[..., :-1]


class StandardRoIHead(nn.Module):
    """RoI extractor, optional shared head, box head; `predict` gives detections, `loss` the two losses."""

    def __init__(
        self,
        bbox_roi_extractor: dict | nn.Module,
        bbox_head: dict | nn.Module,
        shared_head: dict | nn.Module | None = None,
        train_cfg: dict | None = None,
        test_cfg: dict | None = None,
        profile: str | Profile = "mmdet",
    ):
        super().__init__()
        self.bbox_roi_extractor = build(bbox_roi_extractor, ROI_EXTRACTORS, "bbox_roi_extractor")
        self.bbox_head = build(bbox_head, BBOX_HEADS, "bbox_head")
        self.shared_head = None if shared_head is None else build(shared_head, {"ResLayer": ResLayer}, "shared_head")
        self.train_cfg = settings(TRAIN_CFG, train_cfg, "roi_head train_cfg")
        self.test_cfg = settings(TEST_CFG, test_cfg, "roi_head test_cfg")
        check_nms(self.test_cfg["nms"], "roi_head test_cfg nms")
        self.train_cfg["assigner"] = check_assigner(self.train_cfg["assigner"])
        self.sampler = build_sampler(self.train_cfg["sampler"])
        self.set_profile(profile)

    def init_weights(self, state: Mapping[str, Tensor] | None = None) -> None:
        """Fresh weights for every part; `state` is the shared head's (see `ResNet.init_weights`)."""
        for m in self.children():
            if hasattr(m, "init_weights"):
                m.init_weights(*[state] if m is self.shared_head else [])

    def set_profile(self, profile: str | Profile) -> None:
        self.profile = get_profile(profile) if isinstance(profile, str) else profile
        self.bbox_roi_extractor.profile = self.profile
        self.bbox_head.bbox_coder.symmetric_clip = self.profile.symmetric_clip

    def take_defaults(self, profile: Profile) -> None:
        """`set_profile`, and the peer's defaults of what MMDetection makes an argument: RoIAlign's and the box loss."""
        self.set_profile(profile)
        self.bbox_roi_extractor.take_defaults(profile)
        self.bbox_head.loss_bbox = build_loss(profile.roi_loss_bbox)

    def forward(self, feats: Sequence[Tensor], rois: Tensor) -> tuple[Tensor, Tensor]:
        """rois [K, 5] = (image index, xyxy pixels) -> class logits, deltas."""
        x = self.bbox_roi_extractor(feats, rois)
        return self.bbox_head(x if self.shared_head is None else self.shared_head(x))

    def predict(
        self, feats: Sequence[Tensor], proposals: Tensor, counts: Tensor, frame: Frame
    ) -> tuple[Padded, Tensor]:
        """Detections (see `BaseDetector`), labels from 0. proposals [B, P, 4] xyxy pixels of the batch, of which counts[b]
        rows are valid."""
        batch, most, _ = proposals.shape
        logits, deltas = self(feats, padded_rois(proposals, counts))
        # Candidates first, decoding after: most class scores are far below the threshold.
        row, column, found, number = self.candidates(class_scores(logits).unflatten(0, (batch, most)), counts)
        moves = deltas.reshape(batch, -1, 4)
        moves = take_boxes(moves, row * (moves.shape[1] // most) + column)
        boxes = self.bbox_head.bbox_coder.decode(take_boxes(proposals, row), moves, frame.sizes.float())
        return self.finish(found._replace(boxes=boxes), number, frame)

    def candidates(self, scores: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Padded, Tensor]:
        """The best of scores [B, P, classes] above the threshold, of the first counts[b] of P: (row [B, K], column of its
        box [B, K], scores and labels, how many there were of each image [B])."""
        classes, least = scores.shape[2], self.test_cfg["score_thr"]
        flat = torch.where(first_rows(scores, counts)[..., None], scores, -1.0).flatten(1)
        most = torch.sym_min(flat.shape[1], MOST_CANDIDATES)
        best, index, counts, number = select_candidates(flat, least, most)
        index = index.clamp(min=0)
        label = index % classes
        column = torch.zeros_like(label) if self.bbox_head.reg_class_agnostic else label
        return index // classes, column, Padded(None, best, label, counts), number

    def finish(self, found: Padded, number: Tensor, frame: Frame) -> tuple[Padded, Tensor]:
        """Detections from candidates (see `post_process.finish`), and whether there were too many of them."""
        p, most, last = self.profile, found.scores.shape[1], found.scores[:, -1]
        if p.min_box_size is not None:
            found = found.only((found.boxes[..., 2:] - found.boxes[..., :2] >= p.min_box_size).all(-1))
        detections = finish(found, frame, self.test_cfg, p)
        left_out = torch.where(number > most, last, 0.0)
        return detections, lost(detections, left_out, self.test_cfg)

    def loss(
        self, feats: Sequence[Tensor], proposals: Tensor, counts: Tensor, targets: list[dict]
    ) -> tuple[Tensor, Tensor]:
        """(class loss, box loss). targets: dicts with boxes [M, 4] and labels [M] counted from 0."""
        rois, labels, gt_boxes = self._targets(feats, proposals, counts, targets)
        return self.bbox_head.loss(*self(feats, rois), rois, labels, gt_boxes, self.train_cfg["pos_weight"])

    def _assigned(
        self, proposals: Tensor, counts: Tensor, gts: Tensor, targets: list[dict]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(boxes [B, N, 4] to sample from, ground-truth index of each [B, N], or -1 background or -2 ignored, best IoU
        [B, N]). The boxes are the proposals and, with add_gt_as_proposals, gts [B, M, 4]; padding is ignored."""
        valid = first_rows(proposals, counts)
        boxes = torch.where(valid[..., None], proposals, 0.0)
        own = pad_sequence([torch.arange(len(t["boxes"]), device=gts.device) for t in targets], True, -2)  # [B, M]
        add_gt = self.sampler.add_gt_as_proposals
        if add_gt and not self.profile.gt_first:
            boxes, valid = torch.cat([boxes, gts], 1), torch.cat([valid, own >= 0], 1)
        matches, max_iou = assign(boxes, targets, self.train_cfg["assigner"], self.profile)
        matches = torch.where(valid, matches, -2)
        if add_gt and self.profile.gt_first:
            boxes, matches = torch.cat([gts, boxes], 1), torch.cat([own, matches], 1)
            max_iou = torch.cat([(own >= 0).to(max_iou), max_iou], 1)
        return boxes, matches, max_iou

    @torch.no_grad()
    def _targets(
        self, feats: Sequence[Tensor], proposals: Tensor, counts: Tensor, targets: list[dict]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sampled RoIs [K, 5], their labels [K] and matched ground truth [K, 4], image by image, positives first. An image
        with fewer than the sampler's number is filled up with rows of image index -1, which take no part."""
        background = self.bbox_head.num_classes
        gts = pad_sequence([t["boxes"] for t in targets], True)  # [B, M, 4]
        labels = pad_sequence([t["labels"] for t in targets], True, background)
        boxes, matches, max_iou = self._assigned(proposals, counts, gts, targets)
        # What index -1 reads: background has its label and a box of zeros.
        gts, labels = F.pad(gts, (0, 0, 0, 1)), F.pad(labels, (0, 1), value=background)

        def rois_of(image: int, indices: Tensor) -> Tensor:
            picked = boxes[image, indices]
            return torch.cat([picked.new_full((len(picked), 1), image), picked], 1)

        def loss_of(image: int, indices: Tensor) -> Tensor:
            logits, _ = self(feats, rois_of(image, indices))
            losses = self.bbox_head.loss_cls.elements(logits, labels[image, matches[image, indices]])
            return losses.reshape(len(indices), -1).sum(1)

        front = gts.shape[1] - 1 if boxes.shape[1] > proposals.shape[1] and self.profile.gt_first else 0
        indices, _ = sample_images(matches, self.sampler, max_iou, loss_of, front)
        used, picked = indices >= 0, indices.clamp(min=0)
        image = torch.arange(len(picked), device=picked.device)[:, None].expand_as(picked)
        owner = torch.where(used, matches.gather(1, picked), -1) % gts.shape[1]
        rois = torch.cat([torch.where(used, image, -1)[..., None].to(boxes), take_boxes(boxes, picked)], -1)
        found = rois.flatten(0, 1), labels.gather(1, owner).flatten(), take_boxes(gts, owner).flatten(0, 1)
        if any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in self.modules()):
            found = tuple(x[used.flatten()] for x in found)  # padding would be part of the batch's statistics
        return found
