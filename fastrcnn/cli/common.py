"""What the verbs share: consoles, options, errors as one sentence."""

from typing import Annotated

import typer
from rich.console import Console

console = Console(highlight=False)
err = Console(stderr=True, highlight=False)
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")]
Precision = Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16")]


def fail(message) -> None:
    """One sentence and exit status 1, in place of a traceback."""
    err.print(f"fastrcnn: {message}", style="red", markup=False, soft_wrap=True)
    raise typer.Exit(1)


def open_detector(model: str | None, weights: str | None, device: str, precision: str, score: float):
    from fastrcnn import Detector
    from fastrcnn.inference.memory import keep_memory

    keep_memory()
    if weights is None:
        model, weights = model or "r50_fpn", "coco"
    try:
        if model is None:
            return Detector(weights, None, device, precision, score)
        return Detector(model, weights, device, precision, score)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        fail(error)
