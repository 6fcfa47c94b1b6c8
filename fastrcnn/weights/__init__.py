"""Checkpoints of MMDetection, torchvision and Detectron2, read into our models with the peer's own semantics."""

import fastrcnn.models  # noqa: F401  first: its face hands on builders from here
from fastrcnn.checkpoints.checkpoint import Checkpoint, load_checkpoint
from fastrcnn.weights.load import coco_address, infer_model, load_pretrained, load_weights, pretrained_model
from fastrcnn.weights.named import named_model
from fastrcnn.weights.save import described, export_weights, model_metadata, save, writable
from fastrcnn.weights.start import is_config, model_to_train

__all__ = [
    "Checkpoint",
    "coco_address",
    "described",
    "export_weights",
    "infer_model",
    "is_config",
    "load_checkpoint",
    "load_pretrained",
    "load_weights",
    "model_metadata",
    "model_to_train",
    "named_model",
    "pretrained_model",
    "save",
    "writable",
]
