"""COCO average precision."""

from fastrcnn.evaluation.coco import evaluate, evaluate_coco

__all__ = ["evaluate", "evaluate_coco"]
