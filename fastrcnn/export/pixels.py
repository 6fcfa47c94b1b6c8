"""The preprocessor as plain torch arithmetic on sizes that are not known before: uint8 pixels to the network's batch, byte
for byte what `fastrcnn.ops.preprocess` makes of them. Sizes are doubles in tensors, which ONNX computes as Python does.
Bytes are summed in float32, as whole numbers below 2**24 that are divided by powers of two: exact in every runtime, also in
one that takes float32 for integers and doubles.
"""

import torch
from torch import Tensor, nn

from fastrcnn.models.preprocess import DataPreprocessor
from fastrcnn.ops.preprocess import MOST, PILLOW_BITS


def _taps(new: Tensor, size: Tensor, length: int, resize: str, columns: bool) -> tuple[Tensor, Tensor]:
    """For an axis of `size` pixels that becomes `new`, of which `length` are wanted: the pixels [length, taps] that each
    reads, and their weights."""
    i = torch.arange(length, dtype=torch.float64)
    if resize == "pillow":
        return _pillow_taps(new, size, i)
    if resize == "opencv":
        at = ((i + 0.5) * size / new - 0.5).float()
    else:
        at = ((i + 0.5) * (size.float() / new.float()).double() - 0.5).float().clamp(min=0.0)
    low, last = torch.floor(at), size.float() - 1
    frac = at - low
    if resize == "opencv":
        frac = torch.where((low < 0) | (low >= last), 0.0, frac) if columns else frac
        second = torch.round(frac * 2048)
        weights = torch.stack([2048 - second, second], 1)
    else:
        weights = torch.stack([1.0 - frac, frac], 1)
    first = torch.minimum(low, last).clamp(min=0.0)
    return torch.stack([first, torch.minimum(low + 1, last).clamp(min=0.0)], 1).long(), weights


