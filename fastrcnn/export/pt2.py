"""An AOTInductor package: compiled code and weights in one file, for torch alone and the operators' library."""

import copy
import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

from fastrcnn.export.compare import Difference, cases, compare
from fastrcnn.export.program import RAW_INPUTS, metadata, prepared, program
from fastrcnn.inference import Detector
from fastrcnn.inference.detector import PRECISIONS as DTYPES
from fastrcnn.models.base_detector import BaseDetector

SUFFIX, PRECISIONS = ".pt2", ("fp32", "bf16")


def require() -> None:
    """Raises OSError where there is no C++ compiler."""
    names = [name for name in (os.environ.get("CXX"), "g++", "c++", "clang++") if name]
    if not any(map(shutil.which, names)):
        raise OSError(
            f"a .pt2 is compiled, and none of {', '.join(names)} was found: install a C++ compiler or set CXX"
        )


def refuse(model: BaseDetector) -> None:
    """Nothing: what the model calls is compiled or calls an operator of this package."""


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
