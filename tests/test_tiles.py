"""Tiles of a large picture, put together: what lies across their borders is found as in the whole picture."""

import pytest
import torch
from conftest import picture, tiny_model
from torch import Tensor
from torchvision.ops import nms

from fastrcnn import Detections, Detector
from fastrcnn.inference.tiles import Tile, Tiled, merge_tiles, tiles_of

SCORES = {200: 0.9, 220: 0.8, 240: 0.7}


class Finder(Detector):
    """In the place of a detector: finds bright rectangles exactly, as far as a view shows them, by their brightness. A view
    of more than `most` pixels a side it sees too small to find anything under `least` pixels."""

    class_names, category_ids, channels, iou_threshold, device = ["bright"], [1], 3, 0.5, torch.device("cpu")

    def __init__(self, most: int = 10**6, least: int = 0):
        self.most, self.least = most, least

    def __call__(self, images, batch_size=None) -> list[Detections]:
        return [self.one(image) for image in (images if isinstance(images, list) else [images])]

    def one(self, image: Tensor) -> Detections:
        rows = []
        for value, score in SCORES.items():
            ys, xs = torch.nonzero(image[0] == value, as_tuple=True)
            if len(ys):
                box = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
                small = max(image.shape) > self.most and box[2] - box[0] < self.least
                rows += [] if small else [(score, [float(v) for v in box])]
        boxes = torch.tensor([box for _, box in rows]).reshape(-1, 4)
        scores = torch.tensor([score for score, _ in rows])
        return Detections(boxes, scores, torch.zeros(len(rows), dtype=torch.int64), ["bright"], [1])


def scene(height: int, width: int, *boxes) -> Tensor:
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for value, (x1, y1, x2, y2) in zip(SCORES, boxes):
        image[:, y1:y2, x1:x2] = value
    return image


@pytest.mark.parametrize("height, width, tile, overlap", [(100, 230, 64, 0.25), (64, 64, 64, 0.2), (30, 500, 128, 0.0),
                                                          (129, 128, 128, 0.5)])  # fmt: skip
def test_tiles_cover_the_picture_and_share_what_was_asked_for(height, width, tile, overlap):
    found, seen = tiles_of(height, width, tile, overlap), torch.zeros(height, width, dtype=torch.int64)
    for t in found:
        assert t.x2 - t.x1 == min(tile, width) and t.y2 - t.y1 == min(tile, height) and t.x1 >= 0 and t.y1 >= 0
        seen[t.y1 : t.y2, t.x1 : t.x2] += 1
    assert seen.min() == 1 or overlap
    assert seen.min() > 0
    xs = sorted({(t.x1, t.x2) for t in found})
    assert all(b1 - a2 <= -overlap * tile + 1 for (_, a2), (b1, _) in zip(xs, xs[1:]))


@pytest.mark.parametrize("blind", [False, True])
def test_objects_across_borders_are_those_of_the_whole_picture(blind):
    """A small one across one border, one across a corner of four tiles, and one larger than a tile; `blind`: the whole
    picture is too coarse for the small ones, which only tiles show."""
    image = scene(300, 400, (90, 40, 115, 60), (85, 85, 110, 110), (150, 120, 380, 290))
    expected = Finder().one(image)
    finder = Finder(200, 50) if blind else Finder()
    (found,) = Tiled(finder, 100, 0.3)([image])
    assert len(expected) == 3 and found == expected


def test_without_overlap_nothing_is_there_twice():
    image = scene(100, 200, (90, 40, 110, 60))
    (found,) = Tiled(Finder(), 100, 0.0)(image[None].unbind(0))
    assert found.boxes.tolist() == [[90, 40, 110, 60]]


def test_a_part_that_no_whole_object_covers_is_kept():
    """The whole picture too coarse, no overlap: better two halves than nothing."""
    image = scene(100, 200, (90, 40, 110, 60))
    (found,) = Tiled(Finder(150, 50), 100, 0.0)([image])
    assert sorted(found.boxes.tolist()) == [[90, 40, 100, 60], [100, 40, 110, 60]]


