"""OpenVINO: the ONNX file converted, NAME.xml and its weights NAME.bin."""

from pathlib import Path

from torch import Tensor

from fastrcnn.export import onnx
from fastrcnn.export.compare import Difference, cases, compare
from fastrcnn.export.program import OUTPUTS, metadata, prepared
from fastrcnn.inference import Detector

SUFFIX, PRECISIONS = ".xml", ("fp32", "fp16")
refuse = onnx.refuse


def require() -> None:
    onnx.require()
    onnx.require("openvino")


def compiled(path: Path):
    """The model on the CPU in float32: by itself OpenVINO calculates in bfloat16 where the machine has it."""
    import openvino

    return openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


def write(detector: Detector, path: Path, folder: Path, precision: str, raw: bool, dynamic: bool) -> Difference:
    import onnx as onnx_package
    import openvino

    source, part = folder / "model.onnx", folder / path.name
    onnx_package.save(onnx.build(detector, "fp32", raw, dynamic), source)
    model = openvino.convert_model(source)
    for key, value in metadata(detector, precision, raw).items():
        model.set_rt_info(value, ["fastrcnn", key])
    openvino.save_model(model, part, compress_to_fp16=precision == "fp16")
    runtime = compiled(part)

    def run(images: Tensor) -> list:
        inputs = prepared(detector.model, images) if raw else dict(images=images)
        found = runtime({name: x.numpy() for name, x in inputs.items()})
        return [found[name] for name in OUTPUTS]

    found = compare(run, detector, precision, cases(detector.model, dynamic))
    part.with_suffix(".bin").replace(path.with_suffix(".bin"))
    part.replace(path)
    return found
