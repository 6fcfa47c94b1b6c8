"""Images to the network's input batch: colour order, resize, normalisation, padding, as each peer does them."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrcnn.models.profiles import Profile


def resized_size(height: int, width: int, min_size: int, max_size: int, resize: str) -> tuple[int, int]:
    """(height, width) with the short side at min_size unless the long side would exceed max_size."""
    scale = min(min_size / min(height, width), max_size / max(height, width))
    if resize == "opencv":
        return int(height * scale + 0.5), int(width * scale + 0.5)
    if resize == "interpolate":
        return int(height * scale), int(width * scale)
    # Detectron2 fixes the short side first and shrinks both when the long one is too large.
    scale = min_size / min(height, width)
    new = (min_size, scale * width) if height < width else (scale * height, min_size)
    if max(new) > max_size:
        scale = max_size / max(new)
        new = tuple(v * scale for v in new)
    return int(new[0] + 0.5), int(new[1] + 0.5)


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


def _to_uint8(image: Tensor) -> Tensor:
    return image if image.dtype == torch.uint8 else (image * 255.0).round().clamp(0, 255).to(torch.uint8)


class DataPreprocessor(nn.Module):
    """Images -> (batch, image sizes, scale factors). mean and std are in the network's channel order and value range."""

    def __init__(
        self,
        profile: Profile,
        min_size: int = 800,
        max_size: int = 1333,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        bgr_to_rgb: bool | None = None,
        pad_size_divisor: int = 32,
    ):
        """mean, std, bgr_to_rgb, pad_size_divisor: MMDetection's. It reads BGR files, so bgr_to_rgb=False is a network
        that wants BGR. None takes the profile's."""
        super().__init__()
        self.min_size, self.max_size, self.pad_size_divisor = min_size, max_size, pad_size_divisor
        self.set_profile(profile, mean, std, bgr_to_rgb)

    def set_profile(self, profile: Profile, mean=None, std=None, bgr_to_rgb: bool | None = None) -> None:
        self.profile = profile
        self.mean, self.std = tuple(mean or profile.mean), tuple(std or profile.std)
        self.bgr = profile.bgr if bgr_to_rgb is None else not bgr_to_rgb

    def _one(self, image: Tensor) -> Tensor:
        p = self.profile
        size = resized_size(image.shape[1], image.shape[2], self.min_size, self.max_size, p.resize)
        if p.resize == "opencv":
            image = resize_opencv(_to_uint8(image), size)
        elif p.resize == "pillow":
            image = _to_uint8(image)
            if image.device.type != "cpu":  # torch filters uint8, as Pillow does, on the CPU only
                image = image.float()
            image = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0].round()
        elif image.dtype == torch.uint8:
            image = image.float() / 255.0
        if self.bgr:
            image = image.flip(0)
        if p.resize != "interpolate":
            image = image.float()
        mean = torch.tensor(self.mean, dtype=image.dtype, device=image.device)[:, None, None]
        std = torch.tensor(self.std, dtype=image.dtype, device=image.device)[:, None, None]
        image = (image - mean) / std
        if p.resize == "interpolate":
            # The scale factor, not the size, so that torch derives the size and the sampling points as torchvision does.
            scale = min(self.min_size / min(image.shape[1:]), self.max_size / max(image.shape[1:]))
            image = F.interpolate(image[None], scale_factor=scale, mode="bilinear", recompute_scale_factor=True,
                                  align_corners=False)[0]  # fmt: skip
        return image

    def forward(self, images: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
        """images: [3, H, W] RGB each, float in 0..1 or uint8, of any sizes.

        Returns batch [B, 3, H', W'] channels-last in `dtype`, H' and W' multiples of pad_size_divisor, zero-padded right
        and below; image sizes [B, 2] int64 (height, width) before padding; scale factors [B, 2] float32 (width, height),
        new over old. Raises TypeError or ValueError naming the image.
        """
        for i, image in enumerate(images):
            if not isinstance(image, Tensor) or image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
                got = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
                raise ValueError(f"images[{i}]: expected a tensor [3, H, W], got {got}")
            if image.dtype != torch.uint8 and not image.is_floating_point():
                raise TypeError(f"images[{i}]: expected float in 0..1 or uint8, got {image.dtype}")
        resized = [self._one(image) for image in images]
        sizes = torch.tensor([list(r.shape[1:]) for r in resized], dtype=torch.int64)
        old = torch.tensor([list(image.shape[1:]) for image in images], dtype=torch.float32)
        step = self.pad_size_divisor
        height, width = ((int(v) + step - 1) // step * step for v in sizes.max(0).values)
        device = resized[0].device
        batch = torch.zeros(len(images), 3, height, width, dtype=dtype, device=device)
        batch = batch.contiguous(memory_format=torch.channels_last)
        for row, r in zip(batch, resized):
            row[:, : r.shape[1], : r.shape[2]] = r
        return batch, sizes.to(device), (sizes / old).flip(1).to(device)
