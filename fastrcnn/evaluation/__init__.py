"""COCO average precision, and the average recall of proposals."""

from fastrcnn.evaluation.coco import evaluate, evaluate_coco
from fastrcnn.evaluation.recall import evaluate_proposals, proposal_recall

__all__ = ["evaluate", "evaluate_coco", "evaluate_proposals", "proposal_recall"]
