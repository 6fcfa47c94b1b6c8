"""What the verbs share: consoles, options, errors as one sentence.

Exit statuses: 0 done, 1 something failed and was named, 2 a wrong command line, 130 interrupted.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

ASSETS = Path(__file__).parent.parent / "assets"
console = Console(highlight=False)
err = Console(stderr=True, highlight=False)
Weights = Annotated[
    str | None,
    typer.Option(help="checkpoint of MMDetection, torchvision or Detectron2, or trained here: file, https address, or "
                 "coco [default: torchvision's COCO weights, fetched once]"),
]  # fmt: skip
Model = Annotated[str | None, typer.Option(help="name from `fastrcnn models`, or an MMDetection config file [default: told "
                           "by the weights]")]  # fmt: skip
Names = Annotated[
    str | None,
    typer.Option("--names", help="the classes, where the weights do not name them: with commas, or a file that has them (a "
                 "name a line, data.yaml, COCO's JSON)"),
]  # fmt: skip
Score = Annotated[float, typer.Option(min=0.0, max=1.0, help="leave out objects below this score")]
MinSize = Annotated[int | None, typer.Option(min=1, help="pixels of the short side [default: the model's]")]
MaxSize = Annotated[int | None, typer.Option(min=1, help="pixels of the long side at most [default: the model's]")]
Device = Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu, cuda or cuda:N")]
Precision = Annotated[str, typer.Option(help="auto (bf16 on a GPU, else fp32), fp32, bf16 or fp16")]
Json = Annotated[
    bool, typer.Option("--json", help="the result as one line of JSON, and nothing else, on standard output")
]


def printable(text) -> str:
    """`text` with everything escaped that a terminal might obey or cannot show: names come from outside."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def say(line) -> None:
    """A line of result."""
    console.print(printable(line), markup=False, soft_wrap=True)


def warn(line) -> None:
    """A line about what is not as it should be, beside the results."""
    err.print(printable(line), style="yellow", markup=False, soft_wrap=True)


def say_json(content) -> None:
    """The one line that --json prints."""
    typer.echo(json.dumps(content))


def say_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table: boxed in a terminal, plain columns where it goes elsewhere."""
    if console.is_terminal:
        from rich.table import Table

        table = Table(*header)
        for row in rows:
            table.add_row(*row)
        console.print(table)
        return
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    for row in (header, *rows):
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def fail(message) -> None:
    """One sentence and exit status 1, in place of a traceback."""
    if isinstance(message, OSError) and message.filename is not None and message.strerror:
        message = f"{message.filename}: {message.strerror}"
    err.print(printable(f"fastrcnn: {message}"), style="red", markup=False, soft_wrap=True)
    raise typer.Exit(1)


def progress_bar(total: int | None) -> Progress:
    """A bar on a terminal's standard error, for more than one thing to do; nothing where nobody watches."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    quiet = not err.is_terminal or (total is not None and total < 2)
    return Progress(*columns, console=err, transient=True, disable=quiet)


def open_detector(
    model: str | None,
    weights: str | None,
    device: str,
    precision: str,
    score: float,
    names: str | None = None,
    **options,
):
    """A Detector, or one sentence. names: as `read_names` takes them; options: further arguments of `Detector`."""
    from fastrcnn import Detector
    from fastrcnn.data import read_names
    from fastrcnn.inference.memory import keep_memory

    keep_memory()
    if weights in (None, "coco"):
        model, weights = model or "r50_fpn", "coco"
    try:
        options["class_names"] = None if names is None else read_names(names)
        named = (weights, None) if model is None else (model, weights)
        detector = Detector(*named, device, precision, score, **options)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        fail(error)
    if detector.class_names[0] == "class 0":
        warn("the weights do not name their classes: --names does")
    return detector
