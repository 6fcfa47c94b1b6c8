"""fastrcnn train."""

import contextlib
import json
import math
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from fastrcnn.cli.common import Device, Json, MaxSize, MinSize, console, err, fail, say_json


def say_on(where, line: str) -> None:
    """Prints a line, of several processes in the first one; a full disk or a closed pipe behind it ends no training."""
    from fastrcnn.training.distributed import is_first

    if is_first():
        with contextlib.suppress(OSError):
            where.print(line, markup=False, soft_wrap=True)


def _whole_or_auto(text: str | None) -> str | None:
    if text not in (None, "auto") and not (text.isdecimal() and int(text) > 0):
        raise typer.BadParameter(f"expected a whole number from 1 up, or auto, got {text!r}")
    return text


def _above_0(number: float | None) -> float | None:
    if number is not None and not 0 < number < math.inf:
        raise typer.BadParameter(f"expected a number above 0, got {number!r}")
    return number


def train(
    data: Annotated[Path, typer.Argument(help="folder or annotation file: COCO, Pascal VOC or YOLO")],
    out: Annotated[Path, typer.Option(help="folder for weights, logs and report; NAME.safetensors: folder NAME, and "
                                           "the best weights in that file")] = Path("runs/train"),
    images: Annotated[Path | None, typer.Option(help="its picture folder [default: beside the annotations]")] = None,
    val: Annotated[Path | None, typer.Option(help="folder or annotation file to measure AP on after each epoch [default: "
                                                  "val or valid in the folder, if there]")] = None,
    val_images: Annotated[
        Path | None, typer.Option(help="picture folder of --val [default: beside its annotations, then --images]")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="name, or an MMDetection config file [default: told by the weights, else r50_fpn]")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="what to start from: a detector, an ImageNet ResNet (or "
                                                     "torchvision://resnet50), or coco [default: random weights]")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="1x, 2x, 3x, 90k, ms-3x, tv, tv-v2, lsj-100e, lsj-200e, lsj-400e, config or finetune "
                                      "[default: finetune; of a config file its own]"),
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="passes over the pictures [default: the recipe's]")] = None,
    batch: Annotated[
        str | None,
        typer.Option(
            callback=_whole_or_auto, help="pictures a step, of each process, or auto [default: the recipe's]"
        ),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(callback=_above_0, help="learning rate [default: the recipe's, scaled by the batch]"),
    ] = None,
    min_size: MinSize = None,
    max_size: MaxSize = None,
    shard: Annotated[
        bool, typer.Option("--shard", help="spread parameters and optimizer over torchrun's processes (FSDP2)")
    ] = False,
    precision: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16 [default: the recipe's]")] = None,
    patience: Annotated[
        int | None, typer.Option(min=1, help="end after so many epochs without a better AP [default: never]")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="of fresh weights, of the pictures' order and changes")] = 0,
    workers: Annotated[int, typer.Option(min=0, help="processes that read pictures")] = 2,
    deterministic: Annotated[bool, typer.Option("--deterministic", help="the same bits on every run, slower")] = False,
    drop_empty: Annotated[bool, typer.Option("--drop-empty", help="leave out pictures without objects")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in --out")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="write TensorBoard's files, too")] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:  # fmt: skip
    """Train on your own annotated pictures.

    --out then holds best.safetensors, which `fastrcnn detect --weights` takes, and report.html.

    \b
    Examples
      fastrcnn train photos/train --val photos/valid --weights coco --out runs/mine
      fastrcnn train photos/train --val photos/valid --out runs/mine --resume
    """
    import torch

    from fastrcnn.cli.data import print_findings
    from fastrcnn.data import open_dataset
    from fastrcnn.data.check import check_dataset
    from fastrcnn.data.detect_format import detect_format
    from fastrcnn.evaluation import match_classes
    from fastrcnn.evaluation.coco import require_hotcoco
    from fastrcnn.inference.detector import as_device
    from fastrcnn.training import get_recipe, recipe_of
    from fastrcnn.training import train as run
    from fastrcnn.training.auto_batch import check_auto
    from fastrcnn.training.checkpoint import check_out
    from fastrcnn.training.distributed import check_shards, is_first, own_device, processes
    from fastrcnn.training.state import seed_everything
    from fastrcnn.weights import model_to_train
    from fastrcnn.weights.start import is_config

    say = partial(say_on, err if as_json else console)
    try:  # everything that the run needs, before its first step
        get_recipe("finetune" if recipe in (None, "config") else recipe, precision=precision)  # checks them
        check_shards(shard, processes())
        folder, file = check_out(out, resume or not is_first())
        chosen = own_device(as_device(device))
        size = None if batch in (None, "auto") else int(batch)
        held_out, split = None, None
        if val is None and {"train", "val"} <= set(detect_format(data).splits):  # a folder that has both
            val = data
        if val is None and patience is not None:
            raise ValueError("patience: needs --val, whose AP it watches")
        if val is not None:
            require_hotcoco()
            if {"val", "test"} & set(detect_format(val).splits):
                split = "val"
            held_out = open_dataset(val, val_images or _its_pictures(val, images), split)
            held_out.truth(range(len(held_out)))
        dataset = open_dataset(data, images)
        seed_everything(seed)  # of the weights that start afresh
        sizes = {k: v for k, v in dict(min_size=min_size, max_size=max_size).items() if v is not None}
        net = model_to_train(model, weights, dataset.class_names, **sizes)
        plan = recipe_of(
            net,
            recipe or ("config" if is_config(model) else None),
            say,
            epochs=epochs,
            batch_size=size,
            precision=precision,
            shard=shard or None,
        )
        if net.reads_labels:  # an RPN's objects are one class, which is named nowhere
            net.class_names, net.category_ids = list(dataset.class_names), [int(i) for i in dataset.category_ids]
            if held_out is not None:
                match_classes(net.class_names, held_out.class_names)
        net = net.to(chosen)
        if batch == "auto":
            check_auto(plan, chosen)
            size = batch
    except (ValueError, OSError, ImportError) as error:
        fail(error)
    try:
        if not resume and is_first():  # every picture is looked at once
            seen: dict = {}
            findings = check_dataset(dataset, "train", seen)
            if held_out is not None:
                check_dataset(held_out, "val", seen, findings)
            if findings:
                say(f"{data}: what was found (fastrcnn data check says more); what is dropped is left out")
                print_findings(findings, say)
        run(
            net, dataset, plan, out, resume, held_out, batch_size=size, lr=lr, seed=seed, workers=workers,
            deterministic=deterministic, drop_empty=drop_empty, patience=patience, tensorboard=tensorboard, log=say,
        )  # fmt: skip
        best = file or folder / "best.safetensors"
        say(f"weights and report: {best}, {folder}/report.html")
        if as_json and is_first():
            metrics = folder / "metrics.json"
            numbers = json.loads(metrics.read_text()) if metrics.is_file() else None
            say_json(dict(out=str(folder), weights=str(best), report=str(folder / "report.html"), metrics=numbers))
    except (ValueError, OSError, FloatingPointError, MemoryError, torch.OutOfMemoryError) as error:
        fail(error)


def _its_pictures(val: Path, images: Path | None) -> Path | None:
    """--images where --val's own pictures do not lie beside it: COCO has a folder for each, other sets one for both."""
    from fastrcnn.data import open_dataset

    if images is None or not val.is_file():
        return None
    found = open_dataset(val)
    return None if found.picture(0).is_file() else images
