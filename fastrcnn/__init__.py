"""Faster R-CNN as MMDetection defines it: plain PyTorch models on their own C++/CUDA kernels.

`fastrcnn.ops` has the kernels, each beside its pure-PyTorch reference; `fastrcnn.models` the networks;
`fastrcnn.load_weights` reads checkpoints of MMDetection, torchvision and Detectron2; `fastrcnn.Detector` finds objects.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastrcnn import models as models
    from fastrcnn import ops as ops
    from fastrcnn.inference import Detections as Detections
    from fastrcnn.inference import Detector as Detector
    from fastrcnn.weights.load import load_weights as load_weights
    from fastrcnn.weights.save import save as save

__version__ = "0.1.0"
__all__ = ["Detections", "Detector", "load_weights", "models", "ops", "save"]

_ROOM = dict(Detections="inference", Detector="inference", load_weights="weights", save="weights")


def __getattr__(name: str) -> Any:
    """A room, or a name of one, opened when it is asked for: torch takes seconds to load, and `fastrcnn --help` needs
    none of it."""
    if name in _ROOM:
        return getattr(importlib.import_module(f"fastrcnn.{_ROOM[name]}"), name)
    if not name.startswith("__"):
        try:
            return importlib.import_module(f"fastrcnn.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"fastrcnn.{name}":
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