def _pillow_taps(new: Tensor, size: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
    """Those of a triangle that reaches max(size / new, 1) pixels to either side, its weights summing up to 2**22. Distances
    are counted in whole numbers of 1 / (2 new) pixels: doubles that a runtime takes for float32 stay exact below 2**24,
    and so do the digits of their quotients."""
    reach, centre = 2 * torch.maximum(size, new), (2 * i + 1) * size
    first = torch.floor((centre - reach + new) / (2 * new)).clamp(min=0.0)
    end = torch.minimum(torch.floor((centre + reach + new) / (2 * new)), size)
    most = (end - first).max().long().item()
    torch._check(most >= 1)
    at = first[:, None] + torch.arange(most, dtype=torch.float64)
    rest = (reach - (2 * new * at + new - centre[:, None]).abs()).clamp(min=0.0)
    rest = torch.where(at < end[:, None], rest, 0.0)
    total, weights = rest.sum(1, keepdim=True).clamp(min=1.0), torch.zeros_like(rest)
    for bits in (4, 4, 4, 4, 4, PILLOW_BITS - 20):
        rest = rest * 2**bits
        digit = torch.floor(rest / total)
        rest, weights = rest - digit * total, weights * 2**bits + digit
    weights = weights + (2 * rest >= total)
    return torch.minimum(at, size - 1).long(), weights


def _split(x: Tensor, base: int) -> tuple[Tensor, Tensor]:
    """(high, low) of whole numbers: base * high + low, 0 <= low < base."""
    high = torch.floor(x / base)
    return high, x - base * high


def _mix(x: Tensor, taps: tuple[Tensor, Tensor], axis: int) -> list[Tensor]:
    """The weighted pixels that each output pixel of `axis` adds up."""
    at, weights = taps
    if axis == 2:
        weights = weights[..., None]
    return [x.index_select(axis, at[:, k]) * weights[:, k] for k in range(at.shape[1])]


def _add(x: Tensor, taps: tuple[Tensor, Tensor], axis: int) -> Tensor:
    """Their sum, of any number of taps."""
    at, weights = taps
    length, most = at.shape
    shape = (*x.shape[:axis], length, most, *x.shape[axis + 1 :])
    picked = x.index_select(axis, at.reshape(-1)).reshape(shape)
    weights = weights.reshape(length, most, *[1] * (3 - axis))
    return (picked * weights).sum(axis + 1, dtype=x.dtype)


class Pixels(nn.Module):
    """images uint8 [B, 3, H, W] RGB -> (batch [B, 3, H', W'], image_sizes [B, 2], scale_factors [B, 2]) as the model's
    `prepare` gives them."""

    def __init__(self, preprocessor: DataPreprocessor, dtype: torch.dtype):
        super().__init__()
        p = preprocessor
        self.min_size, self.max_size, self.step = p.min_size, p.max_size, p.pad_size_divisor
        self.mean, self.std, self.bgr, self.resize, self.dtype = p.mean, p.std, p.bgr, p.profile.resize, dtype

    def sizes(self, height: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
        """`models.preprocess.resized_size` of doubles in tensors."""
        least, most = (torch.full((), float(x), dtype=torch.float64) for x in (self.min_size, self.max_size))
        short, long = torch.minimum(height, width), torch.maximum(height, width)
        if self.resize != "pillow":
            scale = torch.minimum(least / short, most / long)
            new = height * scale, width * scale
        else:
            scale = least / short
            new = torch.where(height < width, least, scale * height), torch.where(height < width, scale * width, least)
            longest = torch.maximum(*new)
            scale = torch.where(longest > most, most / longest, 1.0)
            new = new[0] * scale, new[1] * scale
        add = 0.0 if self.resize == "interpolate" else 0.5
        return tuple(torch.floor(x + add).clamp(min=1.0) for x in new)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        old = [torch.full((), n, dtype=torch.float64) for n in images.shape[2:]]
        new = self.sizes(*old)
        cells = [torch.ceil(n / self.step).long().item() for n in new]
        for n in cells:  # what tracing has to know of them
            torch._check(n >= 1)
            torch._check(n <= MOST)
        rows, columns = (n * self.step for n in cells)
        y = _taps(new[0], old[0], rows, self.resize, False)
        x = _taps(new[1], old[1], columns, self.resize, True)
        if self.resize == "interpolate":
            pixels = self.normalised(images.float() / 255.0)
            for axis, taps in ((3, x), (2, y)):
                first, second = _mix(pixels, taps, axis)
                pixels = first + second
        elif self.resize == "opencv":
            first, second = _mix(images.float(), x, 3)
            high, low = _split(torch.floor((first + second) / 16), 256)
            # Each of the two rows times its weight, over 2**16.
            first, second = (
                torch.floor((a + torch.floor(b / 256)) / 256) for a, b in zip(_mix(high, y, 2), _mix(low, y, 2))
            )
            pixels = self.normalised(torch.floor((first + second + 2) / 4))
        else:
            pixels, half = images.float(), 2 ** (PILLOW_BITS // 2)
            for axis, (at, weights) in ((3, x), (2, y)):
                high, low = (_add(pixels, (at, w.float()), axis) for w in _split(weights, half))
                pixels = torch.floor((high + half // 2 + torch.floor(low / half)) / half).clamp(max=255)
            pixels = self.normalised(pixels)
        inside = (torch.arange(rows) < new[0])[:, None] & (torch.arange(columns) < new[1])
        batch = torch.where(inside, pixels, 0.0).to(self.dtype)
        sizes = torch.stack(new).long()
        factors = torch.stack([new[1].float() / old[1].float(), new[0].float() / old[0].float()])
        count = images.shape[0]
        return batch, sizes.expand(count, 2), factors.expand(count, 2)

    def normalised(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W] RGB -> in the network's channel order, channel by channel: minus mean, over std."""
        order = (2, 1, 0) if self.bgr else (0, 1, 2)
        channels = [(pixels[:, c] - mean) / std for c, mean, std in zip(order, self.mean, self.std)]
        return torch.stack(channels, 1)
