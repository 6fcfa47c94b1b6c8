"""Detectors as files that run without this package: an AOTInductor package, ONNX, OpenVINO, a folder for Triton."""

import tempfile
from pathlib import Path

import torch

from fastrcnn.export import onnx, openvino, pt2, triton
from fastrcnn.export.compare import Difference, score_threshold
from fastrcnn.inference import Detector
from fastrcnn.models.base_detector import BaseDetector, unwrapped

__all__ = ["TARGETS", "Difference", "export"]

TARGETS = dict(pt2=pt2, onnx=onnx, openvino=openvino, triton=triton)


def _detector(model_or_detector) -> Detector:
    """In float32 on the CPU, with the score threshold that the model or detector has."""
    model = getattr(model_or_detector, "model", None) if isinstance(model_or_detector, Detector) else model_or_detector
    model = unwrapped(model)
    options = dict(device="cpu", precision="fp32")
    if isinstance(model, BaseDetector):
        options["score_threshold"] = score_threshold(model)
    return Detector(model, **options)


def export(
    model_or_detector, path, to: str = "onnx", precision: str = "fp32", raw: bool = False, dynamic: bool = True
) -> Difference:
    """Writes a detector as a file of another program, and runs that in pictures of three sizes, in batches of one and two,
    against the model before it is left at `path`. Returns how far they were apart.

    model_or_detector: a FasterRCNN, RetinaNet or RPN, a Detector, or what a Detector is made from (a checkpoint, a name).
    path: ends in .onnx, .pt2 or .xml (OpenVINO); for Triton a folder, the model's own in a repository. to: "onnx",
    "pt2", "openvino" or "triton". precision: "fp32", or the target's others, "fp16" or "bf16".
    raw: the input is a batch that is resized, normalised and padded already: batch [B, 3, H, W], image_sizes [B, 2] int64
    (height, width) before padding and scale_factors [B, 2] float32 (width, height), new over old; otherwise images, uint8
    [B, 3, H, W] RGB of any size. dynamic: any number and size of images; otherwise one, as large as the model takes it.
    The outputs are boxes [B, D, 4] xyxy pixels of the images, scores [B, D], labels [B, D] int64 from 0 and counts [B]
    int64; rows beyond an image's count are zeros.

    Raises ValueError for what the target cannot say, before anything is compiled, and where the file finds other objects
    than the model, which is then not left there; RuntimeError where torch or the target fails on the model; TypeError or
    OSError for a wrong model or path, ImportError naming the extra to install. Warns where there was nothing to compare.
    """
    if to not in TARGETS:
        raise ValueError(f"to: expected one of {', '.join(TARGETS)}, got {to!r}")
    target, path = TARGETS[to], Path(path).expanduser()
    endings = [other.SUFFIX for other in TARGETS.values() if other.SUFFIX]
    if path.suffix.lower() != target.SUFFIX if target.SUFFIX else path.suffix.lower() in endings:
        expected = f"a name that ends in {target.SUFFIX}" if target.SUFFIX else "a folder's name, not a file's"
        raise ValueError(f"path: expected {expected}, got {path}")
    if target.SUFFIX and path.exists() and not path.is_file():
        raise OSError(f"{path}: is no file")
    if precision not in target.PRECISIONS:
        raise ValueError(f"precision: {to} has {', '.join(target.PRECISIONS)}, got {precision!r}")
    target.require()
    detector = _detector(model_or_detector)
    if detector.channels != 3:
        raise ValueError(
            f"model_or_detector: programs read RGB, expected a model of 3 channels, got {detector.channels}"
        )
    target.refuse(detector.model)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-")
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror})") from None
    with folder, torch.no_grad():
        try:
            return target.write(detector, path, Path(folder.name), precision, raw, dynamic)
        except (ValueError, OSError):
            raise
        except Exception as error:  # torch's and the targets' own, of many kinds and pages
            reason = next(iter(str(error).splitlines()), "")
            raise RuntimeError(f"the model has no form as {to} ({type(error).__name__}: {reason})") from error
