"""COCO average precision, and the average recall of proposals."""

from fastrcnn.evaluation.classes import match_classes
from fastrcnn.evaluation.coco import evaluate, evaluate_coco
from fastrcnn.evaluation.predict import as_detector
from fastrcnn.evaluation.recall import evaluate_proposals, proposal_recall
from fastrcnn.evaluation.report import training_report

__all__ = [
    "as_detector",
    "evaluate",
    "evaluate_coco",
    "evaluate_proposals",
    "match_classes",
    "proposal_recall",
    "training_report",
]
