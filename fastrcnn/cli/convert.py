"""fastrcnn convert."""

from pathlib import Path
from typing import Annotated

import typer

from fastrcnn.cli.common import Json, Names, fail, say, say_json, warn


def convert(
    weights: Annotated[str, typer.Argument(help="checkpoint of MMDetection, torchvision or Detectron2, or trained here: "
                                                "file or https address")],
    to: Annotated[str, typer.Option(help="mmdet, torchvision, detectron2, or fastrcnn (keeps the old numbers)")],
    out: Annotated[Path, typer.Option(help="file to write: .pth, or .safetensors to fastrcnn")],
    names: Names = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Write a checkpoint in another project's form.

    Weights are made right for the other's input and norms; what it does otherwise is said.

    \b
    Examples
      fastrcnn convert runs/mine/best.safetensors --to mmdet --out mine_mmdet.pth
      fastrcnn convert mine_mmdet.pth --to fastrcnn --out mine.safetensors
    """
    from fastrcnn.data import read_names
    from fastrcnn.weights.convert import convert_checkpoint

    try:
        notes = convert_checkpoint(weights, to, out, None if names is None else read_names(names))
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        fail(error)
    if as_json:
        say_json(dict(out=str(out), to=to, notes=notes))
        return
    for note in notes:
        warn(note)
    say(f"{out}: {weights} as {to}")
