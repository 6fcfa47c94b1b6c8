"""The same detector in other programs on a CPU, for detector_bench.py --rivals: ONNX Runtime, OpenVINO, torch.compile.

Each takes the picture's bytes, has as many threads as torch, and gives detections as torchvision's model does.
"""

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx as files
import torch

from fastrcnn import Detector
from fastrcnn.export import onnx, openvino


def require() -> None:
    """Raises ImportError naming a package that is missing; SystemExit where the threads would not be the same."""
    openvino.require()
    if torch.get_num_threads() != len(os.sched_getaffinity(0)):
        raise SystemExit(
            f"--rivals: OMP_NUM_THREADS={len(os.sched_getaffinity(0))} or `taskset`: the other programs take all cores"
        )


def _as_torchvision(padded) -> list[dict]:
    boxes, scores, labels, counts = (torch.as_tensor(part) for part in padded)
    n = int(counts[0])
    return [
        dict(boxes=boxes[0, :n], scores=scores[0, :n], labels=labels[0, :n] + 1)
    ]  # torchvision's 0 is the background


def programs(model, rival_model, picture: torch.Tensor, folder: Path) -> Iterator[tuple[str, Callable[[], list[dict]]]]:
    """(name, call). model: ours, rival_model: torchvision's; picture uint8 [3, H, W]; folder: where files may lie."""
    images, path = picture[None].numpy(), folder / "model.onnx"
    # Built and not exported: `export` compares first, where random weights decide nothing clearly; the caller compares.
    files.save(onnx.build(Detector(model, device="cpu"), "fp32", False, True), path)
    session, program = onnx.session(path), openvino.compiled(path)
    yield "ONNX Runtime fp32", lambda: _as_torchvision(session.run(list(onnx.OUTPUTS), {"images": images}))
    yield "OpenVINO fp32", lambda: _as_torchvision(program({"images": images}).values())
    compiled, floats = copy.deepcopy(rival_model), [picture.float() / 255]
    compiled.backbone = torch.compile(compiled.backbone)
    yield "torchvision fp32, compiled backbone", torch.inference_mode()(lambda: compiled(floats))
