"""fastrcnn models."""

import json
from typing import Annotated

import typer

from fastrcnn.cli.common import console, fail


def models(
    name: Annotated[str | None, typer.Argument(help="show only names that contain this")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
) -> None:
    """The named models and every published checkpoint of them: size, AP, licence, address."""
    from fastrcnn.zoo.complexity import catalogue

    entries = []
    for entry in catalogue(name or ""):
        entries.append(entry)
        if as_json:
            continue
        size = f"{entry['parameters'] / 1e6:6.2f} M parameters {entry['flops'] / 1e9:6.1f} GFLOPs"
        console.print(f"[bold]{entry['model']:27}[/] {size}  {entry['variant']}", soft_wrap=True)
        for p in entry["published"]:
            licence = f"{p['licence']} for the {p['licence_of']}"
            console.print(f"    {p['metric']} {p['ap']:.1f}  {p['name']} ({p['profile']}), {licence}\n    {p['address']}",
                          markup=False, soft_wrap=True)  # fmt: skip
    if as_json:
        print(json.dumps(entries))
    if not entries:
        fail(f"no model's name contains {name!r}")
