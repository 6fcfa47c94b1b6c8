"""Images of different sizes to one normalised, padded batch, resized bilinearly by one of three rules.

"opencv" (MMDetection): cv2.resize on bytes: 11-bit weights, sums rounded twice; then (byte - mean) / std.
"interpolate" (torchvision): (value in 0..1 - mean) / std, then torch's interpolation of floats.
"pillow" (Detectron2): PIL's resize on bytes, antialiased: a triangle as wide as the reduction with 22-bit weights,
columns first and rounded to bytes (Pillow 13 takes the rows first where that is less work); then (byte - mean) / std.
The bytes are the peer's bit for bit, and so are the floats of "interpolate", but for the last bit where torch's CPU kernel
sums in another order: small results, height + width <= 128, or a single thread. mean and std are in the network's channel
order. float64 images are normalised and interpolated in float64, all others in float32.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastrcnn.ops._bind import bind, declare
from fastrcnn.ops._checks import (
    FLOATING,
    check_choice,
    check_flag,
    check_int,
    check_numbers,
    check_same_device,
)

RULES = ("opencv", "interpolate", "pillow")
PILLOW_BITS = 22
MOST = 2**24 - 1  # pixels of a side: a float32 holds every coordinate


def _opencv_taps(size: int, new: int, device, columns: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Neighbours and the 11-bit weight of the second, for one axis of OpenCV's 8-bit bilinear resize."""
    at = ((torch.arange(new, dtype=torch.float64) + 0.5) * (1.0 / (new / size)) - 0.5).float()
    low = torch.floor(at)
    frac = at - low
    if columns:
        frac[(low < 0) | (low >= size - 1)] = 0.0
    low = low.long()
    weight = torch.round(frac * 2048).to(torch.int32)
    return low.clamp(0, size - 1).to(device), (low + 1).clamp(0, size - 1).to(device), weight.to(device)


def resize_opencv(image: Tensor, size: tuple[int, int]) -> Tensor:
    """cv2.resize(..., INTER_LINEAR) on uint8 [C, H, W], bit for bit: 11-bit weights, and 32-bit sums rounded twice."""
    if tuple(image.shape[1:]) == tuple(size):
        return image
    x0, x1, wx = _opencv_taps(image.shape[2], size[1], image.device, True)
    y0, y1, wy = _opencv_taps(image.shape[1], size[0], image.device, False)
    rows = image.to(torch.int32)
    rows = rows[:, :, x0] * (2048 - wx) + rows[:, :, x1] * wx  # [C, H, new_w], scaled by 2^11
    rows >>= 4
    top = (rows[:, y0] * (2048 - wy)[:, None]) >> 16
    bottom = (rows[:, y1] * wy[:, None]) >> 16
    return ((top + bottom + 2) >> 2).clamp(0, 255).to(torch.uint8)


def _pillow_pass(image: Tensor, new: int) -> Tensor:
    """One pass of Pillow's 8-bit resize along the last axis: int32 bytes [..., size] -> [..., new]."""
    size = image.shape[-1]
    scale = size / new
    support = max(scale, 1.0)
    centre = (torch.arange(new, dtype=torch.float64) + 0.5) * scale
    first = (centre - support + 0.5).long().clamp(min=0)
    end = (centre + support + 0.5).long().clamp(max=size)
    at = first[:, None] + torch.arange(int((end - first).max()))  # [new, taps]
    part = (1.0 - ((at - centre[:, None] + 0.5) * (1.0 / support)).abs()).clamp(min=0.0)
    part[at >= end[:, None]] = 0.0
    total = part.cumsum(1)[:, -1:]  # one after another, as Pillow adds them
    weights = (part / total * (1 << PILLOW_BITS) + 0.5).to(torch.int32).to(image.device)
    at = at.clamp(max=size - 1).to(image.device)
    out = torch.full((*image.shape[:-1], new), 1 << (PILLOW_BITS - 1), dtype=torch.int32, device=image.device)
    for k in range(at.shape[1]):
        out += image[..., at[:, k]] * weights[:, k]
    return (out >> PILLOW_BITS).clamp(0, 255)


def resize_pillow(image: Tensor, size: tuple[int, int]) -> Tensor:
    """PIL's Image.resize(..., BILINEAR) on uint8 [C, H, W], bit for bit."""
    rows = _pillow_pass(image.to(torch.int32), size[1])
    return _pillow_pass(rows.transpose(1, 2), size[0]).transpose(1, 2).to(torch.uint8)


def _to_uint8(image: Tensor) -> Tensor:
    return image if image.dtype == torch.uint8 else (image * 255.0).round().clamp(0, 255).to(torch.uint8)


