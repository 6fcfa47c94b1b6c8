"""From images to objects: the Detector and its results."""

from fastrcnn.inference.detections import Detections
from fastrcnn.inference.detector import Detector

__all__ = ["Detections", "Detector"]
