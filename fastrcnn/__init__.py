"""Faster R-CNN as MMDetection defines it: plain PyTorch models on their own C++/CUDA kernels.

`fastrcnn.ops` has the kernels, each beside its pure-PyTorch reference; `fastrcnn.models` the networks;
`fastrcnn.load_weights` reads checkpoints of MMDetection, torchvision and Detectron2; `fastrcnn.Detector` finds objects.
"""

import importlib

from fastrcnn import models, ops
from fastrcnn.inference import Detections, Detector
from fastrcnn.weights import load_weights, save

__version__ = "0.1.0"
__all__ = ["Detections", "Detector", "load_weights", "models", "ops", "save"]


def __getattr__(name: str):
    """`fastrcnn.export`, a room that is opened when it is asked for: torch's exporter takes its time to load."""
    if name == "export":
        return importlib.import_module("fastrcnn.export")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
