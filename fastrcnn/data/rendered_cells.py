"""Rendered cells: made-up microscope pictures of a stained blood smear, with their boxes.

For data that anybody may ship: nothing here is cut from a photograph, every picture is drawn from a seed by the code
below. It serves the demo picture and training beside the real BCCD photographs, whose look it imitates: colours, and
sizes and counts per class, were set by eye and by statistics of BCCD's training split (640x480 pictures).
A pixel is background * exp(-absorbance): light through stain, absorbance per RGB channel in natural log units.
"""

from __future__ import annotations

import numpy as np

RBC, WBC, PLATELET = range(3)
DIAMETER = {RBC: (100, 9), PLATELET: (27, 5)}  # mean and deviation, pixels; the soft edge comes on top
INSET = (0.3, 0.66, 0.6)  # per class, how far inside the frame a centre stays, of the radius: sets how many are cut off
MIN_VISIBLE = 0.3  # less of a cell than this inside the frame: it is not drawn, so that nothing visible lacks a box
MASK_LEVEL = 0.15  # coverage from which a pixel counts as cell: about where the eye puts a soft edge
PIXEL_ASPECT = 1.05  # BCCD's pictures, and so all its boxes, are stretched this much sideways
MARGIN = 4  # canvas pixels beyond the frame, room for the colour fringes
DEMO_SEED = 2_000_010  # far from the seeds that models are trained and measured on
# Absorbance at thickness 1; the second row grows with thickness squared, which turns thick red cells brown.
RBC_STAIN = np.array([[0.195, 0.355, 0.13], [-0.048, -0.033, 0.20]], np.float32)
# name: chance, diameter (mean, sd; pixels), nucleus and cytoplasm absorbance, graininess, lobes, lobe radius, orbit
WBC_KINDS = {
    "neutrophil": (0.58, (186, 30), (0.42, 0.78, -0.02), (0.08, 0.23, 0.02), 0.09, (3, 5), 0.31, 0.52),
    "eosinophil": (0.11, (192, 28), (0.38, 0.66, -0.04), (0.07, 0.42, 0.15), 0.28, (2, 3), 0.40, 0.52),
    "monocyte": (0.13, (200, 28), (0.33, 0.62, -0.04), (0.22, 0.36, 0.00), 0.09, (3, 4), 0.46, 0.34),
    "lymphocyte": (0.18, (130, 16), (0.62, 0.92, 0.03), (0.33, 0.36, -0.02), 0.05, (1, 1), 0.98, 0.05),
}


def _blur(a: np.ndarray, radius: int, passes: int = 2) -> np.ndarray:
    """Box-blur the first two axes of a float32 [H, W, ...] `passes` times (two come close to a Gaussian)."""
    width = 2 * radius + 1
    for axis in (0, 1) * passes:
        a = np.moveaxis(a, axis, 0)
        # float64: a running sum over a whole picture would lose float32's last digits
        total = np.cumsum(np.pad(a, [(radius + 1, radius)] + [(0, 0)] * (a.ndim - 1), "edge"), axis=0, dtype=np.float64)
        a = np.moveaxis(((total[width:] - total[:-width]) / width).astype(np.float32), 0, axis)
    return a


def _noise(rng: np.random.Generator, shape: tuple[int, ...], radius: float) -> np.ndarray:
    """Smooth noise, float32 `shape`, mean 0 and deviation 1; grains are about 2 * radius pixels wide."""
    a = _blur(rng.standard_normal(shape, np.float32), max(1, round(radius)))
    return (a - a.mean()) / (a.std() + 1e-6)


def _soft(distance: np.ndarray, width: float) -> np.ndarray:
    """Coverage 0..1 of an edge `width` pixels wide, from the distance inside it (pixels)."""
    t = np.clip(distance / width + 0.5, 0, 1)
    return t * t * (3 - 2 * t)


def _outline(rng, diameter: float, stretch: float, dents: float, edge: float) -> tuple[np.ndarray, ...]:
    """A dented ellipse on its own square patch. Returns float32 [S, S] each: x and y from the centre in pixels, u (0 at
    the centre, 1 on the outline) and the distance to the outline in pixels (positive inside).

    stretch: deviation of the log of the ratio of the axes. dents: their depth, of the radius. edge: pixels to leave.
    """
    stretch = float(np.exp(rng.normal(0, stretch / 2)))
    half = int(diameter / 2 * max(stretch, 1 / stretch) * (1.08 + 2.5 * dents) + edge / 2) + 3
    y, x = np.mgrid[-half : half + 1, -half : half + 1].astype(np.float32)
    y, x = y * PIXEL_ASPECT**0.5, x / PIXEL_ASPECT**0.5
    p, q = _turn(x, y, rng.uniform(0, np.pi), stretch)
    angles = np.linspace(-np.pi, np.pi, 181)
    rim = np.ones(181)
    for k in range(2, 6):  # low harmonics: dents and corners, as in cells squeezed by neighbours
        rim += dents * rng.normal() * (2 / k) * np.cos(k * angles + rng.uniform(0, 2 * np.pi))
    radius, rim = np.hypot(p, q), np.interp(np.arctan2(q, p), angles, rim * diameter / 2).astype(np.float32)
    return x, y, radius / rim, rim - radius


