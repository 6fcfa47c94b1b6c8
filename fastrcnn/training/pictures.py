"""What a recipe does to the pictures of a batch: transforms in the workers, and the size that the model resizes each to."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from fastrcnn.models.base_detector import BaseDetector
from fastrcnn.models.preprocess import resized_size
from fastrcnn.training.recipe import Recipe


def training_transforms(recipe: Recipe):
    """Of torchvision.transforms.v2; None where nothing changes the pictures."""
    from torchvision.transforms import v2

    steps = []
    if recipe.photometric:
        steps.append(v2.ColorJitter(brightness=0.125, contrast=0.2, saturation=0.2, hue=0.02))
    if recipe.flip:
        steps.append(v2.RandomHorizontalFlip(recipe.flip))
    return v2.Compose(steps) if steps else None


def picture_sizes(model: BaseDetector, images: Sequence[Tensor], seeds: Sequence[int], recipe: Recipe):
    """(height, width) that each picture is resized to, by its own seed; None leaves it to the model."""
    if recipe.lsj is not None:  # the transforms have made them as large as they shall be
        return [tuple(x.shape[1:]) for x in images]
    if recipe.multi_scale is None:
        return None
    p, sizes = model.data_preprocessor, []
    for image, seed in zip(images, seeds):
        scale = random.Random(seed).uniform(*recipe.multi_scale)
        most = round(p.max_size * max(1.0, scale))
        sizes.append(resized_size(*image.shape[1:], round(p.min_size * scale), most, p.profile.resize))
    return sizes


def on_device(model: BaseDetector, images: Sequence[Tensor], targets: Sequence[dict], device: torch.device):
    """(images, targets) of a batch where the model is, the targets checked on the way; labels count from 0. Copies from
    pinned memory, for which nobody waits."""
    if device.type == "cuda":
        images = [image.pin_memory() for image in images]
    images = [image.to(device, non_blocking=True) for image in images]
    return images, model.inside(model.outside(targets), len(images), device)
