"""Bytes of a picture to pixels: which decoder reads what, how large a picture may be, turning, 8 bits a value.

JPEG is read by torchvision as long as it has a decoder (it is quicker than Pillow's and gives the same pixels), all
else by Pillow, whose decoders are fuzzed in public: torchvision's PNG decoder ends the process on damaged files.
"""

import io
import math
import os

import numpy as np
import torch
from torch import Tensor

# Pillow's decoders that run no other program and need no other file, with the suffixes of their files.
SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif", ".avifs"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
}
IMAGE_SUFFIXES = tuple(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
ORIENTATION, TILE_WIDTH, TILE_HEIGHT = 0x0112, 0x0142, 0x0143  # tags of EXIF and TIFF
# EXIF orientation -> (transposed, sides then flipped) of a picture [3, H, W]
TURNS = {2: (False, [2]), 3: (False, [1, 2]), 4: (False, [1]), 5: (True, []), 6: (True, [2]), 7: (True, [1, 2]),
         8: (True, [1])}  # fmt: skip
BYTES_A_PIXEL = 4  # of a file, at most
MOST_SCANS = 100  # of a JPEG; encoders write ten, and 40 bytes of a scan cost a pass over every pixel


class OtherChannelsError(ValueError):
    """A picture that is whole, with other channels than were asked for."""


class TooManyPixelsError(ValueError):
    """A picture of more pixels than are allowed, of which none was decoded."""


def max_pixels() -> float:
    """How many pixels a picture may have, 89 million where nobody says otherwise: Pillow's own limit,
    `PIL.Image.MAX_IMAGE_PIXELS` (None: no limit), or what the environment variable FASTRCNN_MAX_PIXELS says.

    Raises ValueError where the variable is no number above 0.
    """
    from PIL import Image

    if said := os.environ.get("FASTRCNN_MAX_PIXELS"):
        if not (said.isdecimal() and int(said)):
            raise ValueError(f"FASTRCNN_MAX_PIXELS: expected a whole number above 0, got {said!r}")
        Image.MAX_IMAGE_PIXELS = int(said)
    return math.inf if Image.MAX_IMAGE_PIXELS is None else Image.MAX_IMAGE_PIXELS


def max_bytes() -> float:
    """How long the file of a picture may be: four bytes for every pixel that it may have."""
    return BYTES_A_PIXEL * max_pixels()


def decode(data: bytes, channels: int | None = 3) -> Tensor:
    """uint8 [3, H, W] RGB of the bytes of a picture, the first of several, turned as its EXIF orientation says; an
    alpha channel is dropped. Of other channels, see `read_image`. Raises ValueError with the reason where they cannot
    be read."""
    if not data:
        raise ValueError("the file is empty")
    if data.startswith(b"\x93NUMPY"):
        return planes_of(_array(data), channels)
    return _opened(io.BytesIO(data), lambda image: _pixels(image, data, channels))


def size_of(file, turned: bool = True) -> tuple[int, int]:
    """(height, width) of what `decode` would give of an open binary file, or, not turned, as it is stored; only the
    head is read, and the file then closed. Raises ValueError likewise."""
    with file:
        if file.read(6) == b"\x93NUMPY":
            file.seek(0)
            return _array_head(file)[:2]
        file.seek(0)
        return _opened(file, lambda image: image.size if turned and _turn(image)[0] else image.size[::-1])


def _opened(file, look):
    """look(PIL image) of a binary file; raises ValueError with the reason where it cannot be read."""
    from PIL import Image, UnidentifiedImageError

    max_pixels()
    try:
        with Image.open(file, formats=tuple(SUFFIXES)) as image:
            check_size(image)
            return look(image)
    except OtherChannelsError:
        raise
    except UnidentifiedImageError:
        raise ValueError(f"not an image, or a damaged one (expected {', '.join(SUFFIXES)})") from None
    except Image.DecompressionBombError as error:
        raise TooManyPixelsError(f"{error} The limit is PIL.Image.MAX_IMAGE_PIXELS or FASTRCNN_MAX_PIXELS") from None
    except MemoryError:
        raise ValueError("there is no memory for its pixels") from None
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise ValueError(f"damaged image ({' '.join(str(error).split()) or type(error).__name__})") from None


def _pixels(image, data: bytes, channels: int | None) -> Tensor:
    jpeg = image.format in ("JPEG", "MPO")
    if jpeg and data.count(b"\xff\xda") > MOST_SCANS:
        raise ValueError(f"more than {MOST_SCANS} scans")
    if channels != 3:
        return pixels_of(image, channels)
    pixels = _jpeg(data) if jpeg else None
    return pixels_of(image) if pixels is None else _turned(pixels, image)


def check_size(image) -> None:
    """Raises DecompressionBombError for a PIL image of more pixels than `max_pixels`, before any is decoded: also
    where the tiles of a TIFF are larger than the picture."""
    from PIL import Image

    sizes = [image.size]
    tags = getattr(image, "tag_v2", {})
    if TILE_WIDTH in tags and TILE_HEIGHT in tags:
        sizes.append((tags[TILE_WIDTH], tags[TILE_HEIGHT]))
    for width, height in sizes:
        if width * height > max_pixels():
            raise Image.DecompressionBombError(
                f"{width} x {height} pixels are more than the limit of {max_pixels():,}."
            )


def _jpeg(data: bytes) -> Tensor | None:
    """torchvision's decoder; None where it does not take the file, or is no longer there."""
    try:
        from torchvision.io import ImageReadMode, decode_jpeg

        return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    except (ImportError, RuntimeError):
        return None


def _array_head(file) -> tuple[int, ...]:
    """The shape [H, W] or [H, W, C] of a .npy file, from its head; raises ValueError where it is none, or as long as it
    does not say, or holds objects."""
    try:
        version = np.lib.format.read_magic(file)
        header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, _, dtype = header(file)
        begin, end = file.tell(), file.seek(0, os.SEEK_END)
        if dtype.hasobject or math.prod(shape) * dtype.itemsize != end - begin:
            raise ValueError("its length is not that of its shape")
        if len(shape) not in (2, 3):
            raise ValueError(f"expected [H, W] or [H, W, C], got {list(shape)}")
        if shape[0] * shape[1] > max_pixels():
            raise TooManyPixelsError(f"{shape} is more than {max_pixels():,} pixels")
        return shape
    except TooManyPixelsError:
        raise
    except Exception as error:  # numpy raises many kinds for damaged files
        raise ValueError(f"damaged array ({' '.join(str(error).split()) or type(error).__name__})") from None


def _array(data: bytes) -> np.ndarray:
    _array_head(io.BytesIO(data))
    try:
        return np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:
        raise ValueError(f"damaged array ({' '.join(str(error).split()) or type(error).__name__})") from None


def planes_of(array: np.ndarray, channels: int | None) -> Tensor:
    """[C, H, W] of an array [H, W, C], or [H, W] of one channel: uint8 as it is, else float32: uint16 as parts of
    65535, floats in 0..1. Of three channels `bytes_of`. Raises TypeError or ValueError saying what came."""
    if channels == 3:
        return bytes_of(array)
    array = array[:, :, None] if array.ndim == 2 else array
    if array.ndim != 3 or 0 in array.shape or (channels is not None and array.shape[2] != channels):
        raise ValueError(f"expected {channels} channels, got an array {list(array.shape)}")
    return in_range(torch.from_numpy(np.ascontiguousarray(_native(array)).transpose(2, 0, 1)))


def _native(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind not in "uf" or array.dtype.itemsize > 8 or (array.dtype.kind == "u" and array.itemsize > 2):
        raise TypeError(f"expected uint8, uint16 or floats in 0..1, got {array.dtype}")
    if array.dtype == np.uint8:
        return array
    with np.errstate(over="ignore"):
        return array.astype(np.float32) / np.float32(65535 if array.dtype.kind == "u" else 1)


def in_range(pixels: Tensor) -> Tensor:
    """The same, where it is uint8 or floats in 0..1; else raises ValueError."""
    if pixels.is_floating_point():
        low, high = (v.item() for v in pixels.aminmax())
        if not (low >= 0 and high <= 1):  # NaN is neither
            raise ValueError(f"expected floats in 0..1, got {low:.4g} to {high:.4g}")
    return pixels


CHANNELS = {"1": 1, "L": 1, "P": 3, "RGB": 3, "LA": 2, "RGBA": 4, "CMYK": 4, "I": 1, "F": 1}


def _planes(image, channels: int | None) -> Tensor:
    """A PIL image with so many channels (None: its own): grey of any, LA as 2, RGBA and CMYK as 4, and the frames of a
    file of grey ones. 16 bits a value are kept, as floats."""
    frames, own = getattr(image, "n_frames", 1), CHANNELS.get(image.mode, 1)
    if channels not in (None, 1) and frames == channels and own == 1:
        found = []
        for k in range(frames):
            image.seek(k)
            check_size(image)
            found.append(_planes(image, 1))
        if any(frame.shape != found[0].shape or frame.dtype != found[0].dtype for frame in found):
            raise ValueError("its frames are of several sizes or types")
        return torch.cat(found)
    wanted = own if channels is None else channels
    if wanted == 1 and (image.mode == "I" or image.mode.startswith("I;16") or image.mode == "F"):
        array = _sixteen(image) if image.mode == "I" else np.asarray(image)
    elif wanted == 1:
        array = np.array(image.convert("L"))
    elif wanted == 3:
        array = np.array(image.convert("RGB"))
    elif wanted == own:
        array = np.array(image)
    else:
        raise OtherChannelsError(f"expected {wanted} channels, got {own} (mode {image.mode}, frames: {frames})")
    return _turned(planes_of(array, None), image)


def _sixteen(image) -> np.ndarray:
    """16 bits in Pillow's 32."""
    array = np.array(image)
    if array.min() < 0 or array.max() > 0xFFFF or 0 < array.max() <= 0xFF:
        raise ValueError(f"expected 16-bit values in mode I, got {array.min()} to {array.max()}: "
                         "convert the picture to mode L or I;16")  # fmt: skip
    return array.astype(np.uint16)


def pixels_of(image, channels: int | None = 3) -> Tensor:
    """uint8 [3, H, W] RGB of a PIL image, turned as its EXIF orientation says. 16 bits a value keep their high byte,
    floats are 0..1. Raises ValueError where the values are not in such a range, and whatever Pillow raises while it
    decodes."""
    check_size(image)
    if channels != 3:
        return _planes(image, channels)
    if image.mode == "I":
        array = _sixteen(image)
    elif image.mode.startswith("I;16") or image.mode == "F":
        array = np.asarray(image)
    elif image.mode in ("1", "L", "LA"):
        array = np.array(image.convert("L"))
    else:
        array = np.array(image if image.mode == "RGB" else image.convert("RGB"))
    return _turned(bytes_of(array), image)


def _turn(image) -> tuple[bool, list[int]]:
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception:  # damaged EXIF data in a picture that is whole
        orientation = None
    return TURNS.get(orientation, (False, []))


def _turned(pixels: Tensor, image) -> Tensor:
    transposed, sides = _turn(image)
    pixels = pixels.transpose(1, 2) if transposed else pixels
    return pixels.flip(sides) if sides else pixels


def bytes_of(array: np.ndarray) -> Tensor:
    """uint8 [3, H, W] of an array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] (the alpha channel is dropped), uint8,
    uint16 (its high byte) or float in 0..1. Raises TypeError or ValueError saying what came."""
    if array.dtype.kind not in "uf" or array.dtype.itemsize > 8 or (array.dtype.kind == "u" and array.itemsize > 2):
        raise TypeError(f"expected uint8, uint16 or floats in 0..1, got {array.dtype}")
    if array.ndim not in (2, 3) or 0 in array.shape or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ValueError(f"expected an array [H, W, 3], [H, W, 4] or [H, W], got {list(array.shape)}")
    array = array[:, :, None] if array.ndim == 2 else array[:, :, :3]
    if array.dtype.kind == "f":
        with np.errstate(all="ignore"):
            array = np.round(array * np.float32(255) if array.itemsize < 4 else array * 255)
        if not (array.min() >= 0 and array.max() <= 255):  # NaN is neither
            raise ValueError(f"expected floats in 0..1, got {array.min() / 255:.4g} to {array.max() / 255:.4g}")
    elif array.itemsize == 2:
        array = array >> 8
    array = np.ascontiguousarray(array, dtype=np.uint8)
    return torch.from_numpy(array).permute(2, 0, 1).expand(3, -1, -1)
