"""Detection that keeps of each object its RoI features and the scores of all classes."""

from typing import Any

import torch
from torch import Tensor

from fastrcnn.models.faster_rcnn import FasterRCNN
from fastrcnn.models.frame import Frame
from fastrcnn.models.padded import Padded
from fastrcnn.models.roi_head import class_scores, padded_rois
from fastrcnn.ops._boxes import take_boxes

FAR = 1e6  # pixels: more than any box is away from another


def find_with_features(
    model: FasterRCNN, batch: Tensor, frame: Frame
) -> tuple[Padded, Tensor, list[Tensor], list[Tensor]]:
    """`model.find`, and of each image the scores of all classes [n, classes] and the box head's features [n, D] of its
    detections: those of the proposal that a detection was made from, as they enter the classification layer."""
    head: Any = model.roi_head
    rpn: Any = model.rpn_head
    seen: list[Tensor] = []
    feats = model.extract_feat(batch)
    proposals, _, counts = rpn.predict(*rpn(feats), frame._replace(factors=None), rpn.test_cfg)
    size = proposals.shape[:2]
    hook = head.bbox_head.fc_cls.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    try:
        logits, deltas = head(feats, padded_rois(proposals, counts))
    finally:
        hook.remove()
    scores = class_scores(logits).reshape(*size, -1)
    row, column, candidates, number = head.candidates(scores, counts)
    moves = deltas.reshape(size[0], -1, 4)
    moves = take_boxes(moves, row * (moves.shape[1] // size[1]) + column)
    boxes = head.bbox_head.bbox_coder.decode(take_boxes(proposals, row), moves, frame.sizes.float())
    candidates = candidates._replace(boxes=boxes)
    found, lost = head.finish(candidates, number, frame)
    origin = row.gather(1, _origins(found, candidates, frame.factors))
    counted = list(zip(origin, found.counts.tolist()))
    vectors = seen[0].reshape(*size, -1)
    all_scores, features = ([x[b, own[:n]].float() for b, (own, n) in enumerate(counted)] for x in (scores, vectors))
    return found, lost, all_scores, features


def _origins(found: Padded, candidates: Padded, factors: Tensor | None) -> Tensor:
    """[B, D]: the candidate that each detection is. NMS says which rows it keeps to nobody, so it is told by class, score
    and place; soft-NMS changes scores, there class and place have to do."""
    boxes = found.boxes if factors is None else found.boxes * factors.repeat(1, 2)[:, None]
    apart = (boxes[:, :, None] - candidates.boxes[:, None]).abs().amax(-1)
    same = (found.labels[:, :, None] == candidates.labels[:, None]) & candidates.valid()[:, None]
    equal = same & (found.scores[:, :, None] == candidates.scores[:, None])
    return torch.where(same, apart + FAR * ~equal, torch.inf).argmin(-1)