def _turn(x: np.ndarray, y: np.ndarray, angle: float, stretch: float) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates along the axes of an ellipse turned by `angle` (radians), scaled so that it becomes a circle."""
    cos, sin = float(np.cos(angle)), float(np.sin(angle))
    return (x * cos + y * sin) / stretch, (y * cos - x * sin) * stretch


def _red_cell(rng, diameter: float, paleness: float, specks: float, focus: float) -> tuple[np.ndarray, np.ndarray]:
    """Thickness and coverage, float32 [S, S] each, of one red cell: a disc with a dimple off its middle."""
    x, y, u, distance = _outline(rng, diameter, 0.2, 0.032, focus)
    cover = _soft(distance, focus)
    off_x, off_y, reach = *rng.normal(0, 0.04, 2).tolist(), rng.uniform(0.15, 0.42)
    dimple = np.hypot(x / diameter - off_x, y / diameter - off_y) / reach
    dimple = np.exp(-1.2 * dimple ** rng.uniform(1.8, 5)) * _soft(1 - u, 0.8)  # the last factor keeps a rim round it
    thickness = max(rng.normal(0.78, 0.13), 0.3) * (1 - min(max(rng.normal(paleness, 0.25), 0), 0.95) * dimple)
    thickness += 0.13 * np.exp(-(((u - 0.86) / 0.09) ** 2)) + 0.015 * _noise(rng, u.shape, 0.07 * diameter)
    for _ in range(rng.poisson(specks)):  # drying leaves bright specks with a dark ring on the cells
        off_x, off_y = (diameter * rng.normal(0, 0.2, 2)).tolist()
        d = np.hypot(x - off_x, y - off_y) / (rng.uniform(0.015, 0.05) * diameter)
        thickness += rng.uniform(0.1, 0.5) * np.exp(-2 * (d - 1.6) ** 2) - rng.uniform(0.1, 0.9) * np.exp(-d * d)
    return np.maximum(thickness, 0.03) * cover, cover


def _white_cell(rng, kind: str, diameter: float, focus: float) -> tuple[np.ndarray, np.ndarray]:
    """Absorbance [S, S, 3] and coverage [S, S], float32, of one white cell: grainy cytoplasm, lobed dark nucleus."""
    *_, nucleus, plasm, graininess, lobes, lobe_radius, orbit = WBC_KINDS[kind]
    x, y, u, distance = _outline(rng, diameter, 0.08, 0.03, focus + 10)
    r = diameter / 2
    cover = _soft(distance + 0.018 * r * _noise(rng, u.shape, 0.06 * r), focus + 5)
    total, strongest = np.zeros_like(u), np.zeros_like(u)
    start, count = rng.uniform(0, 2 * np.pi), int(rng.integers(lobes[0], lobes[1] + 1))
    for k in range(count):  # the lobes sit on an arc and melt together where they touch
        angle, far = start + (k + rng.normal(0, 0.15)) * min(1.35, 5.4 / count), orbit * r * rng.uniform(0.75, 1.15)
        dx, dy = x - far * float(np.cos(angle)), y - far * float(np.sin(angle))
        p, q = _turn(dx, dy, rng.uniform(0, np.pi), rng.uniform(1.0, 1.35))
        lobe = np.exp(-0.7 * ((p * p + q * q) / (lobe_radius * r * rng.uniform(0.85, 1.15)) ** 2) ** 2.2)
        total, strongest = total + lobe, np.maximum(strongest, lobe)
    inside = _soft(total - 0.5 + 0.05 * _noise(rng, u.shape, 0.06 * r), 0.1 + 0.03 * focus) * _soft(distance - 3, focus)
    grains = _noise(rng, u.shape, 0.02 * r)
    body = (1 + graininess * grains + 0.12 * _noise(rng, u.shape, 0.15 * r)) * rng.uniform(0.8, 1.15)
    chromatin = 0.6 + 0.4 * strongest / (total + 1e-6)  # a thin paler seam where two lobes meet
    chromatin += 0.03 * grains + 0.1 * _noise(rng, u.shape, 0.07 * r)
    plasm, nucleus = (np.float32(colour + rng.normal(0, 0.02, 3)) for colour in (plasm, nucleus))
    nucleus = nucleus * rng.uniform(0.75, 1.15)
    stain = (body * (1 - inside))[..., None] * plasm + (chromatin * inside)[..., None] * nucleus
    return stain * cover[..., None], cover


def _platelet(rng, diameter: float, focus: float) -> tuple[np.ndarray, np.ndarray]:
    """Absorbance [S, S, 3] and coverage [S, S], float32, of one platelet: a small grainy violet to blue smudge."""
    edge = 1.5 * focus + diameter * rng.uniform(0.15, 0.6)  # rarely in the plane of focus
    _, _, u, distance = _outline(rng, diameter, 0.14, 0.04, edge)
    cover = _soft(distance, edge)
    colour = np.array([0.40, 0.50, 0.01]) * rng.uniform(0.55, 1.3) + rng.normal(0, [0.03, 0.05, 0.02])
    grains = np.clip(1 + 0.22 * _noise(rng, u.shape, 0.1 * diameter), 0.2, 2)
    return (cover * grains)[..., None] * np.float32(colour), cover


def _place(rng, frame: tuple[int, int], inset: float, r: float, others: list, gaps: list, cluster: float):
    """A centre (x, y) for a cell of radius r, or None where 40 tries find none; everything in pixels.

    frame: (width, height). inset: how far from its edge the centre stays. others: (label, x, y, radius) of cells so
    far. gaps: per label, least distance to them in sums of radii. cluster: how often to try beside a red cell.
    """
    width, height = frame
    beside = [other for other in others if other[0] == RBC]
    for _ in range(40):
        x, y = rng.uniform(inset, width - inset), rng.uniform(inset, height - inset)
        if beside and rng.random() < cluster:
            _, x, y, far = beside[rng.integers(len(beside))]
            step = (far + r) * rng.uniform(0.7, 1.05) * np.exp(1j * rng.uniform(0, 2 * np.pi))
            x, y = x + step.real, y + step.imag
        framed = min(x, width - x, y, height - y) >= inset
        if framed and all(np.hypot(x - ox, y - oy) > gaps[c] * (r + far) for c, ox, oy, far in others):
            return x, y
    return None


def _background(rng, height: int, width: int) -> np.ndarray:
    """The empty slide, float32 [height, width, 3] in 0..255: tint, a bright patch, drifting white balance, dust."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    v, h = y / height - rng.uniform(0.3, 1.0), x / width - rng.uniform(0.3, 0.7)
    light = 1 + rng.uniform(0.03, 0.14) * (np.exp(-(v * v + h * h) / 0.12) - 0.4) + rng.normal(0, 0.02) * h
    for k in range(rng.integers(6, 24)):  # dust on the optics: small dots with a bright ring, and a few wide smears
        size, depth = (rng.uniform(8, 14), 0.05) if k % 4 == 0 else (rng.uniform(2, 3.5), 0.12)
        cx, cy, s = rng.integers(0, width), rng.integers(0, height), int(3 * size)
        spot = np.s_[max(cy - s, 0) : cy + s, max(cx - s, 0) : cx + s]
        d2 = ((y[spot] - cy) ** 2 + (x[spot] - cx) ** 2) / size**2
        light[spot] -= rng.uniform(0.2, 1) * depth * (1 - 0.5 * d2 * (k % 4 > 0)) * np.exp(-d2)
    tint = np.float32(np.array([201, 203, 198]) * rng.normal(1, 0.015) + rng.normal(0, 1.5, 3))
    return (tint + np.float32(rng.normal(0, 3, 3)) * v[..., None]) * light[..., None]


