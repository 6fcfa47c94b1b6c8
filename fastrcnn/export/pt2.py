"""An AOTInductor package: compiled code and weights in one file, for torch alone and the operators' library."""

import copy
from pathlib import Path

import torch
from torch import Tensor

from fastrcnn.export.compare import Difference, compare
from fastrcnn.export.onnx import cases, prepared
from fastrcnn.export.program import RAW_INPUTS, metadata, program
from fastrcnn.inference import Detector
from fastrcnn.inference.detector import PRECISIONS as DTYPES
from fastrcnn.models.base_detector import BaseDetector

SUFFIX, PRECISIONS = ".pt2", ("fp32", "bf16")


def require() -> None:
    pass


def refuse(model: BaseDetector) -> None:
    pass


@torch.library.register_fake("mkldnn::_convolution_pointwise.binary")
def _(x, other, *_) -> Tensor:
    return torch.empty_like(other)


def conv_bn_relu_form(
    x, weight, bn_weight, bias, bn_mean, bn_var, eps, stride, padding, dilation, groups, residual, relu
) -> Tensor:
    """The operator's kernel is Python's, which a C++ program lacks: what it calls, oneDNN's fused convolutions."""
    conv, relu = torch.ops.mkldnn._convolution_pointwise, "relu" if relu else "none"
    x = x.contiguous(memory_format=torch.channels_last)
    where = padding, stride, dilation, groups
    if residual is None:
        return conv(x, weight, bias, *where, relu, [], "")
    return conv.binary(x, residual, weight, bias, *where, "add", None, None if relu == "none" else relu, [], "")


FORMS = {torch.ops.fastrcnn.conv_bn_relu.default: conv_bn_relu_form}


def write(detector: Detector, path: Path, folder: Path, precision: str, raw: bool, dynamic: bool) -> Difference:
    model = copy.deepcopy(detector.model).to(DTYPES[precision])
    for m in model.modules():
        if type(m) is torch.nn.Conv2d:
            m.to(memory_format=torch.channels_last)
    whole = program(model, raw, dynamic)
    options = {"aot_inductor.metadata": metadata(detector, precision, raw)}
    part = folder / path.name
    torch._inductor.aoti_compile_and_package(whole, package_path=str(part), inductor_configs=options)
    runtime = torch._inductor.aoti_load_package(str(part))

    def run(images: Tensor) -> list[Tensor]:
        if not raw:
            return runtime(images)
        batch, *geometry = (prepared(detector.model, images)[name] for name in RAW_INPUTS)
        return runtime(batch.to(DTYPES[precision]), *geometry)

    found = compare(run, detector, precision, cases(detector.model, dynamic))
    part.replace(path)
    return found
