"""The preprocess op against its reference, the peers' resizes written out in Python's integers, PIL and torchvision."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fastrcnn.data.rendered_cells import render_cells
from fastrcnn.ops import preprocess, preprocess_reference
from fastrcnn.ops.preprocess import RULES, resize_opencv, resize_pillow

BYTES = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
UNIT = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PLAIN = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# What the kernel reads as it lies: [H, W, 3] permuted, [3, H, W], part of a wider image with an alpha channel, grey.
LAYOUTS = ["hwc", "chw", "slice", "grey"]


def noise(height: int, width: int, layout: str = "hwc", seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    if layout == "hwc":
        return torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=g).permute(2, 0, 1)
    if layout == "chw":
        return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=g)
    if layout == "grey":
        return torch.randint(0, 256, (1, height, width), dtype=torch.uint8, generator=g).expand(3, -1, -1)
    wide = torch.randint(0, 256, (height + 3, 2 * width + 5, 4), dtype=torch.uint8, generator=g).permute(2, 0, 1)
    return wide[1:, 2 : height + 2, 1 : 2 * width + 1 : 2]


def statistics(resize: str):
    return UNIT if resize == "interpolate" else BYTES


def assert_equals_reference(images, sizes, batch_size, resize, bgr=False, dtype=torch.float32):
    args = images, sizes, batch_size, *statistics(resize), resize, bgr, dtype
    actual, expected = preprocess(*args), preprocess_reference(*args)
    assert actual.dtype == expected.dtype == dtype and actual.stride() == expected.stride()
    assert actual.is_contiguous(memory_format=torch.channels_last)
    if resize != "interpolate":
        assert torch.equal(actual, expected)
    else:  # the reference may fuse or order its sums otherwise; one more rounding for the low precisions
        step = {torch.float16: 2**-10, torch.bfloat16: 2**-7}.get(dtype, 1e-6)
        torch.testing.assert_close(actual, expected, rtol=step, atol=1e-6)


# --- the resizes themselves


def resize_by_loops(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """OpenCV's 8-bit bilinear resize of [H, W] in Python's integers: weights of 11 bits; columns first, then rows. Beyond
    the border the nearest column stands alone, while a row is counted with both weights."""

    def tap(i, new, old):
        at = np.float32((i + 0.5) * (1.0 / (new / old)) - 0.5)
        low = math.floor(at)
        return low, round(float((at - np.float32(low)) * np.float32(2048)))

    old_height, old_width = image.shape
    out = np.zeros((height, width), np.uint8)
    for y in range(height):
        y0, wy = tap(y, height, old_height)
        rows = [int(np.clip(y0 + k, 0, old_height - 1)) for k in (0, 1)]
        for x in range(width):
            x0, wx = tap(x, width, old_width)
            if x0 < 0 or x0 >= old_width - 1:
                x0, wx = min(max(x0, 0), old_width - 1), 0
            x1 = min(x0 + 1, old_width - 1)
            a, b = (int(image[r, x0]) * (2048 - wx) + int(image[r, x1]) * wx for r in rows)
            out[y, x] = (((a >> 4) * (2048 - wy) >> 16) + ((b >> 4) * wy >> 16) + 2) >> 2
    return out


@pytest.mark.parametrize(
    "old, new",
    [
        ((5, 7), (9, 13)),
        ((1, 5), (3, 9)),
        ((2, 2), (7, 7)),
        ((12, 16), (6, 8)),
        ((13, 9), (6, 20)),
        ((40, 30), (17, 11)),
    ],
)
def test_resize_is_opencvs_bit_for_bit(old, new, device):
    image = torch.randint(0, 256, (3, *old), dtype=torch.uint8)
    expected = np.stack([resize_by_loops(channel.numpy(), *new) for channel in image])
    np.testing.assert_array_equal(resize_opencv(image, new).numpy(), expected)
    actual = preprocess([image.to(device)], [new], new, *PLAIN)
    np.testing.assert_array_equal(actual[0].cpu().numpy(), expected)


def test_resizing_to_the_same_size_changes_nothing():
    image = noise(64, 96)
    assert torch.equal(resize_opencv(image, (64, 96)), image)
    assert torch.equal(resize_pillow(image, (64, 96)), image)


def pillow_by_loops(line: list[int], new: int) -> list[int]:
    """One line of Pillow's 8-bit bilinear resize in Python's numbers."""
    scale = len(line) / new
    support, out = max(scale, 1.0), []
    for i in range(new):
        centre = (i + 0.5) * scale
        pixels = range(max(int(centre - support + 0.5), 0), min(int(centre + support + 0.5), len(line)))
        parts = [max(0.0, 1.0 - abs((p - centre + 0.5) * (1.0 / support))) for p in pixels]
        total = 0.0
        for part in parts:
            total += part
        weights = [int(part / total * 2**22 + 0.5) for part in parts]
        out.append(min(max((sum(line[p] * w for p, w in zip(pixels, weights)) + 2**21) >> 22, 0), 255))
    return out


@pytest.mark.parametrize("old, new", [((5, 7), (9, 13)), ((1, 5), (3, 2)), ((13, 9), (4, 20)), ((40, 30), (17, 11))])
def test_pillow_by_loops(old, new, device):
    image = noise(*old)
    channels = []
    for channel in image.tolist():
        rows = [pillow_by_loops(row, new[1]) for row in channel]
        channels.append([pillow_by_loops(list(column), new[0]) for column in zip(*rows)])
    expected = torch.tensor(channels, dtype=torch.float32).transpose(1, 2)
    assert torch.equal(resize_pillow(image, new), expected.to(torch.uint8))
    assert torch.equal(preprocess([image.to(device)], [new], new, *PLAIN, "pillow")[0].cpu(), expected)


@pytest.mark.parametrize("old, new", [((97, 61), (305, 192)), ((480, 640), (800, 1067)), ((300, 200), (97, 60))])
def test_pillow_resizes_as_pil(old, new, device):
    image = noise(*old)
    actual = preprocess([image.to(device)], [new], new, *PLAIN, "pillow")[0].cpu()
    picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(new[::-1], Image.Resampling.BILINEAR)
    off = (actual - torch.from_numpy(np.array(picture)).permute(2, 0, 1)).abs().max()
    # Pillow 13 reduces the rows first where that is less work.
    assert off == 0 or (off <= 1 and new < old)


@pytest.mark.parametrize("size", [(80, 100), (40, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_interpolates_as_torch_bit_for_bit(size, dtype, device, two_threads):
    image = torch.rand(3, 60, 90, dtype=dtype, device=device)
    actual = preprocess([image], [size], size, *PLAIN, "interpolate", dtype=dtype)
    assert torch.equal(actual[0], F.interpolate(image[None], size, mode="bilinear")[0])


# --- the kernel


@pytest.mark.parametrize("resize", RULES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bgr", [False, True])
def test_equals_reference_in_every_layout(resize, layout, bgr, device, need_kernel):
    need_kernel("preprocess", device)
    images = [noise(*size, layout).to(device) for size in ((47, 63), (90, 31), (64, 64))]
    assert_equals_reference(images, [(100, 130), (45, 70), (64, 64)], (101, 137), resize, bgr)


@pytest.mark.parametrize("resize", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [136, 137])  # rows on 16 bytes, and not
def test_equals_reference_in_every_dtype(resize, dtype, width, device, need_kernel):
    need_kernel("preprocess", device)
    images = [noise(40, 50).to(device)] + [torch.rand(3, 30, 70, dtype=d, device=device) for d in DTYPES]
    sizes = [(75, 120), (60, 130), (33, 129), (20, 60), (64, 64)]
    assert_equals_reference(images, sizes, (96, width), resize, True, dtype)


@pytest.mark.parametrize("resize", RULES)
@pytest.mark.parametrize(
    "old, new", [((1, 1), (3, 200)), ((300, 2), (1, 1)), ((5, 700), (130, 3)), ((200, 3), (1, 99))]
)
def test_extreme_sizes_equal_the_reference(resize, old, new, device, need_kernel):
    need_kernel("preprocess", device)
    assert_equals_reference([noise(*old).to(device)], [new], (132, 201), resize)


def test_more_images_than_one_launch_describes(device, need_kernel):
    need_kernel("preprocess", device)
    images = [noise(3 + i % 7, 2 + i % 5, LAYOUTS[i % 3], i).to(device) for i in range(100)]
    assert_equals_reference(images, [(9 - i % 3, 5 + i % 4) for i in range(100)], (9, 8), "opencv")


def test_a_float_image_is_rounded_to_bytes_and_clamped(device):
    bytes_ = torch.tensor([0.4, 0.6, 254.4, 254.6, -3.0, 260.0, math.inf, -math.inf, math.nan], device=device)
    out = preprocess([(bytes_ / 255)[:, None].expand(3, 9, 1)], [(9, 1)], (9, 1), *PLAIN)
    assert out[0, 0, :, 0].tolist() == [0, 1, 254, 255, 0, 255, 255, 0, 0]
    tie = torch.tensor([0.5, 0.25, 0.75], device=device)[:, None].expand(3, 3, 1)  # 127.5, 63.75, 191.25
    assert preprocess([tie], [(3, 1)], (3, 1), *PLAIN)[0, 0, :, 0].tolist() == [128, 64, 191]


def test_padding_is_zero(device):
    out = preprocess([noise(20, 30).to(device)], [(70, 66)], (200, 300), *BYTES, dtype=torch.bfloat16)
    assert out[:, :, :70, :66].any() and not out[:, :, 70:].any() and not out[:, :, :, 66:].any()


def test_mean_and_std_may_be_arrays(device, need_kernel):
    need_kernel("preprocess", device)
    images, mean, std = [noise(8, 9).to(device)], [1.0, 2.0, 3.0], [4.0, 5.0, 6.0]
    expected = preprocess(images, [(8, 9)], (8, 9), mean, std)
    assert torch.equal(preprocess(images, [(8, 9)], (8, 9), np.array(mean), np.array(std)), expected)
    four = [torch.cat([images[0], images[0][:1]])]
    out = preprocess(four, [(8, 9)], (8, 9), np.array([*mean, 1.0]), np.array([*std, 4.0]))
    assert torch.equal(out, torch.cat([expected, expected[:, :1]], 1))


# --- on a GPU


def rendered(device: str) -> list[torch.Tensor]:
    sizes = (480, 640), (333, 500), (300, 200)
    return [torch.from_numpy(render_cells(i, *size)[0]).permute(2, 0, 1).to(device) for i, size in enumerate(sizes)]


GPU_ARGS = [(400, 533), (355, 533), (533, 355)], (544, 544)


@pytest.mark.gpu
@pytest.mark.parametrize("resize", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_equals_cpu_bit_for_bit(resize, dtype, need_kernel):
    need_kernel("preprocess", "cuda")
    rules = *statistics(resize), resize, True, dtype
    expected = preprocess(rendered("cpu"), *GPU_ARGS, *rules)
    assert torch.equal(preprocess(rendered("cuda"), *GPU_ARGS, *rules).cpu(), expected)
