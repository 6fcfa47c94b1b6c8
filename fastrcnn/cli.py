"""The command `fastrcnn`: parses, calls, prints."""

import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
console = Console(highlight=False)
err = Console(stderr=True, highlight=False)
ASSETS = Path(__file__).parent / "assets"

Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")]
Precision = Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16")]


def _fail(message) -> None:
    """One sentence and exit status 1, in place of a traceback."""
    err.print(f"fastrcnn: {message}", style="red", markup=False, soft_wrap=True)
    raise typer.Exit(1)


def _detector(model: str | None, weights: str | None, device: str, precision: str, score: float):
    from fastrcnn import Detector
    from fastrcnn.inference.memory import keep_memory

    keep_memory()
    if weights is None:
        model, weights = model or "r50_fpn", "coco"
    try:
        if model is None:
            return Detector(weights, None, device, precision, score)
        return Detector(model, weights, device, precision, score)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        _fail(error)


def _selected(names: list[str], wanted: str | None) -> set[int] | None:
    if wanted is None:
        return None
    asked = [c.strip() for c in wanted.split(",") if c.strip()]
    unknown = [c for c in asked if c not in names]
    if unknown:
        _fail(f"--classes: unknown {', '.join(unknown)}; the model knows {', '.join(names)}")
    return {i for i, name in enumerate(names) if name in asked}


def _run(detector, sources: list[str], out: Path, classes: set[int] | None, batch: int | None, pictures: bool):
    """`write_detections` with a progress bar and the unreadable images named. Returns (images done, failed, objects)."""
    from fastrcnn.inference.output import write_detections

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    failed, objects = 0, Counter()
    with Progress(*columns, console=err, transient=True, disable=len(sources) < 2) as progress:
        task = progress.add_task("detecting", total=len(sources))
        for found in write_detections(detector, sources, out, classes, batch, pictures):
            progress.advance(task)
            if isinstance(found, Exception):
                failed += 1
                err.print(f"skipped {found}", style="yellow", markup=False, soft_wrap=True)
            else:
                objects.update(found.names)
    return len(sources) - failed, failed, objects


@app.command()
def detect(
    sources: Annotated[list[str], typer.Argument(help="images, folders, glob patterns, http(s) addresses")],
    weights: Annotated[
        str | None,
        typer.Option(help="checkpoint of MMDetection, torchvision or Detectron2: file or https address "
                          "[default: torchvision's COCO weights, fetched once]"),
    ] = None,
    model: Annotated[str | None, typer.Option(help="name from `fastrcnn models` [default: told by the weights]")] = None,
    out: Annotated[Path, typer.Option(help="folder for the pictures and detections.json")] = Path("out"),
    score: Annotated[float, typer.Option(min=0.0, max=1.0, help="leave out objects below this score")] = 0.5,
    classes: Annotated[str | None, typer.Option(help="names of the classes to keep, comma-separated")] = None,
    device: Device = "auto",
    precision: Precision = "auto",
    batch: Annotated[int | None, typer.Option(min=1, help="images of one shape per step")] = None,
    pictures: Annotated[bool, typer.Option(help="write pictures as well as detections.json")] = True,
) -> None:  # fmt: skip
    """Find objects in images: pictures with boxes, names and scores, and COCO-format JSON."""
    from fastrcnn.data import list_images

    paths = [path for source in sources for path in list_images(source)]
    if not paths:
        _fail(f"no images found in {' '.join(sources)}")
    detector = _detector(model, weights, device, precision, score)
    start = time.perf_counter()
    done, failed, objects = _run(detector, paths, out, _selected(detector.class_names, classes), batch, pictures)
    seconds = time.perf_counter() - start
    what = ", ".join(f"{n} {name}" for name, n in objects.most_common(6)) or "nothing"
    skipped = f", {failed} unreadable (named above)" if failed else ""
    line = f"{done} of {len(paths)} images in {seconds:.1f} s{skipped}: {what}. See {out}/"
    console.print(line, markup=False, soft_wrap=True)
    if failed:
        raise typer.Exit(1)


@app.command()
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
    done, failed, objects = _run(detector, [str(source)], out, None, None, True)
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


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False) -> None:
    """Versions, devices, and what answers each operator: a compiled kernel or the reference, and why."""
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


@app.command()
def models(
    name: Annotated[str | None, typer.Argument(help="show only names that contain this")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
) -> None:
    """The named models and every published checkpoint of them: size, AP, licence, address."""
    from fastrcnn.models.complexity import catalogue

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
        _fail(f"no model's name contains {name!r}")


@app.command()
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
    from fastrcnn.models.zoo import named_model
    from fastrcnn.training import train as run
    from fastrcnn.weights import model_metadata, pretrained_model

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
        _fail(error)
    net.class_names = names
    state = {k: v.detach().cpu().contiguous() for k, v in net.state_dict().items()}
    save_file(state, out, model_metadata(net.zoo_name, net, net.zoo_overrides))
    console.print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")
    if val is not None:
        _print_scores(net, CocoDataset(val, images))


def _print_scores(model, dataset) -> None:
    """COCO's numbers; of an RPN alone, whose objects have no classes, its recall."""
    from fastrcnn.evaluation import evaluate, evaluate_proposals

    for name, value in (evaluate if model.reads_labels else evaluate_proposals)(model, dataset).items():
        console.print(f"{name:8} {value:5.1f}")


@app.command("eval")
def evaluate_command(
    annotations: Annotated[Path, typer.Argument(help="COCO annotation file")],
    weights: Annotated[str, typer.Option(help="checkpoint of any peer, or trained here")],
    images: Annotated[Path | None, typer.Option(help="image folder [default: images/ beside the annotations]")] = None,
    device: Device = "auto",
) -> None:
    """COCO's twelve numbers of a checkpoint on annotated images, or the recall of a region proposal network."""
    from fastrcnn.data import CocoDataset
    from fastrcnn.inference.detector import as_device
    from fastrcnn.weights import infer_model

    try:
        dataset = CocoDataset(annotations, images)
        model = infer_model(weights).to(as_device(device))
        if model.reads_labels and model.num_classes != len(dataset.class_names):
            _fail(f"{weights} has {model.num_classes} classes, {annotations} has {len(dataset.class_names)}")
        _print_scores(model, dataset)
    except (ValueError, OSError, ImportError) as error:
        _fail(error)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
