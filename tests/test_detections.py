"""Detections as tables, files and pictures."""

import csv
import io
import json
import math

import numpy as np
import pytest
import torch
from conftest import picture, tiny_model
from PIL import Image

from fastrcnn import Detections, Detector
from fastrcnn.inference.draw import _spots, colour_of

NAMES = ["red", "white", "platelet"]
BOXES = torch.tensor([[10.0, 20, 50, 60], [0.5, 1.25, 30, 30], [70, 5, 130, 44]])


def three(**more) -> Detections:
    return Detections(
        BOXES.clone(), torch.tensor([0.9, 0.75, 0.125]), torch.tensor([2, 0, 2]), NAMES, [4, 5, 9], **more
    )


def test_it_says_what_it_is_in_a_line():
    assert repr(three()) == "Detections(3 objects: 2 platelet, 1 red, best 0.90)"
    assert repr(three()[:0]) == "Detections(0 objects)"


def test_equal_are_the_same_objects_with_the_same_names():
    assert three() == three() and three(source="a.jpg") == three(source="b.jpg")
    other = three()
    other.scores[1] += 1e-6
    assert three() != other and three() != three()[:2] and three() != three(features=torch.zeros(3, 2)) and three() != 3
    renamed = three()
    renamed.class_names = ["a", "b", "c"]
    assert three() != renamed
    assert three(features=torch.ones(3, 2)) == three(features=torch.ones(3, 2))


def test_filter_takes_scores_and_names():
    assert three().filter(0.5).scores.tolist() == [0.8999999761581421, 0.75]
    assert three().filter(classes=["platelet"]).names == ["platelet"] * 2
    assert len(three().filter(0.8, {"red"})) == 0 and three().filter() == three()
    with pytest.raises(ValueError, match=r"classes: .*red, white, platelet, got blue"):
        three().filter(classes=["blue"])


def test_a_selection_keeps_features_and_source():
    found = three(class_scores=torch.arange(9.0).view(3, 3), features=torch.arange(6.0).view(3, 2), source="a.jpg")[
        [2, 0]
    ]
    assert found.features.tolist() == [[4, 5], [0, 1]] and found.class_scores[0].tolist() == [6, 7, 8]
    assert found.source == "a.jpg"


def test_yolos_lines_by_hand():
    """Middle and size over a picture of 100 x 80; the third box is cut at its right side."""
    assert three().to_yolo((80, 100)) == ["2 0.3 0.5 0.4 0.5", "0 0.1525 0.195312 0.295 0.359375",
                                          "2 0.85 0.30625 0.3 0.4875"]  # fmt: skip


def test_columns_pandas_and_arrow_hold_the_same():
    columns = three().to_columns()
    assert list(columns) == ["x1", "y1", "x2", "y2", "score", "label", "name"]
    assert columns["x2"] == [50, 30, 130] and columns["name"] == ["platelet", "red", "platelet"]
    pandas, pyarrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    assert three().to_pandas().to_dict("list") == columns
    table = three().to_arrow()
    assert table.to_pydict() == columns and table.schema.field("score").type == pyarrow.float32()
    assert three()[:0].to_arrow().schema == table.schema and isinstance(three()[:0].to_pandas(), pandas.DataFrame)


def test_supervision_takes_them():
    supervision = pytest.importorskip("supervision")
    found = three().to_supervision()
    assert isinstance(found, supervision.Detections) and found.data["class_name"].tolist() == three().names
    assert np.array_equal(found.xyxy, BOXES.numpy())


