"""What a detector is worth: COCO's and VOC's average precision, recall of proposals, where it fails, reports."""

from fastrcnn.evaluation.classes import match_classes
from fastrcnn.evaluation.coco import evaluate_coco
from fastrcnn.evaluation.measure import evaluate, measure
from fastrcnn.evaluation.predict import Predictions, as_detector, predict
from fastrcnn.evaluation.recall import evaluate_proposals, proposal_recall
from fastrcnn.evaluation.report import training_report
from fastrcnn.evaluation.results import write_evaluation, write_numbers
from fastrcnn.evaluation.voc import voc_ap

__all__ = [
    "Predictions",
    "as_detector",
    "evaluate",
    "evaluate_coco",
    "evaluate_proposals",
    "match_classes",
    "measure",
    "predict",
    "proposal_recall",
    "training_report",
    "voc_ap",
    "write_evaluation",
    "write_numbers",
]
