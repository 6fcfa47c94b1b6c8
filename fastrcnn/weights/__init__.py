"""Checkpoints of MMDetection, torchvision and Detectron2, read into our models with the peer's own semantics."""

from fastrcnn.weights.load import infer_model, load_checkpoint, load_weights

__all__ = ["infer_model", "load_checkpoint", "load_weights"]
