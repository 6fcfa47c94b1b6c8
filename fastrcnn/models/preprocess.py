"""Images to the network's input batch: colour order, resize, normalisation, padding, as each peer does them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastrcnn.models.profiles import Profile
from fastrcnn.ops import preprocess


def resized_size(height: int, width: int, min_size: int, max_size: int, resize: str) -> tuple[int, int]:
    """(height, width) with the short side at min_size unless the long side would exceed max_size; at least a pixel each,
    where the peers fail on a picture too thin."""
    short, long = torch.sym_min(height, width), torch.sym_max(height, width)
    scale = torch.sym_min(min_size / short, max_size / long)
    new, add = (height * scale, width * scale), 0.0 if resize == "interpolate" else 0.5
    if resize == "pillow":  # Detectron2 fixes the short side first and shrinks both when the long one is too large
        scale = min_size / short
        new = (min_size, scale * width) if height < width else (scale * height, min_size)
        if max(new) > max_size:
            scale = max_size / max(new)
            new = tuple(v * scale for v in new)
    return torch.sym_max(1, torch.sym_int(new[0] + add)), torch.sym_max(1, torch.sym_int(new[1] + add))


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
        in_channels: int = 3,
    ):
        """mean, std, bgr_to_rgb, pad_size_divisor: MMDetection's. It reads BGR files, so bgr_to_rgb=False is a network
        that wants BGR. None takes the profile's; of other channels than three (in_channels) the mean of its three for each,
        in their own order."""
        super().__init__()
        self.min_size, self.max_size, self.pad_size_divisor = min_size, max_size, pad_size_divisor
        self.in_channels = in_channels
        self.set_profile(profile, mean, std, bgr_to_rgb)

    def resize_to(self, min_size: int | None = None, max_size: int | None = None) -> None:
        """Other sizes than the model was built with, where they are given. Raises ValueError naming the argument."""
        for name, size in (("min_size", min_size), ("max_size", max_size)):
            if size is None:
                continue
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name}: expected a whole number of pixels above 0, got {size!r}")
            setattr(self, name, size)

    def set_profile(self, profile: Profile, mean=None, std=None, bgr_to_rgb: bool | None = None) -> None:
        own = self.colours(profile)
        mean, std = tuple(mean or own[0]), tuple(std or own[1])
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != self.in_channels:
                raise ValueError(f"{name}: expected one for each of {self.in_channels} channels, got {list(values)}")
        self.profile, self.mean, self.std = profile, mean, std
        self.bgr = self.in_channels == 3 and (profile.bgr if bgr_to_rgb is None else not bgr_to_rgb)

    def colours(self, profile: Profile) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """A profile's mean and std for the channels that there are."""
        if self.in_channels == 3:
            return tuple(profile.mean), tuple(profile.std)
        return tuple((sum(values) / len(values),) * self.in_channels for values in (profile.mean, profile.std))

    def forward(
        self,
        images: Sequence[Tensor],
        dtype: torch.dtype = torch.float32,
        sizes: Sequence[tuple[int, int]] | None = None,
        least: tuple[int, int] = (1, 1),
    ) -> tuple[Tensor, Tensor, Tensor]:
        """images: [C, H, W] each (3 are RGB), float in 0..1 or uint8, of any sizes; sizes: (height, width) to resize each
        to, where min_size and max_size shall not decide; least: (height, width) of the batch at least, before it is rounded
        up. Floats of other channels than three, which no peer reads, keep all their bits: they are interpolated, also where
        the profile's rule takes bytes.

        Returns batch [B, C, H', W'] channels-last in `dtype`, H' and W' multiples of pad_size_divisor, zero-padded right
        and below; image sizes [B, 2] int64 (height, width) before padding; scale factors [B, 2] float32 (width, height),
        new over old. Raises TypeError or ValueError naming the image.
        """
        images = list(images)
        p, step = self.profile, self.pad_size_divisor
        # The operator checks the images: what is none has a size of one pixel until it is named there.
        pictures = [isinstance(x, Tensor) and x.dim() == 3 and x.numel() > 0 for x in images]
        old = [tuple(x.shape[1:]) if is_one else (1, 1) for x, is_one in zip(images, pictures)]
        new = sizes or [resized_size(*size, self.min_size, self.max_size, p.resize) for size in old]
        padded = [(max(sides) + step - 1) // step * step for sides in zip(least, *new)]
        rule, mean, std = p.resize, self.mean, self.std
        floats = any(is_one and x.is_floating_point() for x, is_one in zip(images, pictures))
        if self.in_channels != 3 and floats and rule != "interpolate":
            rule, (mean, std) = "interpolate", ([v / 255 for v in values] for values in (mean, std))
        batch = preprocess(images, new, padded, mean, std, rule, self.bgr, dtype)
        rows = [(*now, *before) for now, before in zip(new, old)]
        if all(row == rows[0] for row in rows):  # no copy from the host, which a CUDA graph would not repeat
            both = torch.stack([torch.full((len(rows),), n, device=batch.device) for n in rows[0]], 1)
        else:  # one that nobody waits for
            both = torch.tensor(rows, pin_memory=batch.device.type == "cuda").to(batch.device, non_blocking=True)
        factors = both[:, :2].flip(1).float() / both[:, 2:].flip(1).float()
        return batch, both[:, :2].contiguous(), factors
