"""Detections, or candidates for them, of a batch with static shapes."""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastrcnn.ops import select_candidates
from fastrcnn.ops._boxes import take_boxes


def first_rows(padded: Tensor, counts: Tensor) -> Tensor:
    """[B, N] bool: the first counts[b] rows of padded [B, N, ...]."""
    return torch.arange(padded.shape[1], device=counts.device) < counts[:, None]


class Padded(NamedTuple):
    """boxes [B, N, 4] xyxy pixels, scores [B, N], labels [B, N] int64, counts [B] int64: an image's first counts[b] rows
    are valid. Of what a detector gives, the rows beyond are zeros and the others come by descending score."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    counts: Tensor

    @classmethod
    def cat(cls, parts: Sequence["Padded"]) -> "Padded":
        """The valid rows of all parts, by descending score; equal scores in the order of the parts."""
        valid = torch.cat([part.valid() for part in parts], 1)
        boxes, scores, labels = (torch.cat(column, 1) for column in list(zip(*parts))[:3])
        return cls(boxes, scores, labels, torch.full_like(parts[0].counts, scores.shape[1])).only(valid)

    def valid(self) -> Tensor:
        """[B, N] bool: the rows that are."""
        return first_rows(self.scores, self.counts)

    def take(self, index: Tensor, scores: Tensor, counts: Tensor) -> "Padded":
        """The rows index [B, K], zeros where it is -1, with new scores [B, K] and counts."""
        row, beyond = index.clamp(min=0), index < 0
        boxes = take_boxes(self.boxes, row).masked_fill(beyond[..., None], 0)
        return Padded(boxes, scores.masked_fill(beyond, 0), self.labels.gather(1, row).masked_fill(beyond, 0), counts)

    def only(self, keep: Tensor) -> "Padded":
        """The valid rows where keep [B, N] holds, by descending score, equal ones in their order."""
        least = torch.finfo(self.scores.dtype).min  # below every score, which may be a logit
        scores = torch.where(keep & self.valid(), self.scores, least)
        scores, index, counts, _ = select_candidates(scores, least, scores.shape[1])
        return self.take(index, scores, counts)

    def lists(self, lost: Tensor) -> list[dict[str, Tensor]]:
        """boxes [n, 4], labels [n] and scores [n] of each image: here the host waits, once. Warns of the images that have
        `lost` [B] detections to MOST_CANDIDATES; a compiled program cannot."""
        columns = zip(self.boxes, self.labels, self.scores, self._numbers(lost))
        return [dict(boxes=b[:n], labels=k[:n], scores=s[:n]) for b, k, s, n in columns]

    def _numbers(self, lost: Tensor) -> list[int]:
        if torch.compiler.is_dynamo_compiling():
            with torch._dynamo.patch_dynamo_config(capture_scalar_outputs=True):
                return self._bounded(self.counts.tolist())
        if torch.compiler.is_compiling():
            return self._bounded(self.counts.tolist())
        counts, missing = torch.stack([self.counts, lost.long()]).tolist()
        if any(missing):
            images = [i for i, is_missing in enumerate(missing) if is_missing]
            warnings.warn(f"images {images} of the batch: too many class scores are above the score threshold, so that "
                          "detections may be missing; raise score_thr", stacklevel=2)  # fmt: skip
        return counts

    def _bounded(self, counts: list[int]) -> list[int]:
        for n in counts:
            torch._check(n >= 0)
            torch._check(n <= self.scores.shape[1])
        return counts
