"""Checkpoints of MMDetection, torchvision and Detectron2, read into our models with the peer's own semantics."""

from fastrcnn.weights.load import (
    coco_address,
    export_weights,
    infer_model,
    load_checkpoint,
    load_weights,
    model_metadata,
    pretrained_model,
)
from fastrcnn.weights.pretrained import load_pretrained

__all__ = [
    "coco_address",
    "export_weights",
    "infer_model",
    "load_checkpoint",
    "load_pretrained",
    "load_weights",
    "model_metadata",
    "pretrained_model",
]
