"""fastrcnn export."""

from pathlib import Path
from typing import Annotated

import typer

from fastrcnn.cli.common import Json, MaxSize, MinSize, Model, Names, fail, open_detector, say, say_json


def export(
    weights: Annotated[str, typer.Argument(help="checkpoint of MMDetection, torchvision or Detectron2, or trained here: "
                                                "file or https address")],
    to: Annotated[str, typer.Option(help="pt2 (torch's AOTInductor), onnx, openvino or triton")] = "onnx",
    out: Annotated[Path | None, typer.Option(help="file, or Triton's folder of the model "
                                                  "[default: named as the weights, here]")] = None,
    model: Model = None,
    names: Names = None,
    precision: Annotated[str, typer.Option(help="fp32; fp16 (onnx, openvino, triton); bf16 (pt2)")] = "fp32",
    score: Annotated[float, typer.Option(min=0.0, max=1.0, help="leave out objects below this score")] = 0.05,
    min_size: MinSize = None,
    max_size: MaxSize = None,
    raw: Annotated[bool, typer.Option("--raw", help="take a batch that is resized and normalised already")] = False,
    dynamic: Annotated[bool, typer.Option(help="any number and size of pictures, or one of the largest size")] = True,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Write a detector as ONNX, OpenVINO, Triton or .pt2.

    ONNX, OpenVINO and Triton need nothing of this package to run, .pt2 its kernels. What a file finds is compared with what
    the model finds before it is left there. Needs the extra export, .pt2 a C++ compiler.

    \b
    Examples
      fastrcnn export runs/mine/best.safetensors --to onnx --out mine.onnx
      fastrcnn export runs/mine/best.safetensors --to openvino --out mine.xml
    """
    from fastrcnn.export import TARGETS
    from fastrcnn.export import export as write

    if to not in TARGETS:
        fail(f"--to: expected one of {', '.join(TARGETS)}, got {to!r}")
    out = out or Path(Path(weights).stem + TARGETS[to].SUFFIX)
    detector = open_detector(model, weights, "cpu", "fp32", score, names, min_size=min_size, max_size=max_size)
    try:
        found = write(detector, out, to, precision, raw, dynamic)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        fail(error)
    if as_json:
        say_json(dict(out=str(out), to=to, objects=found.objects, pictures=found.images, pixels=found.pixels,
                      score=found.score))  # fmt: skip
        return
    say(
        f"{found.objects} objects in {found.images} pictures, found again within {found.pixels:.2g} px and "
        f"{found.score:.1g} of score. See {out}"
    )
