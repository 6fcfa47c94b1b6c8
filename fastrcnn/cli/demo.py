"""fastrcnn demo."""

import time
from pathlib import Path
from typing import Annotated

import typer

from fastrcnn.cli.common import Device, Precision, console
from fastrcnn.cli.detect import run_detector

ASSETS = Path(__file__).parent.parent / "assets"


def demo(
    out: Annotated[Path, typer.Option(help="folder for the picture")] = Path("out"),
    device: Device = "auto",
    precision: Precision = "auto",
) -> None:
    """Find blood cells in a picture that comes with the package, with weights that come with it: no network needed."""
    from fastrcnn import Detector
    from fastrcnn._extension import kernel_table

    start = time.perf_counter()
    detector = Detector(str(ASSETS / "demo.safetensors"), None, device, precision, score_threshold=0.5)
    source = ASSETS / "demo.jpg"
    done, failed, objects = run_detector(detector, [str(source)], out, None, None, True)
    if failed or not done:
        raise typer.Exit(1)
    kernels = kernel_table()
    compiled = sum(row[detector.device.type] == "kernel" for row in kernels.values())
    for name, count in objects.most_common():
        console.print(f"{count:4d}  {name}")
    seconds = time.perf_counter() - start
    console.print(
        f"{sum(objects.values())} cells found in {seconds:.1f} s on {detector.device} ({detector.precision}), "
        f"{compiled} of {len(kernels)} operators by kernels. Look at {out / 'demo.jpg'}",
        soft_wrap=True,
    )
