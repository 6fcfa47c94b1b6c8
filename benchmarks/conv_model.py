"""What the tiles of csrc/cuda/conv_bn_relu.cu should take on an H100 SXM, in bfloat16, from counts alone: no GPU is asked.

A slice of 64 numbers costs a block the most of: its mma.sync at RATE of the tensor cores' peak, its shared-memory
traffic at 128 bytes a clock, its instructions (read in the SASS of sm_90) at one a clock and scheduler. A convolution
takes the most of that, in whole waves of blocks, of its memory's traffic and of what goes through the L2; then a launch.
"""

import math

import torch
from conv_layers import Layer, layers_of

SMS, CLOCK, COPY, L2, LAUNCH_US = 132, 1.755e9, 3.0e12, 5.5e12, 4.0
RATE = 0.62  # of wgmma's peak that mma.sync is known to reach on Hopper
HMMA_CLOCKS = 4 / RATE  # m16n8k16 is 4 clocks of a quarter of a multiprocessor at the peak of 989 TFLOP/s
# name: (pixels, outputs, warps' rows, their columns, HMMA and instructions of a warp's slice, other instructions, blocks at
# a time): cuobjdump -sass -arch sm_90, ptxas -v
TILES = {
    "128x128": (128, 128, 64, 64, 128, 377, 1400, 2),
    "128x64": (128, 64, 64, 32, 64, 289, 900, 3),
    "64x64": (64, 64, 32, 32, 32, 189, 600, 3),
    "128x32": (128, 32, 32, 32, 32, 180, 600, 3),
    "256x128": (256, 128, 64, 64, 128, 370, 1400, 1),
}
# Milliseconds of cuDNN's fused calls, measured on an H100: eight images of 800 x 1344, bfloat16, channels-last.
CUDNN = {
    "64->256 1x1/1 200x336": 0.133, "64->256 1x1/1 200x336 + full residual": 0.247, "256->1024 1x1/1 50x84": 0.066,
    "256->256 3x3/1 200x336": 0.90, "stem and pooling": 2.01, "FPN": 3.88, "RPN head": 1.35,
}  # fmt: skip
# A tile of csrc/cuda/conv_stem.cu, 7 x 7 maxima of 64 channels, costs a warp (SASS of sm_90): HMMA, and instructions of its
# products, of its copies, of sums on their way and of maxima.
STEM_HMMA, STEM_INSTRUCTIONS = 256, 4 * 101 + 212 + 500 + 306


def milliseconds(
    tile: str, cin: int, cout: int, k: int, pixels: int, in_pixels: int, beside: float
) -> tuple[float, str]:
    m, n, warp_m, warp_n, hmma, instructions, others, at_once = TILES[tile]
    slices, columns = math.ceil(cin * k * k / 64), math.ceil(cout / n)
    warps = m // warp_m * (n // warp_n)
    shared = (warps * (warp_m + warp_n) * 128 + (m + n) * 128) / 128
    each = warps / 4  # warps of a scheduler
    clocks = {"tensor cores": each * hmma * HMMA_CLOCKS, "shared memory": shared, "issue": each * instructions}
    slowest = max(clocks, key=clocks.get)
    blocks = math.ceil(pixels / m) * columns
    waves = math.ceil(blocks / (SMS * at_once)) * SMS * at_once  # blocks that the card has time for
    seconds = {
        slowest: waves * (slices * clocks[slowest] + each * others) / SMS / CLOCK,
        "memory": 2 * (in_pixels * cin + pixels * cout * (1 + beside) + cout * cin * k * k) / COPY,
        "L2": 2 * blocks * (slices * 64 * (m + n) + m * n) / L2,
    }
    limit = max(seconds, key=seconds.get)
    return seconds[limit] * 1e3 + LAUNCH_US / 1e3, limit


def grouped(channels: int, pixels: int, in_pixels: int) -> tuple[float, str]:
    """The same of a 3x3 convolution in narrow groups: an 8 x 16 tile of 64 channels, its patch 10 x 18."""
    tiles = math.ceil(pixels / 128) * math.ceil(channels / 64)
    instructions = 9 * 66 + 12 * 25 + 64 * 3 + 8 * 60  # of a warp: taps, copies, sums on their way, rows
    seconds = {
        "issue": tiles * instructions / SMS / CLOCK,
        "memory": 2 * (in_pixels + pixels) * channels / COPY,
        "L2": 2 * tiles * 64 * (180 * in_pixels / pixels + 128) / L2,
    }
    limit = max(seconds, key=seconds.get)
    return seconds[limit] * 1e3 + LAUNCH_US / 1e3, limit


def stem(images: int, height: int, width: int) -> tuple[float, str]:
    """7x7/2, ReLU and pooling in one kernel."""
    maxima = images * math.ceil(height / 4) * math.ceil(width / 4)
    tiles = images * math.ceil(height / 4 / 7) * math.ceil(width / 4 / 7)
    shared = 8 * (16 * 6 * 512 + 16 * 2 * 128) + 49 * 9 * 128 + 19 * 38 * 12  # fragments, staged sums, maxima, cells
    clocks = {
        "tensor cores": 8 * STEM_HMMA * HMMA_CLOCKS / 4, "shared memory": shared / 128, "issue": 2 * STEM_INSTRUCTIONS,
    }  # fmt: skip
    slowest = max(clocks, key=clocks.get)
    seconds = {
        slowest: tiles * clocks[slowest] / SMS / CLOCK,
        "memory": 2 * (images * 3 * height * width + 64 * maxima) / COPY,
    }
    limit = max(seconds, key=seconds.get)
    return seconds[limit] * 1e3 + LAUNCH_US / 1e3, limit


def predicted(layer: Layer, images: int) -> tuple[str, float, str]:
    """(tile, ms, what limits it)."""
    (c, h, w), (o, _, k, _), out = layer.input, layer.weight, layer.out(images)
    pixels = out[0] * out[2] * out[3]
    if layer.groups > 1:
        return "groups", *grouped(c, pixels, images * h * w)
    beside = {"": 0.0, "full": 1.0, "half": 0.25}[layer.residual]
    found = {t: milliseconds(t, c, o, k, pixels, images * h * w, beside) for t in TILES}
    best = min(found, key=found.get)
    return best, *found[best]


def table(name: str, images: int = 8) -> None:
    print(f"\n{name}\n")
    print("| shape, 8 images | calls | GFLOP | floor ms | best tile | predicted ms | limited by | cuDNN measured ms |")
    print("|---|---|---|---|---|---|---|---|")
    for part, layers in layers_of(name).items():
        total = 0.0
        for layer, calls in layers.items():
            shape, moved, flop = layer.title(), layer.elements(images), layer.flop(images)
            if layer.weight[2] == 7:  # the stem's own kernel writes a quarter of the pixels
                shape = "stem and pooling"
                (ms, limit), best = stem(images, *layer.input[1:]), "stem"
                moved -= 0.75 * torch.Size(layer.out(images)).numel()
            else:
                best, ms, limit = predicted(layer, images)
            total += calls * ms
            floor, known = 1e3 * max(flop / 798e12, 2 * moved / COPY), CUDNN.get(shape, "")
            print(f"| {shape} | {calls} | {flop / 1e9:.0f} | {floor:.3f} | {best} | {ms:.3f} | {limit} | {known} |")
        print(f"| **{part}** | {sum(layers.values())} | | | | **{total:.2f}** | | {CUDNN.get(part, '')} |")


def main() -> None:
    table("r50_fpn")
    table("x101_64x4d_fpn")


if __name__ == "__main__":
    main()
