"""fastrcnn info."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from fastrcnn.cli.common import Json, fail, say, say_json, say_table


def info(
    as_json: Json = False,
    plan: Annotated[Path | None, typer.Option(help="a plan saved by fastrcnn.ops.conv_plan: show that instead")] = None,
) -> None:
    """Versions, devices, and what answers each operator.

    A compiled kernel, or the slow reference in plain PyTorch, and why.

    \b
    Examples
      fastrcnn info
      fastrcnn info --json
    """
    if plan is not None:
        show_plan(plan, as_json)
        return
    import torch

    import fastrcnn.ops  # declares what the table lists
    from fastrcnn import _extension

    devices = _extension.devices()
    facts = dict(
        fastrcnn=fastrcnn.__version__,
        torch=torch.__version__,
        cuda=torch.version.cuda,
        python=sys.version.split()[0],
        built_with_torch=_extension.built_with_torch(),
        devices=devices,
        ops=_extension.kernel_table(),
        dtypes=_extension.kernel_tables(),
        reasons=_extension.reasons(),
    )
    if as_json:
        say_json(facts)
        return
    for key in ("fastrcnn", "torch", "cuda", "python", "built_with_torch"):
        say(f"{key:17} {facts[key]}")
    say(f"{'devices':17} {', '.join(devices)}")
    rows = []
    for op, row in facts["ops"].items():
        cells = []
        for device, answer in row.items():
            others = [name for name, ops in facts["dtypes"].items() if ops[op][device] != answer]
            cells.append(answer + (f", {', '.join(others)}: reference" if others else ""))
        rows.append((op, *cells))
    say_table(("op", "cpu", "cuda"), rows)
    for name, reason in facts["reasons"].items():
        if reason:
            say(f"{name}: {reason}")


def show_plan(path: Path, as_json: bool) -> None:
    """Which convolution answers each kind of call on CUDA, and how long each took when it was measured."""
    from fastrcnn.ops.conv_plan import load_plan

    try:
        plan = load_plan(path)
    except (OSError, ValueError) as error:
        fail(error)
    if as_json:
        say_json(plan)
        return
    for kind, times in plan.items():
        fastest_first = ", ".join(f"{name} {ms:.4g} ms" for name, ms in times.items())
        say(f"{kind}: {fastest_first}")
