"""ONNX: standard operators of opset 18, any number and size of images, checked by ONNX Runtime."""

import copy
from pathlib import Path

from torch import Tensor

from fastrcnn.export.compare import Difference, cases, compare
from fastrcnn.export.onnx_ops import to_onnx
from fastrcnn.export.program import OUTPUTS, RAW_INPUTS, metadata, prepared, program
from fastrcnn.inference import Detector
from fastrcnn.inference.detector import PRECISIONS as DTYPES
from fastrcnn.layers import (
    DeformConv2dPack,
    DeformRoIPoolPack,
    ModulatedDeformConv2dPack,
    ModulatedDeformRoIPoolPack,
)
from fastrcnn.models.base_detector import BaseDetector

SUFFIX, PRECISIONS = ".onnx", ("fp32", "fp16")
UNSAID = (DeformConv2dPack, ModulatedDeformConv2dPack, DeformRoIPoolPack, ModulatedDeformRoIPoolPack)


def require(*packages: str) -> None:
    """Raises ImportError where a package that exporting needs is absent."""
    for name in packages or ("onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(name)
        except ImportError:
            raise ImportError(f"exporting needs the package {name}: pip install 'fastrcnn[export]'") from None


def refuse(model: BaseDetector) -> None:
    """Raises ValueError naming what ONNX has no words for."""
    for name, module in model.named_modules():
        if isinstance(module, UNSAID):
            raise ValueError(f"{name}: ONNX of opset 18 has no operator for {type(module).__name__}")
        kind = getattr(module, "test_cfg", {}).get("nms", {}).get("type", "nms")
        if kind != "nms":
            raise ValueError(f"{name} test_cfg nms: ONNX has no {kind}, only the plain nms")


def build(detector: Detector, precision: str, raw: bool, dynamic: bool):
    """The ModelProto."""
    import onnx

    model = copy.deepcopy(detector.model).to(DTYPES[precision])
    whole = to_onnx(program(model, raw, dynamic), RAW_INPUTS if raw else ["images"], OUTPUTS)
    del whole.metadata_props[:]
    for key, value in metadata(detector, precision, raw).items():
        whole.metadata_props.add(key=key, value=value)
    whole.producer_name, whole.graph.name = "fastrcnn", "detector"
    onnx.checker.check_model(whole, full_check=True)
    return whole


def session(path: Path):
    import onnxruntime

    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def write(detector: Detector, path: Path, folder: Path, precision: str, raw: bool, dynamic: bool) -> Difference:
    import onnx

    part = folder / path.name
    onnx.save(build(detector, precision, raw, dynamic), part)
    runtime, dtype = session(part), DTYPES[precision]

    def run(images: Tensor) -> list:
        inputs = prepared(detector.model, images) if raw else dict(images=images)
        if raw:
            inputs["batch"] = inputs["batch"].to(dtype)
        return runtime.run(list(OUTPUTS), {name: x.numpy() for name, x in inputs.items()})

    found = compare(run, detector, precision, cases(detector.model, dynamic))
    part.replace(path)
    return found
