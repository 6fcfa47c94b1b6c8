"""Images from anywhere as uint8 [3, H, W] RGB tensors: files, addresses, PIL images, arrays, tensors."""

import glob
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastrcnn.data.decode import IMAGE_SUFFIXES, decode, in_range, max_bytes, pixels_of, planes_of, size_of
from fastrcnn.data.fetch import open_regular, read_bytes
from fastrcnn.data.folders import files_under


class ImageError(ValueError):
    """An image that cannot be read; the message names it and says why."""


def read_image(source: str | os.PathLike, channels: int | None = 3) -> Tensor:
    """uint8 [3, H, W] RGB from a file or an http(s) address, turned as its EXIF orientation says; an alpha channel is
    dropped.

    Of other `channels` (None: as many as there are) [C, H, W], uint8, or float32 in 0..1 where the file has 16 bits a
    value or floats: 1 is grey, 2 grey with alpha, 4 RGBA or CMYK, others the grey frames of a TIFF; an array [H, W, C]
    in a .npy file has any.

    Raises ImageError, also for what is no regular file, for more pixels than `fastrcnn.data.decode.max_pixels`, and
    for an address whose answer takes longer than 30 s.
    """
    return _read(source, lambda name: read_bytes(name, max_bytes()), lambda data: decode(data, channels))


def read_size(path: str | os.PathLike) -> tuple[int, int]:
    """(height, width) of what `read_image` gives of a file, from its head alone. Raises ImageError likewise."""
    return _read(path, open_regular, size_of)


def read_stored_size(path: str | os.PathLike) -> tuple[int, int]:
    """(height, width) of a picture as it lies in its file, before its EXIF orientation turns it. Raises ImageError."""
    return _read(path, open_regular, lambda file: size_of(file, turned=False))


def _read(source: str | os.PathLike, fetch, look):
    name = os.fsdecode(source)
    try:
        found = fetch(name)
    except (OSError, ValueError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or str(error) or "there is no memory for it"
        raise ImageError(f"{name}: cannot be read ({reason})") from None
    try:
        return look(found)
    except (ValueError, TypeError) as error:
        raise ImageError(f"{name}: {error}") from None


def as_image(source, name: str = "image", channels: int = 3) -> Tensor:
    """uint8 [3, H, W] RGB from a path, an address, the bytes of a file, a PIL image, an array or a tensor.

    Arrays are [H, W, 3] in the order red, green, blue (cv2's are the other way round: `array[..., ::-1]`), [H, W, 4]
    (the alpha channel is dropped) or [H, W] (grey); tensors [3, H, W], [4, H, W] or [1, H, W]. Values are uint8,
    uint16 (of which the high byte counts) or float in 0..1. Of other `channels` than three: arrays [H, W, C], tensors
    [C, H, W], files as in `read_image`, and every bit counts. A PIL image is turned as its EXIF orientation says, like
    the same file. Raises ImageError, TypeError or ValueError naming what came.
    """
    if isinstance(source, str | os.PathLike):
        return read_image(source, channels)
    try:
        if isinstance(source, bytes):
            try:
                return decode(source, channels)
            except (TypeError, ValueError) as error:
                raise ImageError(str(error)) from None
        if hasattr(source, "convert") and hasattr(source, "getexif"):  # a PIL image, without importing PIL
            try:
                return pixels_of(source, channels)
            except Exception as error:  # one that is decoded only now may be damaged in many ways
                raise ImageError(" ".join(str(error).split()) or type(error).__name__) from None
        if isinstance(source, np.ndarray):
            return planes_of(source, channels)
        if isinstance(source, Tensor):
            return _from_tensor(source, channels)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None
    raise TypeError(
        f"{name}: expected a path, an address, bytes, a PIL image, an array or a tensor, got {type(source).__name__}"
    )


def _from_tensor(tensor: Tensor, channels: int) -> Tensor:
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        raise TypeError("expected a dense tensor with values")
    if channels != 3:
        if tensor.dim() != 3 or tensor.shape[0] != channels or 0 in tensor.shape:
            raise ValueError(f"expected a tensor [{channels}, H, W], got {list(tensor.shape)}")
        if tensor.dtype == torch.uint16:
            return tensor.detach().float() / 65535
        if tensor.dtype != torch.uint8 and not tensor.is_floating_point():
            raise TypeError(f"expected uint8, uint16 or floats in 0..1, got {tensor.dtype}")
        return in_range(tensor.detach())
    if tensor.dim() != 3 or tensor.shape[0] not in (1, 3, 4) or 0 in tensor.shape:
        raise ValueError(f"expected a tensor [3, H, W], [4, H, W] or [1, H, W], got {list(tensor.shape)}")
    tensor = tensor.detach()[:3]
    if tensor.is_floating_point():
        tensor = (tensor if tensor.dtype == torch.float64 else tensor.float()).mul(255).round()
        low, high = (v.item() for v in tensor.aminmax())
        if not (low >= 0 and high <= 255):  # NaN is neither
            raise ValueError(f"expected floats in 0..1, got {low / 255:.4g} to {high / 255:.4g}")
    elif tensor.dtype == torch.uint16:
        tensor = tensor.to(torch.int32) >> 8
    elif tensor.dtype != torch.uint8:
        raise TypeError(f"expected uint8, uint16 or floats in 0..1, got {tensor.dtype}")
    return tensor.to(torch.uint8).expand(3, -1, -1)


def list_images(
    source: str | os.PathLike[str],
    recursive: bool = False,
    wanted: Callable[[str], bool] | None = None,
) -> list[str]:
    """The image files of a folder (by suffix; recursive: of its sub-folders, too), a glob pattern, or the file or address
    itself; sorted. What is not there, or may not be looked into, is given as it is: reading it says what is wrong.
    wanted: which names of a folder count (default: those of images)."""
    text = os.fsdecode(source)
    if "://" in text:
        return [text]
    path, wanted = Path(os.path.expanduser(text)), wanted or is_image
    try:
        if path.is_dir() and recursive:
            return [str(path / name) for name in sorted(files_under(path)) if wanted(name)]
        if path.is_dir():
            return sorted(str(p) for p in path.iterdir() if wanted(p.name) and p.is_file())
        if not path.exists() and glob.has_magic(text):
            return sorted(glob.glob(str(path), recursive=True))
    except (OSError, ValueError):
        pass
    return [str(path)]


def is_image(name: str) -> bool:
    """Whether a name is that of a picture, by its suffix."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
