"""Checkpoints of MMDetection, torchvision and Detectron2, read into our models with the peer's own semantics."""

from fastrcnn.weights.load import (
    coco_address,
    infer_model,
    load_checkpoint,
    load_pretrained,
    load_weights,
    pretrained_model,
)
from fastrcnn.weights.named import named_model
from fastrcnn.weights.save import export_weights, model_metadata

__all__ = [
    "coco_address",
    "export_weights",
    "infer_model",
    "load_checkpoint",
    "load_pretrained",
    "load_weights",
    "model_metadata",
    "named_model",
    "pretrained_model",
]
