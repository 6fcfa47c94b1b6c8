"""Which box of the same group each box overlaps most."""

import numpy as np

BLOCK = 1 << 16  # boxes whose pairs are in memory at a time


def best_overlap(
    boxes: np.ndarray, groups: np.ndarray, others: np.ndarray, other_groups: np.ndarray, of_box: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """(IoU float64 [N], place int64 [N] among `others`) of the box of the same group that each box overlaps most, the first
    of equals; 0 and -1 where there is none.

    boxes, others: [N, 4], [M, 4] x, y, width, height; groups, other_groups: int64 [N], [M]; of_box: the share of the box
    that is covered in place of the IoU.
    """
    order = np.argsort(other_groups, kind="stable")
    first, last = (np.searchsorted(other_groups[order], groups, side) for side in ("left", "right"))
    best, place = np.zeros(len(boxes)), np.full(len(boxes), -1)
    for start in range(0, len(boxes), BLOCK):
        some = start + np.flatnonzero((last > first)[start : start + BLOCK])
        if not len(some):
            continue
        counts = last[some] - first[some]
        begins = np.cumsum(counts) - counts
        # A row for each pair of a box and another of its group.
        row = np.repeat(some, counts)
        other = order[np.arange(len(row)) + np.repeat(first[some] - begins, counts)]
        a, b = boxes[row], others[other]
        sides = np.minimum(a[:, :2] + a[:, 2:], b[:, :2] + b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
        shared = sides.clip(0).prod(1)
        whole = a[:, 2:].prod(1) if of_box else a[:, 2:].prod(1) + b[:, 2:].prod(1) - shared
        overlap = np.divide(shared, whole, out=np.zeros(len(row)), where=whole > 0)
        best[some] = np.maximum.reduceat(overlap, begins)
        largest = np.where(overlap == np.repeat(best[some], counts), other, np.iinfo(np.int64).max)
        place[some] = np.minimum.reduceat(largest, begins)
    return best, place
