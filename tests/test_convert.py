"""data/convert.py: what is hard to say in another format, and comes back all the same, or is counted."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from fastrcnn.data import convert, open_dataset


def written(folder, boxes, names=("a.png", "b.png"), categories=("cat", "dog")):
    """A COCO file of pictures with one box each, and the pictures that are not there yet."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name in names:
        if not (folder / "images" / name).exists():
            Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(folder / "images" / name, "PNG")
    images = [dict(id=n, file_name=name, width=60, height=40) for n, name in enumerate(names, 1)]
    rows = [dict(id=n, image_id=n, category_id=1, bbox=box, area=1, iscrowd=0) for n, box in enumerate(boxes, 1)]
    content = dict(images=images, annotations=rows,
                   categories=[dict(id=n, name=name) for n, name in enumerate(categories, 1)])  # fmt: skip
    (folder / "train.json").write_text(json.dumps(content))
    return folder


def boxes_of(dataset) -> dict[str, list]:
    return {dataset.picture(i).name: [row["bbox"] for row in dataset.rows([i])] for i in range(len(dataset))}


@pytest.mark.parametrize("first", [
    [-3, 2, 10, 10], [-1, -1, 10, 10],  # whole, and before the first pixel
    [5.000001, 5, 10, 10], [5.0000000001, 5, 9.9999999999, 10],  # whole but for rounding, or nearly so
    [0.5, 5, 10.5, 10], [1, 1, 1, 1],
])  # fmt: skip
def test_boxes_of_vocs_file_stay_where_they_are(tmp_path, first):
    boxes = [first, [7, 8, 20, 10]]
    done, _ = convert(written(tmp_path / "in", boxes), "voc", tmp_path / "out")
    assert done["boxes"] == 2
    found = boxes_of(open_dataset(tmp_path / "out"))
    assert [found["a.png"], found["b.png"]] == [[pytest.approx(box, abs=2e-6)] for box in boxes]


def test_a_box_without_a_width_moves_no_other(tmp_path):
    done, _ = convert(written(tmp_path / "in", [[5, 5, 0, 10], [7, 8, 20, 10]]), "voc", tmp_path / "out")
    assert done["boxes"] == 1 and done["boxes that VOC cannot say (no width or height)"] == 1
    dataset = open_dataset(tmp_path / "out")
    assert boxes_of(dataset) == {"a.png": [], "b.png": [[7, 8, 20, 10]]} and not dataset.left_out


def test_a_missing_picture_does_not_choose_how_the_others_are_written(tmp_path):
    folder = written(tmp_path / "in", [[5.5, 5, 9, 10], [7, 8, 20, 10]])
    (folder / "images" / "a.png").unlink()
    convert(folder, "voc", tmp_path / "out")
    assert boxes_of(open_dataset(tmp_path / "out")) == {"b.png": [[7, 8, 20, 10]]}


@pytest.mark.parametrize("to", ["coco", "voc", "yolo"])
def test_names_with_blanks_and_dots(tmp_path, to):
    names, boxes = ("my cat.v1.png", "my cat.v2.png"), [[1, 2, 10, 10], [7, 8, 20, 10]]
    convert(written(tmp_path / "in", boxes, names), to, tmp_path / "out")
    found = boxes_of(open_dataset(tmp_path / "out", split="train"))
    assert {name: [pytest.approx(b, abs=1e-6) for b in rows] for name, rows in found.items()} == {
        name: [box] for name, box in zip(names, boxes)}  # fmt: skip


@pytest.mark.parametrize("to", ["coco", "voc"])
def test_pictures_without_a_suffix_have_a_file_each(tmp_path, to):
    boxes = [[1, 2, 10, 10], [7, 8, 20, 10]]
    convert(written(tmp_path / "in", boxes, ("one", "two")), to, tmp_path / "out")
    assert boxes_of(open_dataset(tmp_path / "out")) == {"one": [boxes[0]], "two": [boxes[1]]}
    done, _ = convert(tmp_path / "in", "yolo", tmp_path / "yolo")
    assert done["pictures whose suffix YOLO does not know"] == 2


def test_relative_links_are_followed(tmp_path):
    folder = written(tmp_path / "in", [[1, 2, 10, 10], [7, 8, 20, 10]])
    (folder / "store").mkdir()
    os.rename(folder / "images" / "a.png", folder / "store" / "a.png")
    os.symlink("../store/a.png", folder / "images" / "a.png")
    convert(folder, "yolo", tmp_path / "far" / "away")
    dataset = open_dataset(tmp_path / "far" / "away")
    assert len(dataset) == 2 and all(dataset[i][0].shape == (3, 40, 60) for i in range(2))


def test_class_names_that_look_like_another_files_grammar(tmp_path):
    names = ["zebra: plain", "#1", "background", "a & b <c>"]
    convert(written(tmp_path / "in", [[1, 2, 10, 10], [7, 8, 20, 10]], categories=names), "voc", tmp_path / "out")
    assert open_dataset(tmp_path / "out").class_names == names
    (tmp_path / "out" / "labels.txt").unlink()
    (tmp_path / "out" / "labelmap.txt").write_text("# label:color:parts:actions\nbackground:0,0,0::\ndog:1,2,3::\n")
    assert open_dataset(tmp_path / "out").class_names == ["dog", "zebra: plain"]
