"""What the tiles of csrc/cuda/conv_bn_relu.cu should take on an H100 SXM, in bfloat16, from counts alone: no GPU is asked.

A slice of 64 numbers costs a block the most of: its mma.sync at RATE of the tensor cores' peak, its shared-memory
traffic at 128 bytes a clock, its instructions (read in the SASS of sm_90) at one a clock and scheduler. A convolution
takes the most of that, in whole waves of blocks, of its memory's traffic and of what goes through the L2; then a launch.
"""

import math

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
# (name, in, out, kernel, stride, input height and width, maps read beside: of the output's size), eight images of 800 x
# 1344, and cuDNN's fused call where it was measured on an H100 (ms)
SHAPES = [
    ("stem 4x4 over 16 channels", 16, 64, 4, 1, 403, 675, 0, 0.53),
    ("layer1 1x1", 64, 64, 1, 1, 200, 336, 0, None),
    ("layer1 3x3", 64, 64, 3, 1, 200, 336, 0, None),
    ("layer1 1x1", 64, 256, 1, 1, 200, 336, 0, 0.133),
    ("layer1 1x1 + residual", 64, 256, 1, 1, 200, 336, 1, 0.247),
    ("layer2 1x1", 512, 128, 1, 1, 100, 168, 0, None),
    ("layer2 3x3", 128, 128, 3, 1, 100, 168, 0, None),
    ("layer3 3x3", 256, 256, 3, 1, 50, 84, 0, None),
    ("layer3 1x1", 256, 1024, 1, 1, 50, 84, 0, 0.066),
    ("layer4 3x3", 512, 512, 3, 1, 25, 42, 0, None),
    ("layer4 1x1 + residual", 512, 2048, 1, 1, 25, 42, 1, None),
    ("FPN lateral + half residual", 256, 256, 1, 1, 200, 336, 0.25, None),
    ("FPN lateral + half residual", 512, 256, 1, 1, 100, 168, 0.25, None),
    ("FPN output 3x3", 256, 256, 3, 1, 200, 336, 0, 0.90),
    ("RPN 1x1, 15 outputs", 256, 15, 1, 1, 200, 336, 0, None),
]


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


def grouped(channels: int, pixels: int) -> tuple[float, str]:
    """The same of a 3x3 convolution in narrow groups: an 8 x 16 tile of 64 channels, its patch 10 x 18."""
    tiles = math.ceil(pixels / 128) * math.ceil(channels / 64)
    instructions = 9 * 66 + 12 * 25 + 64 * 3 + 8 * 60  # of a warp: taps, copies, sums on their way, rows
    seconds = {
        "issue": tiles * instructions / SMS / CLOCK,
        "memory": 2 * 2 * pixels * channels / COPY,
        "L2": 2 * tiles * 64 * (180 + 128) / L2,
    }
    limit = max(seconds, key=seconds.get)
    return seconds[limit] * 1e3 + LAUNCH_US / 1e3, limit


def main() -> None:
    print("| shape, 8 images | GFLOP | floor ms | best tile | predicted ms | limited by | cuDNN measured ms |")
    print("|---|---|---|---|---|---|---|")
    for name, cin, cout, k, stride, h, w, beside, cudnn in SHAPES:
        valid = k % 2 == 0  # the space-to-depth stem is padded beforehand
        out = (
            ((h - k) // stride + 1) * ((w - k) // stride + 1)
            if valid
            else math.ceil(h / stride) * math.ceil(w / stride)
        )
        pixels, in_pixels = 8 * out, 8 * h * w
        found = {t: milliseconds(t, cin, cout, k, pixels, in_pixels, beside) for t in TILES}
        best = min(found, key=found.get)
        flop = 2 * pixels * cout * cin * k * k
        moved = 2 * (in_pixels * cin + pixels * cout * (1 + beside))
        floor = 1e3 * max(flop / 798e12, moved / COPY)
        size = f"{cin}->{cout} {h}x{w}"
        ms, limit = found[best]
        print(f"| {name} {size} | {flop / 1e9:.0f} | {floor:.3f} | {best} | {ms:.3f} | {limit} | {cudnn or ''} |")
    for channels, pixels in ((256, 200 * 336), (512, 100 * 168), (1024, 50 * 84)):
        ms, limit = grouped(channels, 8 * pixels)
        flop, floor = 2 * 8 * pixels * channels * 9 * channels / 64, 4e3 * 8 * pixels * channels / COPY
        title = f"X101-64x4d 3x3 in 64 groups {channels}, {pixels} pixels"
        print(f"| {title} | {flop / 1e9:.0f} | {floor:.3f} | groups | {ms:.3f} | {limit} |  |")


if __name__ == "__main__":
    main()
