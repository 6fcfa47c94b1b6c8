"""Videos as frames, and drawn frames as a video, a few at a time: memory does not grow with the length."""

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torch
from torch import Tensor

from fastrcnn.data.fetch import is_address
from fastrcnn.data.images import ImageError

SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ts", ".ogv")
PIECE = 8  # frames that are decoded together
# How FFmpeg names the first camera of a system: (device with {} for its number, format).
CAMERAS = {"linux": ("/dev/video{}", "v4l2"), "darwin": ("{}", "avfoundation")}


def is_video(source: str) -> bool:
    """Whether a source is a video, by its suffix, or a camera."""
    path = urlsplit(source).path if is_address(source) else source
    return is_camera(source) or PurePath(path).suffix.lower() in SUFFIXES


def is_camera(source: str) -> bool:
    """Whether a source is a camera: camera:0, /dev/video0, or one in the net, rtsp://..."""
    return re.match(r"(camera:\d+|/dev/video\d+|rtsps?://.+)$", source) is not None


def _torchcodec() -> Any:
    try:
        import torchcodec.decoders
        import torchcodec.encoders

        return torchcodec
    except (ImportError, RuntimeError, OSError) as error:
        why = next(iter(str(error).splitlines()), "")
        raise ImportError(
            f"videos need torchcodec (pip install 'fastrcnn[video]') and the FFmpeg of the system: {why}"
        ) from None


class Frames(NamedTuple):
    """size: (height, width); rate: frames a second; read: each as uint8 [3, H, W] RGB."""

    size: tuple[int, int]
    rate: float
    read: Iterator[Tensor]


def open_video(source: str) -> Frames:
    """The frames of a video file or address, in order, or of a camera, until it ends. Raises ImportError without torchcodec
    (for a camera PyAV), ImageError for what is no video; `read` raises ImageError where it is damaged."""
    if is_camera(source):
        return _open_camera(source)
    decoders = _torchcodec().decoders
    try:
        decoder = decoders.VideoDecoder(source)
        about = decoder.metadata
        size = int(about.height), int(about.width)
        rate, count = float(about.average_fps or 25.0), len(decoder)
    except (RuntimeError, ValueError, OSError, TypeError) as error:
        raise ImageError(f"{source}: cannot be read as a video ({_said(error)})") from None

    def read() -> Iterator[Tensor]:
        for first in range(0, count, PIECE):
            try:
                piece = decoder.get_frames_in_range(first, min(first + PIECE, count)).data
            except (RuntimeError, ValueError, IndexError) as error:
                raise ImageError(f"{source}: frame {first}: cannot be read ({_said(error)})") from None
            yield from piece

    return Frames(size, rate, read())


def _open_camera(source: str) -> Frames:
    """torchcodec opens no devices; PyAV does, and brings its own FFmpeg."""
    try:
        import av
    except ImportError as error:
        raise ImportError(f"cameras need PyAV: pip install 'fastrcnn[video]' ({error})") from None
    kind: str | None = None
    path = source
    if not source.startswith("rtsp"):
        number = re.sub(r"\D", "", source)
        device, kind = CAMERAS.get(sys.platform, ("", ""))
        if not device:
            raise ImageError(f"{source}: cameras are read on Linux and macOS; give the camera's rtsp:// address")
        path = device.format(number)
    try:
        container = av.open(path, format=kind)
        stream = container.streams.video[0]
        size, rate = (stream.height, stream.width), float(stream.average_rate or 25)
    except (av.FFmpegError, OSError, IndexError, ValueError) as error:
        raise ImageError(f"{source}: no picture comes from this camera ({_said(error)})") from None

    def read() -> Iterator[Tensor]:
        with container:
            for frame in container.decode(stream):
                yield torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)

    return Frames(size, rate, read())


@contextmanager
def video_writer(path: Path, size: tuple[int, int], rate: float) -> Iterator[Callable[[Tensor], None]]:
    """A function that appends a frame uint8 [3, H, W] of `size` (height, width) to an .mp4, which takes its name when the
    block ends, however it ends: what was written is whole. An odd side loses its last row: H.264 halves the colours' sides.
    Raises OSError naming the path."""
    height, width = (max(side // 2 * 2, 2) for side in size)
    part, written = path.with_name(f".{os.getpid()}.{path.name}"), 0

    def write(frame: Tensor) -> None:
        nonlocal written
        stream.add_frames(frame[None, :, :height, :width].contiguous())
        written += 1

    encoder = _torchcodec().encoders.Encoder()
    stream = encoder.add_video(height=height, width=width, frame_rate=rate)
    try:
        try:
            with encoder.open_file(part):
                yield write
        finally:
            if written and part.is_file():
                part.replace(path)
    except RuntimeError as error:
        raise OSError(f"{path}: cannot be written ({_said(error)})") from None
    finally:
        part.unlink(missing_ok=True)


def _said(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
