"""fastrcnn train."""

from pathlib import Path
from typing import Annotated

import typer

from fastrcnn.cli.common import Device, console, fail
from fastrcnn.cli.eval import print_scores


def train(
    annotations: Annotated[Path, typer.Argument(help="COCO annotation file")],
    images: Annotated[Path | None, typer.Option(help="image folder [default: images/ beside the annotations]")] = None,
    val: Annotated[Path | None, typer.Option(help="COCO annotation file to report AP on")] = None,
    model: Annotated[str | None, typer.Option(help="name [default: told by the weights, else r50_fpn]")] = None,
    weights: Annotated[str | None, typer.Option(help="start: a detector of any classes, or an ImageNet ResNet")] = None,
    out: Annotated[Path, typer.Option(help="where the trained weights go")] = Path("trained.safetensors"),
    epochs: int = 12,
    batch: int = 2,
    lr: float = 0.0025,
    min_size: int = 800,
    max_size: int = 1333,
    device: Device = "auto",
) -> None:
    """Train on your own data; writes weights that `fastrcnn detect --weights` takes."""
    from safetensors.torch import save_file

    from fastrcnn.data import CocoDataset
    from fastrcnn.inference.detector import as_device
    from fastrcnn.training import train as run
    from fastrcnn.weights import model_metadata, pretrained_model
    from fastrcnn.weights.named import named_model

    try:
        from torchvision.transforms import v2

        dataset = CocoDataset(annotations, images, v2.RandomHorizontalFlip())
        names = ["object"] if (model or "").startswith("rpn_") else dataset.class_names
        sizes, classes = dict(min_size=min_size, max_size=max_size), len(names)
        if weights:
            net = pretrained_model(weights, classes, model, **sizes)
        else:  # nothing may stay frozen at random values
            backbone = dict(frozen_stages=-1, norm_eval=False, norm_cfg=dict(requires_grad=True))
            net = named_model(model or "r50_fpn", classes, backbone=backbone, **sizes)
        net = net.to(as_device(device))
        net = run(net, dataset, epochs, batch, lr, log=lambda line: console.print(line, soft_wrap=True))
    except (ValueError, OSError, FloatingPointError) as error:
        fail(error)
    net.class_names = names
    state = {k: v.detach().cpu().contiguous() for k, v in net.state_dict().items()}
    save_file(state, out, model_metadata(net.zoo_name, net, net.zoo_overrides))
    console.print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")
    if val is not None:
        print_scores(net, CocoDataset(val, images))