def _op_reference(
    images: Sequence[Tensor],
    sizes: Sequence[int],
    height: int,
    width: int,
    mean: Sequence[float],
    std: Sequence[float],
    resize: str,
    bgr: bool,
    dtype: torch.dtype,
) -> Tensor:
    batch = torch.zeros(len(images), height, width, 3, dtype=dtype, device=images[0].device).permute(0, 3, 1, 2)
    for i, image in enumerate(images):
        size = sizes[2 * i], sizes[2 * i + 1]
        if resize == "opencv":
            image = resize_opencv(_to_uint8(image), size).float()
        elif resize == "pillow":
            image = resize_pillow(_to_uint8(image), size).float()
        elif image.dtype == torch.uint8:
            image = image.float() / 255.0
        if bgr:
            image = image.flip(0)
        image = (image - image.new_tensor(mean)[:, None, None]) / image.new_tensor(std)[:, None, None]
        if resize == "interpolate":
            image = F.interpolate(image[None], size, mode="bilinear", align_corners=False)[0]
        batch[i, :, : size[0], : size[1]] = image
    return batch


def _fake(images, sizes, height, width, mean, std, resize, bgr, dtype):
    return images[0].new_empty(len(images), height, width, 3, dtype=dtype).permute(0, 3, 1, 2)


declare("preprocess", _op_reference, _fake)


def check_images(images: Sequence[Tensor], channels: int = 3) -> None:
    """[C, H, W] each, uint8 or floating point, on one device. Raises TypeError or ValueError naming the image."""
    if not isinstance(images, (list, tuple)):
        raise TypeError(f"images: expected a list of tensors [3, H, W], got {type(images).__name__}")
    if len(images) == 0:
        raise ValueError("images: expected at least one image, got none")
    for i, image in enumerate(images):
        dense = isinstance(image, Tensor) and image.layout == torch.strided
        fits = dense and image.dim() == 3 and image.shape[0] == channels
        if not fits or not all(1 <= n <= MOST for n in image.shape[1:]):
            got = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise ValueError(
                f"images[{i}]: expected a dense tensor [{channels}, H, W] of 1 to {MOST} rows and columns, got {got}"
            )
        if image.dtype != torch.uint8 and image.dtype not in FLOATING:
            raise TypeError(f"images[{i}]: expected float in 0..1 or uint8, got {image.dtype}")
    if any(image.device != images[0].device for image in images):
        check_same_device(**{f"images[{i}]": image for i, image in enumerate(images)})


def _check_size(name: str, size, most: tuple[int, int]) -> list[int]:
    if not isinstance(size, (list, tuple)):
        raise TypeError(f"{name}: expected (height, width), got {type(size).__name__} {size!r}")
    if len(size) != 2:
        raise ValueError(f"{name}: expected (height, width), got {tuple(size)}")
    return [check_int(f"{name}[{k}]", size[k], 1, most[k]) for k in range(2)]


def _preprocess(
    op,
    images: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
    batch_size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    resize: str = "opencv",
    bgr: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """[B, C, H', W'] channels-last in `dtype`, zero right of and below each image. Not differentiable.

    images: [C, H, W] each (3: RGB), uint8 or float in 0..1, of any sizes and strides (an [H, W, 3] array permuted is read
    as it lies), on one device; sizes: (height, width) of each after resizing; batch_size: (H', W'); mean, std: C, in
    the network's channel order and value range (0..1 for "interpolate", else 0..255); resize: "opencv", "interpolate" or
    "pillow"; bgr: the network wants blue first. Raises TypeError or ValueError naming the argument.
    """
    mean, std = (values.tolist() if isinstance(values, np.ndarray) else values for values in (mean, std))
    told = all(isinstance(values, (list, tuple)) for values in (mean, std)) and len(mean) == len(std) > 0
    channels = len(mean) if told else 3
    numbers = check_numbers("mean", mean, channels), check_numbers("std", std, channels)
    check_images(images, channels)
    images = list(images)
    height, width = _check_size("batch_size", batch_size, (MOST, MOST))
    if not isinstance(sizes, (list, tuple)) or len(sizes) != len(images):
        got = len(sizes) if isinstance(sizes, (list, tuple)) else type(sizes).__name__
        raise ValueError(f"sizes: expected a list with (height, width) of each of {len(images)} images, got {got}")
    flat = [n for i, size in enumerate(sizes) for n in _check_size(f"sizes[{i}]", size, (height, width))]
    rules = check_choice("resize", resize, RULES), check_flag("bgr", bgr)
    if dtype not in FLOATING:
        raise TypeError(f"dtype: expected a floating point type, got {dtype}")
    for i, image in enumerate(images):
        if image.dtype in (torch.float16, torch.bfloat16):
            images[i] = image.float()
        elif image.dtype == torch.float64 and resize != "interpolate":
            images[i] = _to_uint8(image)
    if channels != 3 and bgr:
        raise ValueError(f"bgr: expected False for images of {channels} channels, whose order is their own")
    with torch.no_grad():
        if channels == 3:
            return op(images, flat, height, width, *numbers, *rules, dtype)
        batches = []
        for first in range(0, channels, 3):  # the kernels take three channels: others go through them three by three
            three = [min(first + k, channels - 1) for k in range(3)]
            some = [[values[c] for c in three] for values in numbers]
            batches.append(op([image[three] for image in images], flat, height, width, *some, *rules, dtype))
        return torch.cat(batches, 1)[:, :channels].contiguous(memory_format=torch.channels_last)


preprocess = bind(_preprocess, torch.ops.fastrcnn.preprocess.default, "preprocess")
preprocess_reference = bind(_preprocess, _op_reference, "preprocess_reference")
