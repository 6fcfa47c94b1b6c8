import inspect
from collections import Counter

import numpy as np
import pytest

from fastrcnn.data import rendered_cells
from fastrcnn.data.rendered_cells import PLATELET, RBC, WBC, render_cells

SEEDS = range(12)


@pytest.fixture(scope="module")
def pictures():
    return [render_cells(seed) for seed in SEEDS]


def test_shapes_and_types(pictures):
    for image, boxes, labels in pictures:
        assert image.shape == (480, 640, 3) and image.dtype == np.uint8
        assert boxes.shape == (len(labels), 4) and boxes.dtype == np.float32 and labels.dtype == np.int64
        assert set(labels.tolist()) <= {RBC, WBC, PLATELET} and (RBC, WBC, PLATELET) == (0, 1, 2)


def test_boxes_lie_in_the_picture_and_have_an_area(pictures):
    for image, boxes, _ in pictures:
        height, width = image.shape[:2]
        assert boxes.min() >= 0 and boxes[:, 2].max() <= width and boxes[:, 3].max() <= height
        assert (boxes[:, 2:] - boxes[:, :2]).min() >= 1


def test_a_seed_gives_one_picture_and_another_seed_another(pictures):
    again = render_cells(3)
    assert all(np.array_equal(a, b) for a, b in zip(again, pictures[3]))
    assert not np.array_equal(pictures[3][0], pictures[4][0])
    state = np.random.get_state()[1].copy()
    render_cells(5, 60, 80)
    assert np.array_equal(state, np.random.get_state()[1])  # numpy's global generator is left alone


@pytest.mark.parametrize("height, width", [(240, 320), (97, 131), (320, 240), (64, 64)])
def test_any_size_shows_about_as_many_cells_and_smaller_ones(height, width):
    counts, sizes = [], []
    for seed in range(4):
        image, boxes, _ = render_cells(seed, height, width)
        assert image.shape == (height, width, 3)
        assert boxes[:, 2].max() <= width and boxes[:, 3].max() <= height
        counts.append(len(boxes))
        sizes.append(np.median(boxes[:, 3] - boxes[:, 1]))
    assert 5 <= np.mean(counts) <= 30
    assert np.mean(sizes) == pytest.approx(100 * (height * width / (480 * 640)) ** 0.5, rel=0.35)


def test_the_mixture_of_cells(pictures):
    counts = Counter(label for _, _, labels in pictures for label in labels.tolist())
    assert counts[RBC] > 5 * counts[WBC] > 0 and counts[PLATELET] > 0
    boxes = np.concatenate([b for _, b, _ in pictures])
    labels = np.concatenate([la for _, _, la in pictures])
    size = {k: np.median((boxes[:, 2] - boxes[:, 0])[labels == k]) for k in (RBC, WBC, PLATELET)}
    assert size[WBC] > size[RBC] > 2 * size[PLATELET]


def test_cells_are_darker_than_the_slide_and_white_cells_the_darkest(pictures):
    inside = {RBC: [], WBC: [], PLATELET: []}
    background = []
    for image, boxes, labels in pictures:
        green = image[..., 1].astype(float)
        free = np.ones(green.shape, bool)
        for (x1, y1, x2, y2), label in zip(boxes.astype(int), labels.tolist()):
            free[y1:y2, x1:x2] = False
            w, h = (x2 - x1) // 4, (y2 - y1) // 4
            inside[label].append(green[y1 + h : y2 - h, x1 + w : x2 - w].mean())
        background.append(green[free].mean())
    assert np.mean(background) > 170
    assert np.mean(inside[WBC]) < np.mean(inside[RBC]) < np.mean(background) - 15
    assert np.mean(inside[PLATELET]) < np.mean(background) - 15


@pytest.mark.parametrize("seed", range(6))
def test_boxes_are_tight(seed, monkeypatch):
    # One cell in the middle of an empty slide: its box is where the stain is.
    def in_the_middle(rng, frame, inset, r, others, *rest):
        return None if others else (frame[0] / 2, frame[1] / 2)

    monkeypatch.setattr(rendered_cells, "_place", in_the_middle)
    image, boxes, _ = render_cells(seed)
    assert len(boxes) == 1
    green = image[..., 1].astype(float)
    stained = green < 0.92 * np.median(green)
    x1, y1, x2, y2 = boxes[0].tolist()
    columns = np.nonzero(stained[int(y1) : int(y2)].sum(0) > 5)[0]  # a speck of dust has fewer pixels
    rows = np.nonzero(stained[:, int(x1) : int(x2)].sum(1) > 5)[0]
    left, top, right, bottom = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    assert x1 - 4 <= left and y1 - 4 <= top and right <= x2 + 4 and bottom <= y2 + 4
    assert (right - left) * (bottom - top) > 0.85 * (x2 - x1) * (y2 - y1)


def test_it_needs_numpy_and_nothing_else():
    source = inspect.getsource(rendered_cells)
    imports = {line.split()[1] for line in source.splitlines() if line.startswith(("import ", "from "))}
    assert imports == {"__future__", "numpy"}
