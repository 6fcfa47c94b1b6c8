"""Images from anywhere as uint8 [3, H, W] RGB tensors: files, addresses, PIL images, arrays, tensors."""

import glob
import urllib.request
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
TIMEOUT_S = 30


class ImageError(ValueError):
    """An image that cannot be read; the message names it and says why."""


def _decode(data: bytes, name: str) -> Tensor:
    from torchvision.io import ImageReadMode, decode_image

    if not data:
        raise ImageError(f"{name}: the file is empty")
    buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    try:
        image = decode_image(buffer, ImageReadMode.RGB, apply_exif_orientation=True)
    except RuntimeError as error:
        return _decode_with_pillow(data, name, str(error).splitlines()[0].rsplit(", ", 1)[-1])
    if image.dtype != torch.uint8:  # 16-bit PNG
        image = (image.to(torch.int32) >> 8).to(torch.uint8)
    return image[0] if image.dim() == 4 else image  # the first frame of a GIF


def _decode_with_pillow(data: bytes, name: str, reason: str) -> Tensor:
    """Formats that torchvision does not know (BMP, TIFF) where Pillow is installed."""
    import io

    if data[:2] == b"\xff\xd8" or data[:8] == b"\x89PNG\r\n\x1a\n":
        raise ImageError(f"{name}: damaged image ({reason})")
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise ImageError(f"{name}: not an image that torchvision reads ({reason}); other formats need pillow") from None
    try:
        return as_image(ImageOps.exif_transpose(Image.open(io.BytesIO(data))), name)
    except ImageError:
        raise
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise ImageError(f"{name}: not a readable image ({error})") from None


def read_image(source: str | Path) -> Tensor:
    """uint8 [3, H, W] RGB from a file or an http(s) address, turned as its EXIF orientation says. Raises ImageError."""
    name = str(source)
    try:
        if name.startswith(("http://", "https://")):
            with urllib.request.urlopen(name, timeout=TIMEOUT_S) as response:
                data = response.read()
        else:
            data = Path(source).read_bytes()
    except OSError as error:  # also URLError and time-outs
        raise ImageError(f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    return _decode(data, name)


def as_image(source, name: str = "image") -> Tensor:
    """uint8 [3, H, W] RGB from a path, an address, a PIL image, an array or a tensor.

    Arrays are [H, W, 3] or [H, W] (grey), uint8 or float in 0..1; tensors [3, H, W] or [1, H, W], likewise.
    Raises ImageError, TypeError or ValueError naming what came.
    """
    if isinstance(source, str | Path):
        return read_image(source)
    if hasattr(source, "convert") and hasattr(source, "getexif"):  # a PIL image, without importing PIL
        if source.mode.startswith("I;16"):
            source = (np.array(source) >> 8).astype(np.uint8)
            return as_image(source, name)
        source = np.array(source.convert("RGB"))
    if isinstance(source, np.ndarray):
        array = source[..., None].repeat(3, -1) if source.ndim == 2 else source
        if array.ndim != 3 or array.shape[-1] not in (1, 3):
            raise ValueError(f"{name}: expected an array [H, W, 3] or [H, W], got {list(source.shape)}")
        source = torch.from_numpy(np.ascontiguousarray(array)).permute(2, 0, 1)
    if not isinstance(source, Tensor):
        raise TypeError(f"{name}: expected a path, an address, a PIL image, an array or a tensor, got "
                        f"{type(source).__name__}")  # fmt: skip
    if source.dim() != 3 or source.shape[0] not in (1, 3) or 0 in source.shape:
        raise ValueError(f"{name}: expected a tensor [3, H, W] or [1, H, W], got {list(source.shape)}")
    if source.is_floating_point():
        source = (source * 255.0).round().clamp(0, 255)
    elif source.dtype != torch.uint8:
        raise TypeError(f"{name}: expected uint8 or floats in 0..1, got {source.dtype}")
    return source.to(torch.uint8).expand(3, -1, -1)


def list_images(source: str | Path) -> list[str]:
    """The image files of a folder (by suffix, not recursive), a glob pattern, or the file or address itself; sorted."""
    text = str(source)
    if text.startswith(("http://", "https://")):
        return [text]
    path = Path(text).expanduser()
    if path.is_dir():
        return sorted(str(p) for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not path.exists() and glob.has_magic(text):
        return sorted(glob.glob(str(path), recursive=True))
    return [str(path)]
