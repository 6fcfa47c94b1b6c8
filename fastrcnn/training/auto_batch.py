"""How many pictures fit on a GPU."""

import torch

from fastrcnn.models.base_detector import BaseDetector
from fastrcnn.training.recipe import Recipe
from fastrcnn.training.state import DTYPES, Losses, adapt

SHARE = 0.85  # of the device's memory: pictures and their objects differ
MOST = 256


def auto_batch(model: BaseDetector, recipe: Recipe) -> int:
    """The largest number of pictures a step that fits, from the memory that one and that two of the largest size take.
    Raises ValueError on a device that is no CUDA GPU."""
    device = next(model.parameters()).device
    if device.type != "cuda":
        raise ValueError(f"batch: auto measures a GPU's memory, and the model is on {device}: say a number")
    adapt(model, recipe)
    one, two = (_peak(model, recipe, count, device) for count in (1, 2))
    total = torch.cuda.get_device_properties(device).total_memory
    states = 3 * 4 * sum(p.numel() for p in model.parameters())  # momentum or two of AdamW's, and the average
    return fitting(one, two, total * SHARE - states)


def fitting(one: int, two: int, room: float) -> int:
    """How many pictures fit in `room` bytes where one takes `one` and two take `two`; at least one."""
    return max(1, min(MOST, 1 + int((room - one) / max(1, two - one))))


def _peak(model: BaseDetector, recipe: Recipe, count: int, device: torch.device) -> int:
    p = model.data_preprocessor
    scale = max(1.0, (recipe.multi_scale or (1.0, 1.0))[1])
    side = (recipe.crop, recipe.crop) if recipe.lsj else (round(p.min_size * scale), round(p.max_size * scale))
    image = torch.zeros(3, *side, dtype=torch.uint8, device=device)
    target = dict(boxes=torch.tensor([[8.0, 8.0, 64.0, 64.0]] * 20, device=device),
                  labels=torch.zeros(20, dtype=torch.int64, device=device))  # fmt: skip
    cast = torch.autocast(device.type, DTYPES.get(recipe.precision), enabled=recipe.precision != "fp32")
    torch.cuda.reset_peak_memory_stats(device)
    was_training, kept = model.training, [b.clone() for b in model.buffers()]
    model.train()
    try:
        with cast:
            losses = Losses(model)([image] * count, [target] * count, [side] * count, side)
        sum(losses.values()).backward()
    finally:  # a look, which leaves no trace in the statistics of norms
        for b, before in zip(model.buffers(), kept):
            b.copy_(before)
        model.zero_grad(set_to_none=True)
        model.train(was_training)
    return torch.cuda.max_memory_allocated(device)
