"""fastrcnn train."""

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from fastrcnn.cli.common import Device, console, fail
from fastrcnn.cli.eval import print_scores


def say(line: str) -> None:
    """Prints a line; a full disk or a closed pipe behind the output ends no training."""
    with contextlib.suppress(OSError):
        console.print(line, markup=False, soft_wrap=True)


def train(
    annotations: Annotated[Path, typer.Argument(help="COCO annotation file")],
    images: Annotated[Path | None, typer.Option(help="image folder [default: images/ beside the annotations]")] = None,
    val: Annotated[Path | None, typer.Option(help="COCO annotation file to report AP on")] = None,
    model: Annotated[str | None, typer.Option(help="name [default: told by the weights, else r50_fpn]")] = None,
    weights: Annotated[str | None, typer.Option(help="start: a detector of any classes, or an ImageNet ResNet")] = None,
    out: Annotated[Path, typer.Option(help="where the trained weights go, after every epoch")] = Path(
        "trained.safetensors"
    ),
    epochs: int = 12,
    batch: int = 2,
    lr: float = 0.0025,
    min_size: int = 800,
    max_size: int = 1333,
    device: Device = "auto",
) -> None:
    """Train on your own data; writes weights that `fastrcnn detect --weights` takes."""
    import torch
    from torchvision.transforms import v2

    from fastrcnn.data import CocoDataset, read_through
    from fastrcnn.evaluation import match_classes
    from fastrcnn.evaluation.coco import require_hotcoco
    from fastrcnn.inference.detector import as_device
    from fastrcnn.training import train as run
    from fastrcnn.weights import pretrained_model, save, writable
    from fastrcnn.weights.named import named_model
    from fastrcnn.zoo.recipes import RPNS

    try:  # everything that the run needs, before its first step
        chosen, out = as_device(device), writable(out)
        dataset = CocoDataset(annotations, images, v2.RandomHorizontalFlip())
        if val is not None:
            require_hotcoco()
            held_out = CocoDataset(val, images)
            held_out.truth(range(len(held_out)))
            read_through(held_out)
        torch.manual_seed(0)  # of the weights that start afresh
        sizes, names = dict(min_size=min_size, max_size=max_size), dataset.class_names
        classes = 1 if model in RPNS else len(names)
        if weights:
            net = pretrained_model(weights, classes, model, names, **sizes)
        else:  # nothing may stay frozen at random values
            backbone = dict(frozen_stages=-1, norm_eval=False, norm_cfg=dict(requires_grad=True))
            net = named_model(model or "r50_fpn", classes, backbone=backbone, **sizes)
        if net.reads_labels:  # an RPN's objects are one class, which is named nowhere
            net.class_names, net.category_ids = names, dataset.category_ids
            if val is not None:
                match_classes(names, held_out.class_names)
        net = net.to(chosen)
    except (ValueError, OSError, ImportError) as error:
        fail(error)
    if dataset.left_out:
        counts = ", ".join(f"{n} {reason}" for reason, n in dataset.left_out.items())
        say(f"{annotations}: boxes left out or cut: {counts}")
    saved = False

    def keep(mean) -> None:
        nonlocal saved
        save(mean, out)
        saved = True

    try:
        net = run(net, dataset, epochs, batch, lr, log=say, keep=keep)
        say(f"{out}: {out.stat().st_size / 1e6:.1f} MB")
        if val is not None:
            print_scores(net, held_out)
    except (ValueError, OSError, FloatingPointError, torch.OutOfMemoryError) as error:
        fail(f"{error}. The weights of the last whole epoch are in {out}" if saved else error)
