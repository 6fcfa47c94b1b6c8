"""fastrcnn models."""

import json
from typing import Annotated

import typer

from fastrcnn.cli.common import ASSETS, Json, console, fail, printable, say, say_json


def models(
    name: Annotated[str | None, typer.Argument(help="show only names that contain this")] = None,
    as_json: Json = False,
) -> None:
    """List named models and published checkpoints.

    With parameters, multiply-adds of a picture of 800 x 1280 (G: 10^9), AP as it was published, licence and address.

    \b
    Examples
      fastrcnn models
      fastrcnn models retinanet --json
    """
    entries = json.loads((ASSETS / "models.json").read_text("utf-8"))  # counted once by fastrcnn/zoo/complexity.py
    entries = [entry for entry in entries if (name or "") in entry["model"]]
    if not entries:
        fail(f"no model's name contains {name!r}; `fastrcnn models` lists all of them")
    if as_json:
        say_json(entries)
        return
    for entry in entries:
        size = f"{entry['parameters'] / 1e6:6.2f} M parameters {entry['flops'] / 1e9:6.1f} G multiply-adds"
        console.print(f"[bold]{entry['model']:27}[/] {size}  {printable(entry['variant'])}", soft_wrap=True)
        for p in entry["published"]:
            say(
                f"    {p['metric']} {p['ap']:.1f}  {p['name']} ({p['profile']}), {p['licence']} for the {p['licence_of']}"
            )
            say(f"    {p['address']}")
