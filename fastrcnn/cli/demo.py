"""fastrcnn demo."""

import time
from pathlib import Path
from typing import Annotated

import typer

from fastrcnn.cli.common import ASSETS, Device, Json, Precision, open_detector, say, say_json
from fastrcnn.cli.detect import run_detector


def demo(
    out: Annotated[Path, typer.Option(help="folder for the picture")] = Path("out"),
    device: Device = "auto",
    precision: Precision = "auto",
    as_json: Json = False,
) -> None:
    """Find blood cells in a picture of the package's own.

    Picture and weights come with the package: no network is needed.

    \b
    Examples
      fastrcnn demo
      fastrcnn demo --out cells --json
    """
    from fastrcnn._extension import kernel_table

    start = time.perf_counter()
    detector = open_detector(None, str(ASSETS / "demo.safetensors"), device, precision, 0.5)
    images, objects = run_detector(detector, [str(ASSETS / "demo.jpg")], out)
    if not images["done"]:
        raise typer.Exit(1)
    kernels = kernel_table()
    compiled = sum(row[detector.device.type] == "kernel" for row in kernels.values())
    seconds, picture = time.perf_counter() - start, out / "demo.jpg"
    if as_json:
        say_json(dict(picture=str(picture), objects=objects, seconds=seconds, device=str(detector.device),
                      precision=detector.precision, kernels=f"{compiled} of {len(kernels)}"))  # fmt: skip
        return
    for name, count in objects.most_common():
        say(f"{count:4d}  {name}")
    say(
        f"{sum(objects.values())} cells found in {seconds:.1f} s on {detector.device} ({detector.precision}), "
        f"{compiled} of {len(kernels)} operators by kernels. Look at {picture}"
    )