def render_cells(seed: int, height: int = 480, width: int = 640) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw one picture. Same seed and size, same picture; at any size it shows as many cells, larger or smaller.

    Returns the image uint8 [H, W, 3] RGB; boxes float32 [N, 4] xyxy, absolute pixels inside the image, tight round what
    is visible of each cell; labels int64 [N]: 0 RBC, 1 WBC, 2 Platelets.
    """
    rng = np.random.default_rng(seed)
    scale = (height * width / (480 * 640)) ** 0.5
    rows, columns = height + 2 * MARGIN, width + 2 * MARGIN
    thickness, veil = np.zeros((2, rows, columns), np.float32)  # of the red cells; coverage by the other cells
    other = np.zeros((rows, columns, 3), np.float32)  # absorbance of the white cells and platelets
    focus = rng.uniform(4, 11) * scale  # width of an edge in pixels, about the same all over a picture
    paleness, cluster, specks = rng.uniform(0.2, 0.95), rng.uniform(0.2, 0.9), max(rng.normal(-0.3, 0.8), 0)
    queue = [WBC] * rng.choice(3, p=(0.01, 0.95, 0.04)) + [RBC] * int(np.clip(rng.normal(12.1, 4.2), 1, 27))
    queue += [PLATELET] * rng.choice(6, p=(0.43, 0.26, 0.20, 0.07, 0.03, 0.01))
    placed, boxes = [], []
    for label in queue:
        kind = list(WBC_KINDS)[rng.choice(len(WBC_KINDS), p=[k[0] for k in WBC_KINDS.values()])]
        mean, deviation = WBC_KINDS[kind][1] if label == WBC else DIAMETER[label]
        diameter = scale * min(max(rng.normal(mean, deviation), 0.6 * mean), 1.4 * mean)
        r, blur = diameter / 2, focus * rng.uniform(0.8, 1.5)
        gaps = ([rng.uniform(0.42, 1), 0.88, 1], [1, 1, 1], [0.95, 1, 1.2])[label]
        centre = _place(rng, (width, height), INSET[label] * r, r, placed, gaps, cluster * (label == RBC))
        if centre is None:
            continue
        if label == RBC:
            patch, cover = _red_cell(rng, diameter, paleness, specks, blur)
        else:
            patch, cover = _white_cell(rng, kind, diameter, blur) if label == WBC else _platelet(rng, diameter, blur)
        size = len(cover)
        left, top = (round(float(c)) - size // 2 + MARGIN for c in centre)
        ys, xs = np.nonzero(cover > MASK_LEVEL)
        ys, xs = ys + top - MARGIN, xs + left - MARGIN
        inside = (ys >= 0) & (ys < height) & (xs >= 0) & (xs < width)
        if inside.mean() < MIN_VISIBLE:
            continue
        spot = np.s_[max(top, 0) : top + size, max(left, 0) : left + size]  # on the canvas, and the same on the patch
        part = np.s_[max(-top, 0) : rows - top, max(-left, 0) : columns - left]
        if label == RBC:  # two thicknesses do not add up in full: the camera's curve flattens dark overlaps
            low, high = np.minimum(thickness[spot], patch[part]), np.maximum(thickness[spot], patch[part])
            thickness[spot] = high + 0.25 * low
        else:
            other[spot] += patch[part]
            veil[spot] = np.maximum(veil[spot], cover[part])
        placed.append((label, *centre, r))
        ys, xs = ys[inside], xs[inside]
        boxes.append((xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))

    # unsharp masking gives the dark rim and the bright halo of a slightly defocused edge
    thickness += rng.uniform(0.2, 0.6) * (thickness - _blur(thickness, int(4 * scale) + 1))
    stain = RBC_STAIN * rng.uniform(0.88, 1.12)
    stain[1, 2] *= rng.uniform(0.4, 1.3)  # from mauve to brown
    absorbed = thickness[..., None] * stain[0] + (thickness * np.abs(thickness))[..., None] * stain[1]
    absorbed = absorbed * (1 - 0.7 * veil[..., None]) + other * rng.uniform(0.88, 1.12)
    fringe = rng.integers(-1, 2, (3, 2)) + MARGIN  # each colour lands up to a pixel aside, as through a plain lens
    absorbed = np.stack([absorbed[fy : fy + height, fx : fx + width, c] for c, (fy, fx) in enumerate(fringe)], -1)
    image = _blur(_background(rng, height, width) * np.exp(-absorbed), 1, int(rng.integers(1, 3)))
    blocks = np.float32(rng.normal(0, 0.8, (height // 8 + 1, width // 8 + 1, 3)))  # JPEG's 8x8 colour blocks
    image += np.repeat(np.repeat(blocks, 8, 0), 8, 1)[:height, :width]
    image += rng.uniform(0.8, 1.7) * _noise(rng, (height, width), 1)[..., None]
    image = np.clip(np.rint(image), 0, 255).astype(np.uint8)
    return image, np.array(boxes, np.float32).reshape(-1, 4), np.array([label for label, *_ in placed], np.int64)


def main() -> None:
    """Writes the picture of `fastrcnn demo`."""
    from pathlib import Path

    import torch
    from torchvision.io import write_jpeg

    path = Path(__file__).parents[1] / "assets" / "demo.jpg"
    image, boxes, _ = render_cells(DEMO_SEED)
    write_jpeg(torch.from_numpy(image.transpose(2, 0, 1).copy()), str(path), quality=95)
    print(f"{path}: {len(boxes)} cells")


if __name__ == "__main__":
    main()
