"""A model's folder in a repository of Triton Inference Server: config.pbtxt, and version 1 as an ONNX file."""

from pathlib import Path

from fastrcnn.export import onnx
from fastrcnn.export.compare import Difference
from fastrcnn.export.program import metadata
from fastrcnn.inference import Detector

SUFFIX, PRECISIONS = "", onnx.PRECISIONS
require, refuse = onnx.require, onnx.refuse
MOST_IMAGES = 8  # that the server joins into a batch; they have one size


def _text(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def _tensor(name: str, kind: str, dims: list[int]) -> str:
    """Without the batch's own dimension. One number an image is a dimension of 1 to the server."""
    reshape = "" if dims else " reshape: { shape: [ ] }"
    return f'{{ name: "{name}" data_type: TYPE_{kind} dims: {dims or [1]}{reshape} }}'


def config(name: str, texts: dict[str, str], precision: str, raw: bool) -> str:
    """config.pbtxt, whose parameters are `texts`."""
    floats = dict(fp32="FP32", fp16="FP16")[precision]
    inputs = [_tensor("images", "UINT8", [3, -1, -1])]
    if raw:
        inputs = [_tensor("batch", floats, [3, -1, -1]), _tensor("image_sizes", "INT64", [2])]
        inputs.append(_tensor("scale_factors", "FP32", [2]))
    outputs = [_tensor("boxes", "FP32", [-1, 4]), _tensor("scores", "FP32", [-1]), _tensor("labels", "INT64", [-1])]
    outputs.append(_tensor("counts", "INT64", []))
    lines = [f"name: {_text(name)}", 'backend: "onnxruntime"', f"max_batch_size: {MOST_IMAGES}", "dynamic_batching { }"]
    lines += [f"input {one}" for one in inputs] + [f"output {one}" for one in outputs]
    lines += [f"parameters {{ key: {_text(k)} value: {{ string_value: {_text(v)} }} }}" for k, v in texts.items()]
    return "\n".join(lines) + "\n"


def write(detector: Detector, path: Path, folder: Path, precision: str, raw: bool, dynamic: bool) -> Difference:
    if not dynamic:
        raise ValueError("dynamic: Triton joins images into batches of any size, expected dynamic=True")
    made, part = folder / "made", folder / "config.pbtxt"
    made.mkdir()
    found = onnx.write(detector, made / "model.onnx", folder, precision, raw, dynamic)
    part.write_text(config(path.name, metadata(detector, precision, raw), precision, raw), encoding="utf-8")
    (path / "1").mkdir(parents=True, exist_ok=True)
    (made / "model.onnx").replace(path / "1" / "model.onnx")
    part.replace(path / "config.pbtxt")
    return found
