"""fastrcnn bench."""

from typing import Annotated

import typer

from fastrcnn.cli.common import Device, Json, MaxSize, MinSize, Model, Precision, fail, open_detector, say, say_json


def bench(
    sources: Annotated[list[str] | None, typer.Argument(help="pictures to time it on [default: rendered ones]")] = None,
    weights: Annotated[str | None, typer.Option(help="checkpoint [default: random weights]")] = None,
    model: Model = None,
    height: Annotated[int, typer.Option(min=32, help="of the rendered picture")] = 800,
    width: Annotated[int, typer.Option(min=32, help="of the rendered picture")] = 1344,
    batch: Annotated[int, typer.Option(min=1, help="pictures a step; so many are rendered")] = 1,
    min_size: MinSize = None,
    max_size: MaxSize = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="how long to repeat it")] = 10.0,
    device: Device = "auto",
    precision: Precision = "auto",
    as_json: Json = False,
) -> None:
    """Time one detector on this machine.

    From decoded pictures to boxes. Without --weights the model (r50_fpn, or --model) has random ones: the time is right,
    objects there are none.

    \b
    Examples
      fastrcnn bench --seconds 5
      fastrcnn bench photos/valid --weights runs/mine/best.safetensors --json
    """
    import torch

    from fastrcnn.data import list_images, read_image
    from fastrcnn.data.rendered_cells import render_cells
    from fastrcnn.inference.bench import time_detector

    try:
        paths = [path for source in sources or () for path in list_images(source)]
        images = [read_image(path) for path in paths]
        if sources and not images:
            raise ValueError(f"no images found in {' '.join(sources)}")
        images = images or [torch.from_numpy(render_cells(n, height, width)[0]).permute(2, 0, 1) for n in range(batch)]
    except (ValueError, OSError, MemoryError) as error:
        fail(error)
    source = (None, model or "r50_fpn") if weights is None else (model, weights)
    detector = open_detector(*source, device, precision, 0.05, min_size=min_size, max_size=max_size)
    try:
        facts = time_detector(detector, images, batch, seconds)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        fail(error)
    if as_json:
        say_json(facts)
        return
    say(
        f"{facts['ms_per_image']:.1f} ms a picture, {facts['images_per_second']:.2f} a second: {facts['images']} pictures "
        f"in batches of {batch}, {facts['passes']} passes, median; fastest {facts['fastest_ms_per_image']:.1f} ms"
    )
    say(f"{facts['device']}, {facts['precision']}, {facts['kernels']} operators by kernels, {facts['objects']} objects")
