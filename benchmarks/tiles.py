"""Tiles of a large picture beside its parts alone: what is found, what is found twice, how long it takes.

    python benchmarks/tiles.py --bccd path/to/bccd [--tile 480] [--overlap 0.2] [--save picture.png]

The picture is 6 x 6 photographs of BCCD's validation set side by side, 3840 x 2880, with their truth. An object counts as
found when a detection of its class overlaps it by half (IoU); a detection is double when the object that it overlaps by
half is found by a better one. "at borders" are the objects that a tile's border goes through.
"""

import argparse
import time
from pathlib import Path

import torch
from torchvision.ops import box_iou

from fastrcnn import Detections, Detector
from fastrcnn.data import open_dataset, read_image
from fastrcnn.inference.tiles import Tiled, tiles_of

DEMO = Path(__file__).parent.parent / "fastrcnn" / "assets" / "demo.safetensors"
ACROSS, WIDTH, HEIGHT = 6, 640, 480


def large_picture(folder: Path) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """(the picture [3, H, W], its parts, boxes [N, 4], labels [N])."""
    data = open_dataset(folder / "val.json", folder / "images")
    parts, boxes, labels = [], [], []
    for n in range(ACROSS * ACROSS):
        x, y = WIDTH * (n % ACROSS), HEIGHT * (n // ACROSS)
        _, target = data[n]
        parts.append(read_image(data.picture(n)))
        boxes.append(target["boxes"] + torch.tensor([x, y, x, y]))
        labels.append(target["labels"])
    rows = [torch.cat(parts[i : i + ACROSS], 2) for i in range(0, len(parts), ACROSS)]
    return torch.cat(rows, 1), parts, torch.cat(boxes), torch.cat(labels)


def judged(found: Detections, boxes, labels, cut) -> dict[str, float]:
    overlap = box_iou(found.boxes, boxes) * (found.labels[:, None] == labels)
    best, place = overlap.max(1)
    hit = best >= 0.5
    taken: set[int] = set()
    double = 0
    for row in torch.nonzero(hit)[:, 0].tolist():  # best scores first
        double += int(place[row]) in taken
        taken.add(int(place[row]))
    seen = torch.zeros(len(boxes), dtype=torch.bool)
    seen[list(taken)] = True
    return dict(
        found=len(found), recall=100 * seen.float().mean().item(), at_borders=100 * seen[cut].float().mean().item(),
        elsewhere=100 * seen[~cut].float().mean().item(), double=double, false=int((~hit).sum()),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bccd", type=Path, required=True)
    parser.add_argument("--tile", type=int, default=480)
    parser.add_argument("--overlap", type=float, default=0.2)
    parser.add_argument("--score", type=float, default=0.5)
    parser.add_argument("--save", type=Path)
    args = parser.parse_args()
    picture, parts, boxes, labels = large_picture(args.bccd)
    detector = Detector(str(DEMO), score_threshold=args.score)
    tiled = Tiled(detector, args.tile, args.overlap)
    height, width = picture.shape[1:]
    cut = torch.zeros(len(boxes), dtype=torch.bool)
    for tile in tiles_of(height, width, args.tile, args.overlap):
        x1, y1, x2, y2 = boxes.unbind(1)
        inside = (x1 < tile.x2) & (x2 > tile.x1) & (y1 < tile.y2) & (y2 > tile.y1)
        cut |= inside & ((x1 < tile.x1) | (x2 > tile.x2) | (y1 < tile.y1) | (y2 > tile.y2))
    print(f"{width} x {height}, {len(boxes)} objects, {int(cut.sum())} at borders of tiles")

    def alone() -> Detections:
        found = detector(parts)
        for n, part in enumerate(found):
            x, y = WIDTH * (n % ACROSS), HEIGHT * (n // ACROSS)
            part.boxes = part.boxes + torch.tensor([x, y, x, y])
        joined = {key: torch.cat([getattr(part, key) for part in found]) for key in ("boxes", "scores", "labels")}
        order = joined["scores"].argsort(descending=True)
        return Detections(*(joined[key][order] for key in ("boxes", "scores", "labels")), detector.class_names)

    ways = {"parts alone": alone, "tiles": lambda: tiled(picture)[0], "whole, shrunk": lambda: detector(picture)[0]}
    for name, way in ways.items():
        way()
        start, busy = time.perf_counter(), time.process_time()
        found = way()
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
        rows = judged(found, boxes, labels, cut)
        print(f"{name:14} " + ", ".join(f"{k} {v:.1f}" if isinstance(v, float) else f"{k} {v}" for k, v in rows.items())
              + f", {seconds:.2f} s, of the processor {busy:.2f} s")  # fmt: skip
        if name == "tiles" and args.save:
            found.save(args.save, picture)


if __name__ == "__main__":
    main()
