"""What a run looks at beside its training loss: its data before the first step, held-out pictures after each epoch, and the
report at the end."""

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from fastrcnn.data import read_through
from fastrcnn.data.batches import batches, steps_per_epoch
from fastrcnn.data.dataset import refuse_path
from fastrcnn.evaluation import as_detector, evaluate_proposals, match_classes, measure, predict, training_report
from fastrcnn.evaluation.coco import require_hotcoco
from fastrcnn.evaluation.predict import Predictions, predict_together
from fastrcnn.evaluation.results import write_evaluation
from fastrcnn.models.sampling import seeded
from fastrcnn.training import distributed
from fastrcnn.training.pictures import on_device, picture_sizes
from fastrcnn.weights import infer_model

BEST = "best.safetensors"
# What makes a model the best, by whether it has classes: an RPN's objects have none, and its recall counts.
SCORE = {True: "AP", False: "AR@1000"}


def check_data(model, dataset, val, drop_empty: bool, world: int, say: Callable[[str], None]) -> None:
    """Raises ValueError for what would end a run later, before its first step, TypeError for a path in the place of a
    dataset, and says how much there is."""
    for name, part in (("dataset", dataset), ("val", val)):
        refuse_path(name, part)
        if hasattr(part, "channels"):
            part.channels = model.data_preprocessor.in_channels
    if hasattr(dataset, "objects"):
        count, classes = int(dataset.objects.sum()), len(dataset.class_names)
        if model.reads_labels and classes > model.num_classes:
            raise ValueError(f"dataset: {classes} classes, the model has {model.num_classes}")
    else:
        counts = read_through(dataset)
        count = sum(counts.values())
        unknown = [label for label in counts if not 0 <= label < model.num_classes] if model.reads_labels else ()
        if unknown:
            raise ValueError(f"dataset: expected labels in 0..{model.num_classes - 1}, got {sorted(unknown)}")
    if not count:
        raise ValueError(f"dataset: no object is annotated on its {len(dataset)} images, or all were left out")
    steps_per_epoch(dataset, 1, world, drop_empty)
    say(f"{len(dataset)} images, {count} objects")
    if val is not None:
        require_hotcoco()
        if hasattr(val, "truth"):
            val.truth(range(len(val)))
            if model.reads_labels and model.class_names:
                match_classes(model.class_names, val.class_names)
        read_through(val)


@torch.no_grad()
def validation_loss(losses: nn.Module, val, batch_size: int, workers: int, rank: int, world: int) -> float:
    """The mean training loss of held-out pictures, without a change to them, norms at their running statistics; the draw of
    samples is the same each time. Every process looks at its share. Classes are matched by name, as for AP."""
    model = losses.model
    places = _label_places(model, val)
    was_training = model.training
    model.train()
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.eval()
    device, found, counts = next(model.parameters()).device, [], []
    normalizer = getattr(getattr(model, "bbox_head", None), "loss_normalizer", None)
    kept = None if normalizer is None else normalizer.clone()
    try:
        size = batch_size if len(val) >= world * batch_size else 1
        if len(val) < world:  # too few for a share each
            return math.nan
        for images, targets, indices in batches(val, size, seed=0, epoch=0, rank=rank, world=world, workers=workers):
            if places is not None:
                targets = [{**target, "labels": places[target["labels"]]} for target in targets]
            with seeded(indices):
                sizes = picture_sizes(model, images, indices, None)
                least = distributed.largest(sizes, world)
                parts = losses(*on_device(model, images, targets, device), sizes, least)
            found.append(sum(parts.values()).double())
            counts.append(len(images))
        # Of each joined batch the mean over processes is its loss.
        table = torch.stack([torch.stack(found), torch.tensor(counts, dtype=torch.float64, device=device)])
        found, counts = distributed.mean_of_all(table, world)
        return ((found * counts).sum() / counts.sum()).item()
    finally:
        if kept is not None:
            normalizer.copy_(kept)
        model.train(was_training)


def _label_places(model, val) -> Tensor | None:
    """int64 [K]: the model's label of each of `val`'s classes; None where they are the same."""
    names = list(getattr(val, "class_names", None) or [])
    if not model.reads_labels or not names or not model.class_names or names == list(model.class_names):
        return None
    return torch.tensor([model.class_names.index(name) for name in names])


def measured(model, val, world: int) -> tuple[dict[str, float], Predictions | None]:
    """COCO's numbers in percent, of which every process finds its share, and what was found; of an RPN its recall."""
    if not model.reads_labels:
        return evaluate_proposals(model, val), None
    detector = as_detector(model)
    found = predict(detector, val) if world == 1 else predict_together(detector, val, None, distributed.host_group())
    return measure(val, found), found


def unsaid(out: Path, val, best: float, device: torch.device) -> Predictions | None:
    """What the best weights find, where evaluation/ does not say it: a run that was killed had not come to it."""
    try:
        if json.loads((out / "evaluation" / "metrics.json").read_text())["AP"] == best:
            return None
    except (OSError, ValueError, KeyError):
        pass
    with contextlib.suppress(ValueError, OSError):
        return measured(infer_model(out / BEST).to(device), val, 1)[1]


def report(out: Path, say: Callable[[str], None], val=None, found: Predictions | None = None) -> None:
    """curves.png and report.html, and in evaluation/ what was found on `val`; a failure to draw ends no run."""
    try:
        if found is not None:
            write_evaluation(out / "evaluation", val, found, about=dict(weights=BEST))
        training_report(out)
    except Exception as error:
        say(f"no report: {error or type(error).__name__}")