def test_save_writes_what_the_suffix_says(tmp_path):
    pixels = np.zeros((80, 140, 3), np.uint8)
    for suffix in ("jpg", "png"):
        path = three().save(tmp_path / f"a.{suffix}", pixels)
        assert Image.open(path).size == (140, 80)
    assert np.array_equal(np.array(Image.open(path)), three().draw(pixels).permute(1, 2, 0).numpy())
    assert json.loads(three().save(tmp_path / "a.json").read_text()) == three().to_coco()
    rows = list(csv.reader(io.StringIO(three().save(tmp_path / "a.csv").read_text())))
    assert (
        rows[0][:2] == ["x1", "y1"]
        and rows[2] == ["0.5", "1.25", "30.0", "30.0", "0.75", "0", "red"]
        and len(rows) == 4
    )
    assert three().save(tmp_path / "a.txt", pixels).read_text().splitlines() == three().to_yolo((80, 140))
    if pytest.importorskip("pyarrow"):
        from pyarrow import parquet

        assert parquet.read_table(three().save(tmp_path / "a.parquet")) == three().to_arrow()
    with pytest.raises(ValueError, match=r"\.gif"):
        three().save(tmp_path / "a.gif", pixels)


def test_a_detector_leaves_the_picture_with_what_it_found(tmp_path, monkeypatch):
    Image.fromarray(picture(64, 96).permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    (found,) = Detector(tiny_model(), device="cpu")(tmp_path / "a.png")
    assert torch.equal(found.draw(), found.draw(tmp_path / "a.png")) and found.to_yolo() == found.to_yolo((64, 96))
    shown = np.array(Image.open(io.BytesIO(found[:3]._repr_png_())))
    assert np.array_equal(shown, found[:3].draw().permute(1, 2, 0).numpy())
    monkeypatch.setattr(Image.Image, "show", lambda self: seen.append(self.size))
    seen = []
    found.show()
    assert seen == [(96, 64)]
    alone = three()
    assert alone._repr_png_() is None
    with pytest.raises(ValueError, match="do not know their picture"):
        alone.draw()


def test_labels_can_be_hidden_and_lines_be_thick():
    plain = np.full((100, 160, 3), 128, np.uint8)
    changed = (three()[:1].draw(plain, line_width=3, labels=False) != 128).any(0)
    assert changed[20:61, 10:13].all() and changed[20:61, 48:51].all() and changed[20:23, 10:51].all()
    assert changed.sum() == 41 * 41 - 35 * 35


def texts_of(boxes: list, width: float, height: float, size: tuple[int, int]):
    return [spot for spot in _spots(boxes, [(0, 0, width, height)] * len(boxes), 1.0, size) if spot is not None]


@pytest.mark.parametrize("size", [(60, 40), (640, 480), (5000, 3000)])
def test_labels_lie_in_the_picture_and_never_over_each_other(size):
    g = torch.Generator().manual_seed(1)
    corner = torch.rand(60, 2, generator=g) * torch.tensor(size)
    boxes = torch.cat([corner, corner + torch.rand(60, 2, generator=g) * torch.tensor(size) / 4], 1).tolist()
    unit = max(1.0, max(size) / 640)
    spots = texts_of(boxes, 50 * unit, 9 * unit, size)
    assert spots
    for n, (x1, y1, x2, y2) in enumerate(spots):
        assert x1 >= 0 and y1 >= 0 and x2 <= max(size[0], 52 * unit) + 1e-6 and y2 <= size[1] + 1e-6
        for a1, b1, a2, b2 in spots[:n]:
            assert x2 <= a1 or a2 <= x1 or y2 <= b1 or b2 <= y1
    assert len(spots) > 30 or size == (60, 40)


def test_a_crowd_keeps_the_labels_of_its_best():
    """Ninety boxes on one place: what finds room is the first few."""
    boxes = [[40.0, 40, 60, 60]] * 90
    kept = _spots(boxes, [(0, 0, 30, 9)] * 90, 1.0, (100, 100))
    found = [n for n, spot in enumerate(kept) if spot is not None]
    assert found and found == list(range(len(found))) and len(found) < 10


def test_colours_are_the_labels_own_and_far_apart():
    found = [colour_of(k) for k in range(20)]
    assert found == [colour_of(k) for k in range(20)]
    assert min(math.dist(a, b) for n, a in enumerate(found) for b in found[:n]) > 20
    both, one = three(), three()[[2]]
    plain = np.zeros((80, 140, 3), np.uint8)
    assert torch.equal(both.draw(plain)[:, 30, 70], one.draw(plain)[:, 30, 70])  # whoever else is on the picture
