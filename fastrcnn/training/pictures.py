"""What a recipe does to the pictures of a batch: transforms in the workers, and the size that the model resizes each to."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastrcnn.data.transforms import colour_jitter, crop_with_boxes, flip, large_scale_jitter, photometric
from fastrcnn.models.base_detector import BaseDetector
from fastrcnn.models.preprocess import resized_size
from fastrcnn.training.recipe import Recipe


def training_transforms(recipe: Recipe) -> nn.Module | None:
    """Of torchvision.transforms.v2, for the workers; None where nothing changes the pictures."""
    steps = []
    if recipe.photometric:
        steps.append(photometric())
    if recipe.colour_jitter:
        steps.append(colour_jitter(recipe.colour_jitter))
    if recipe.min_crop_size is not None:
        steps.append(crop_with_boxes(recipe.min_crop_size))
    if recipe.flip:
        steps.append(flip(recipe.flip))
    if recipe.lsj is not None:
        steps.append(large_scale_jitter(recipe.crop, recipe.lsj))
    if not steps:
        return None
    from torchvision.transforms import v2

    composed: nn.Module = v2.Compose(steps)
    return composed


def picture_sizes(
    model: BaseDetector, images: Sequence[Tensor], seeds: Sequence[int], recipe: Recipe | None
) -> list[tuple[int, int]]:
    """(height, width) that each picture is resized to, by its own seed; without a recipe by the model's rule alone."""
    if recipe is not None and recipe.lsj is not None:  # the transforms have made them as large as they shall be
        return [(x.shape[1], x.shape[2]) for x in images]
    p, sizes, scale = model.data_preprocessor, [], 1.0
    for image, seed in zip(images, seeds):
        if recipe is not None and recipe.multi_scale is not None:
            scale = random.Random(seed).uniform(*recipe.multi_scale)
        most = round(p.max_size * max(1.0, scale))
        height, width = image.shape[1:]
        sizes.append(resized_size(height, width, round(p.min_size * scale), most, p.profile.resize))
    return sizes


def smallest_batch(recipe: Recipe) -> list[tuple[int, int]]:
    """[(height, width)] that batches are padded to at least, so that a CUDA graph meets the same shape every time; crops of
    large-scale jitter alone are known beforehand."""
    return [(recipe.crop, recipe.crop)] if recipe.graphs and recipe.lsj is not None else []


def on_device(
    model: BaseDetector, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]], device: torch.device
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """(images, targets) of a batch where the model is, the targets checked on the way; labels count from 0. Copies from
    pinned memory, for which nobody waits."""
    if device.type == "cuda":
        images = [image.pin_memory() for image in images]
    images = [image.to(device, non_blocking=True) for image in images]
    return images, model.inside(model.outside(list(targets)), len(images), device)
