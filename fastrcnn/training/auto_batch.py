"""How many pictures fit on a GPU, and what is said where they do not."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fastrcnn.models.base_detector import BaseDetector
from fastrcnn.models.preprocess import resized_size
from fastrcnn.training.distributed import processes
from fastrcnn.training.recipe import Recipe
from fastrcnn.training.state import DTYPES, Losses, adapt

SHARE = 0.85  # of the memory that is free: numbers of objects differ, and so does what torch finds a place for
MOST = 256


def check_auto(recipe: Recipe, device: torch.device) -> None:
    """Raises ValueError where the number of pictures cannot be found out."""
    if device.type != "cuda":
        raise ValueError(f"batch: auto measures a GPU's memory, and the model is on {device}: say a number")
    if recipe.shard:
        raise ValueError("batch: auto measures a whole model, and this one is to be in shards: say a number")


def auto_batch(model: BaseDetector, recipe: Recipe, dataset, resumed: str | Path | None = None) -> int:
    """The largest number of pictures of `dataset` a process and step that fits, from the memory that one and that two of
    the largest size take; not more than there are. resumed: `out` of a run that goes on, which keeps its number.

    Every process asks before it knows of the others, and the least of their numbers is for all. Raises ValueError what
    `check_auto` raises, and torch.OutOfMemoryError where not one picture fits.
    """
    device = next(model.parameters()).device
    check_auto(recipe, device)
    if resumed is not None:
        folder = Path(resumed).expanduser()
        folder = folder.with_suffix("") if folder.suffix.lower() == ".safetensors" else folder
        if (folder / "config.json").is_file():
            return json.loads((folder / "config.json").read_text())["recipe"]["batch_size"]
    adapt(model, recipe)
    peaks: list[int] = []
    for count in (1, 2):
        try:
            peaks.append(_peak(model, recipe, dataset, count, device))
        except RuntimeError as error:
            found = out_of_memory(error, "batch auto", count, device)
            if not peaks or found is error:
                raise found from None
            peaks.append(2**63)
    torch.cuda.empty_cache()
    room = SHARE * (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))
    there_are = -(-len(dataset) // processes())
    return min(there_are, fitting(*peaks, room - kept_bytes(model, recipe)))


def kept_bytes(model: nn.Module, recipe: Recipe) -> int:
    """What a run keeps beside parameters and gradients: the optimizer's states, the average, and with several processes the
    buckets in which they sum gradients."""
    copies = (2 if recipe.optimizer == "AdamW" else 1) + (recipe.ema is not None) + (processes() > 1)
    return copies * sum(p.numel() * p.element_size() for p in model.parameters())


def fitting(one: int, two: int, room: float) -> int:
    """How many pictures fit in `room` bytes where one takes `one` and two take `two`; at least one."""
    return max(1, min(MOST, 1 + int((room - one) / max(1, two - one))))


def out_of_memory(error: RuntimeError, where: str, count: int, device: torch.device) -> RuntimeError:
    """The same with what to lower, where a device had too little memory; else as it came."""
    if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
        return error  # the second is the CPU's
    first = str(error).partition("\n")[0][:120]
    return torch.OutOfMemoryError(
        f"{where}: out of memory with {count} pictures a step on {device} ({first}). Lower the batch (--batch) or the "
        "pictures' size (--min-size, --max-size), or train in --precision bf16"
    )


def largest_sizes(model: BaseDetector, recipe: Recipe, dataset) -> tuple[tuple[int, int], tuple[int, int]]:
    """(height, width) of the largest picture as it is read, and of the largest batch: an epoch has one in which high and
    wide pictures meet."""
    p = model.data_preprocessor
    sizes = np.unique(np.asarray(getattr(dataset, "sizes", np.zeros((0, 2), np.int32))), axis=0)
    sizes = sizes[sizes.min(1, initial=1) > 0]  # of what can be read
    scale = max(1.0, (recipe.multi_scale or (1.0, 1.0))[1])
    low, most = round(p.min_size * scale), round(p.max_size * scale)
    if recipe.lsj is not None:
        return (recipe.crop, recipe.crop), (recipe.crop, recipe.crop)
    if not len(sizes):
        return (most, most), (most, most)
    picture = tuple(sizes[sizes.astype(np.int64).prod(1).argmax()].tolist())
    if recipe.min_crop_size is not None:  # a part may be of any shape
        return picture, (most, most)
    resized = np.array([resized_size(h, w, low, most, p.profile.resize) for h, w in sizes.tolist()])
    return picture, tuple(resized.max(0).tolist())


def _peak(model: BaseDetector, recipe: Recipe, dataset, count: int, device: torch.device) -> int:
    """Bytes that a forward and backward of `count` pictures take at most."""
    picture, side = largest_sizes(model, recipe, dataset)
    images = torch.zeros(count, model.data_preprocessor.in_channels, *picture, dtype=torch.uint8, device=device)
    target = dict(boxes=torch.tensor([[8.0, 8.0, 64.0, 64.0]] * 20, device=device),
                  labels=torch.zeros(20, dtype=torch.int64, device=device))  # fmt: skip
    cast = torch.autocast(device.type, DTYPES.get(recipe.precision), enabled=recipe.precision != "fp32")
    torch.cuda.reset_peak_memory_stats(device)
    was_training, kept = model.training, [b.clone() for b in model.buffers()]
    model.train()
    try:
        with cast:
            losses = Losses(model, recipe.graphs)(list(images), [target] * count, [side] * count, side)
        sum(losses.values()).backward()
        return torch.cuda.max_memory_allocated(device)
    finally:  # a look, which leaves no trace in the statistics of norms
        for b, before in zip(model.buffers(), kept):
            b.copy_(before)
        model.zero_grad(set_to_none=True)
        model.train(was_training)
