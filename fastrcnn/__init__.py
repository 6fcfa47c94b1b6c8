"""Faster R-CNN as MMDetection defines it: plain PyTorch models on their own C++/CUDA kernels.

`fastrcnn.ops` has the kernels, each beside its pure-PyTorch reference; `fastrcnn.models` the networks;
`fastrcnn.load_weights` reads checkpoints of MMDetection, torchvision and Detectron2; `fastrcnn.Detector` finds objects.
"""

from fastrcnn import models, ops
from fastrcnn.inference import Detections, Detector
from fastrcnn.weights import load_weights, save

__version__ = "0.1.0"
__all__ = ["Detections", "Detector", "load_weights", "models", "ops", "save"]