def test_a_whole_object_of_the_same_tile_is_another_one():
    """A part is left out for a whole object of its class that another tile shows; beside one in its own tile it stays."""
    boxes = torch.tensor([[60.0, 10, 110, 40], [80, 10, 110, 40], [80, 10, 110, 40]])
    one = Detections(boxes, torch.tensor([0.5, 0.9, 0.8]), torch.tensor([0, 0, 1]), ["a", "b"], [1, 2])
    cut = torch.tensor([False, True, True])
    assert len(merge_tiles([one], cut, 0.9)) == 3
    found = merge_tiles([one[:1], one[1:]], cut, 0.9)
    assert sorted(zip(found.labels.tolist(), found.boxes[:, 0].tolist())) == [(0, 60.0), (1, 80.0)]


def test_the_whole_picture_answers_for_what_no_tile_holds():
    """What it sees too small to tell apart from others: a tile that holds the object whole does not see it there."""

    class Dreamer(Finder):
        def one(self, image):
            found = super().one(image)
            if max(image.shape) <= 100:
                return found
            boxes = torch.tensor([[10.0, 10, 60, 60], [80, 20, 190, 90]])  # the second is wider than a tile
            return Detections(boxes, torch.tensor([0.95, 0.9]), torch.zeros(2, dtype=torch.int64), ["bright"], [1])

    (found,) = Tiled(Dreamer(), 100, 0.2)([scene(100, 300, (210, 40, 240, 60))])
    assert sorted(found.boxes.tolist()) == [[80, 20, 190, 90], [210, 40, 240, 60]]


def test_what_is_left_is_nms_of_the_whole_ones():
    """Against torchvision, of boxes that no border goes through."""
    g = torch.Generator().manual_seed(3)
    corner = torch.rand(200, 2, generator=g) * 100
    boxes, scores = (
        torch.cat([corner, corner + 20 + 20 * torch.rand(200, 2, generator=g)], 1),
        torch.rand(200, generator=g),
    )
    labels = torch.zeros(200, dtype=torch.int64)
    parts = [
        Detections(boxes[k : k + 50], scores[k : k + 50], labels[k : k + 50], ["a"], [1]) for k in range(0, 200, 50)
    ]
    found = merge_tiles(parts, torch.zeros(200, dtype=torch.bool), 0.4)
    keep = nms(boxes, scores, 0.4)
    assert torch.equal(found.boxes, boxes[keep]) and torch.equal(found.scores, scores[keep])
    assert torch.equal(merge_tiles(parts, torch.zeros(200, dtype=torch.bool), 0.4, 7).boxes, boxes[keep[:7]])


def test_a_small_picture_is_the_detectors_own_and_a_bad_one_is_an_answer(tmp_path):
    detector = Detector(tiny_model(), device="cpu", features=True)
    tiled, image = Tiled(detector, 96), picture(64, 96)
    assert tiled(image) == detector(image) and tiled.class_names == detector.class_names
    large = picture(96, 200)
    answers = list(Tiled(detector, 64, 0.25).stream([str(tmp_path / "none.jpg"), large]))
    assert isinstance(answers[0][2], ValueError) and answers[1][0] == 1 and len(answers[1][2]) > 10
    found = answers[1][2]
    assert found.class_scores.shape == (len(found), 3) and len(found.features) == len(found)
    assert (found.scores[:-1] >= found.scores[1:]).all()


@pytest.mark.parametrize(
    "arguments, name", [((0,), "tile"), ((1.5,), "tile"), ((64, 1.0), "overlap"), ((64, -0.1), "overlap")]
)
def test_bad_arguments_are_named(arguments, name):
    with pytest.raises(ValueError, match=name):
        Tiled(Finder(), *arguments)


def test_a_border_of_the_picture_cuts_nothing():
    assert tiles_of(50, 80, 100, 0.2) == [Tile(0, 0, 80, 50)]
