"""fastrcnn info."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from fastrcnn.cli.common import console, fail, printable


def info(
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
    plan: Annotated[Path | None, typer.Option(help="a plan saved by fastrcnn.ops.conv_plan: show that instead")] = None,
) -> None:
    """Versions, devices, and what answers each operator: a compiled kernel or the reference, and why."""
    if plan is not None:
        show_plan(plan, as_json)
        return
    import torch

    import fastrcnn
    from fastrcnn import _extension

    devices = [f"cpu ({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads)"]
    devices += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
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
        print(json.dumps(facts))
        return
    for key in ("fastrcnn", "torch", "cuda", "python", "built_with_torch"):
        console.print(f"{key:17} {facts[key]}")
    console.print(f"{'devices':17} {', '.join(devices)}")
    table = Table("op", "cpu", "cuda")
    for op, row in facts["ops"].items():
        cells = []
        for device, answer in row.items():
            others = [name for name, ops in facts["dtypes"].items() if ops[op][device] != answer]
            cell = f"[green]{answer}[/]" if answer == "kernel" else answer
            cells.append(cell + (f", {', '.join(others)}: reference" if others else ""))
        table.add_row(op, *cells)
    console.print(table)
    for name, reason in facts["reasons"].items():
        if reason:
            console.print(f"{name}: {reason}", markup=False, soft_wrap=True)


def show_plan(path: Path, as_json: bool) -> None:
    """Which convolution answers each kind of call on CUDA, and how long each took when it was measured."""
    from fastrcnn.ops.conv_plan import load_plan

    try:
        plan = load_plan(path)
    except (OSError, ValueError) as error:
        fail(error)
    if as_json:
        print(json.dumps(plan))
        return
    for kind, times in plan.items():
        fastest_first = ", ".join(f"{name} {ms:.4g} ms" for name, ms in sorted(times.items(), key=lambda item: item[1]))
        console.print(printable(f"{kind}: {fastest_first}"), markup=False, soft_wrap=True)
