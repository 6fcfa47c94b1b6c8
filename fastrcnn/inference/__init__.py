"""From images to objects: the Detector and its results."""

import fastrcnn.models  # noqa: F401  first: its face hands on builders from here
from fastrcnn.inference.detections import Detections
from fastrcnn.inference.detector import Detector

__all__ = ["Detections", "Detector"]
