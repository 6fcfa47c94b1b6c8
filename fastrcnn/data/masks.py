"""The box round a segmentation of COCO's: polygons, a flat list as VIA writes it, run lengths plain or compressed."""

import math

MOST_RUNS = 1 << 20


def box_of_segmentation(given) -> list[float]:
    """[x, y, width, height] in pixels. Raises ValueError for what is no segmentation."""
    if isinstance(given, dict):
        return _box_of_runs(given)
    polygons = given if isinstance(given, list) and given and isinstance(given[0], list) else [given]
    xs, ys = [], []
    for polygon in polygons:
        numbers = isinstance(polygon, list) and all(
            isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < 1e9 for v in polygon
        )
        if not numbers or len(polygon) % 2 or len(polygon) < 4:
            raise ValueError("segmentation: expected polygons x, y, x, y, ... of finite numbers, or run lengths")
        xs += polygon[::2]
        ys += polygon[1::2]
    return [float(min(xs)), float(min(ys)), float(max(xs) - min(xs)), float(max(ys) - min(ys))]


def _uncompressed(text: str) -> list[int]:
    """The run lengths in COCO's compressed text: 5 bits a character, less significant ones first, each run from the
    third on as the difference to the one two before."""
    runs: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > 40:
            raise ValueError("segmentation: counts: no run lengths")
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            if code & 16:
                value -= 1 << shift
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            value = shift = 0
    if shift:
        raise ValueError("segmentation: counts: no run lengths")
    return runs


def _box_of_runs(given: dict) -> list[float]:
    size, counts = given.get("size"), given.get("counts")
    if not (isinstance(size, list) and len(size) == 2 and all(type(v) is int and 0 < v < 2**31 for v in size)):
        raise ValueError("segmentation: size: expected height, width")
    if isinstance(counts, str) and len(counts) <= MOST_RUNS:
        counts = _uncompressed(counts)
    if not isinstance(counts, list) or len(counts) > MOST_RUNS or any(type(v) is not int or v < 0 for v in counts):
        raise ValueError("segmentation: counts: expected run lengths, whole numbers from 0 up")
    height, width = size
    left = top = math.inf
    right = bottom = at = 0
    for k, count in enumerate(counts):
        if k % 2 and count:  # columns of a mask that runs down them
            first, last = divmod(at, height), divmod(at + count - 1, height)
            left, right = min(left, first[0]), max(right, last[0] + 1)
            whole = last[0] > first[0]
            top, bottom = min(top, 0 if whole else first[1]), max(bottom, height if whole else last[1] + 1)
        at += count
    if at != height * width or right == 0:
        raise ValueError(f"segmentation: counts: expected runs of {height} x {width} pixels, some of them set")
    return [float(left), float(top), float(right - left), float(bottom - top)]
