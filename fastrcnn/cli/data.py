"""fastrcnn data: check, convert, split."""

from pathlib import Path
from typing import Annotated

import typer

from fastrcnn.cli.common import Json, fail, say, say_json

data = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Check, convert and split annotated pictures.")
Source = Annotated[Path, typer.Argument(help="folder or annotation file, of COCO's, Pascal VOC's or YOLO's")]
Images = Annotated[Path | None, typer.Option(help="picture folder [default: looked for around the annotations]")]
Out = Annotated[Path, typer.Option(help="a folder that is empty or not there yet")]
EXAMPLES = 5


def print_findings(findings, say=say) -> None:
    """A line a kind with its number, and the first of each."""
    for kind, count in findings.counts.most_common():
        dropped = findings.dropped[kind]
        say(f"{count:7} {kind}" + (f", {dropped} dropped" if dropped else ""))
        examples = [f for f in findings if f.kind == kind][:EXAMPLES]
        for finding in examples:
            say(f"          {finding}")
        if count > len(examples):
            say(f"          and {count - len(examples)} more")


@data.command()
def check(
    path: Source,
    images: Images = None,
    strict: Annotated[bool, typer.Option("--strict", help="exit status 1 for any fault")] = False,
    as_json: Json = False,
) -> None:
    """Say what is wrong with a dataset.

    Entries, boxes, pictures, splits: each fault by file and entry, counted.

    \b
    Examples
      fastrcnn data check photos
      fastrcnn data check photos --json
    """
    from fastrcnn.data import check as run
    from fastrcnn.data.check import faults

    try:
        findings = run(path, images)
    except (ValueError, OSError) as error:
        fail(error)
    wrong = faults(findings)
    if as_json:
        say_json(findings.to_json())
    else:
        print_findings(findings)
        dropped = sum(findings.dropped.values())
        say(f"{path}: {sum(wrong.values())} faults, {dropped} entries that a training leaves out")
    if strict and wrong:
        fail(f"{path}: refused: {', '.join(f'{count} {kind}' for kind, count in wrong.items())}")


@data.command()
def convert(
    path: Source,
    to: Annotated[str, typer.Option(help="coco, voc or yolo")],
    out: Out,
    images: Images = None,
    as_json: Json = False,
) -> None:
    """Write a dataset in another format.

    With its splits and pictures.

    \b
    Examples
      fastrcnn data convert photos --to yolo --out photos_yolo
    """
    from fastrcnn.data import convert as run

    try:
        done, datasets = run(path, to, out, images)
    except (ValueError, OSError) as error:
        fail(error)
    if as_json:
        found = {str(dataset.path): dataset.findings.to_json() for dataset in datasets}
        say_json(dict(out=str(out), written=done, findings=found))
        return
    for dataset in datasets:
        print_findings(dataset.findings)
    say(f"{out}: " + ", ".join(f"{count} {what}" for what, count in done.items()))


@data.command()
def split(
    path: Source,
    out: Out,
    val: Annotated[float, typer.Option(help="share of the pictures to validate on")] = 0.2,
    test: Annotated[float, typer.Option(help="share of the pictures to test on")] = 0.0,
    seed: Annotated[int, typer.Option(help="another one is another choice")] = 0,
    to: Annotated[str | None, typer.Option(help="coco, voc or yolo [default: as it is]")] = None,
    images: Images = None,
    as_json: Json = False,
) -> None:
    """Write a dataset as a training and a validation set.

    And perhaps a test set.

    \b
    Examples
      fastrcnn data split photos/train --val 0.2 --out sets
    """
    from fastrcnn.data import split as run

    try:
        done, counts = run(path, out, val, test, seed, to, images)
    except (ValueError, OSError) as error:
        fail(error)
    if as_json:
        say_json(dict(out=str(out), written=done, pictures=counts))
        return
    sets = ", ".join(f"{count} {name}" for name, count in counts.items())
    say(f"{out}: {sets}; " + ", ".join(f"{count} {what}" for what, count in done.items()))
