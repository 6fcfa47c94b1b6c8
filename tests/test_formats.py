"""What `detect` found, as CSV, Parquet, YOLO's text and crops, against its COCO file."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastrcnn import Detections
from fastrcnn.inference import formats
from fastrcnn.inference.formats import check_formats
from fastrcnn.inference.output import write_detections

NAMES, IDS = ["cell", "odd/../name"], [7, 9]


class Finder:
    """Two objects in a picture, in every third none."""

    class_names, category_ids = NAMES, IDS

    def stream(self, images, batch_size=None):
        for index, source in reversed(list(enumerate(images))):  # as they are done, not as they were asked for
            image = torch.from_numpy(np.array(Image.open(source))).permute(2, 0, 1)
            boxes = torch.tensor([[1.0, 2, 11.125, 22], [30, 20, 45, 31]])[: 0 if index % 3 == 2 else 2]
            scores, labels = torch.tensor([0.75, 0.5])[: len(boxes)], torch.tensor([0, 1])[: len(boxes)]
            yield index, image, Detections(boxes, scores, labels, NAMES, IDS)


@pytest.fixture
def out(tmp_path):
    sources = []
    for n in range(5):
        pixels = np.random.default_rng(n).integers(0, 256, (30, 40, 3), np.uint8)
        sources.append(str(tmp_path / f"{n}.png"))
        Image.fromarray(pixels).save(sources[-1])
    list(write_detections(Finder(), sources, tmp_path / "out", formats=("csv", "parquet", "yolo", "crops")))
    return tmp_path / "out"


def expected(out: Path) -> list[tuple]:
    content = json.loads((out / "detections.json").read_text())
    files = {i["id"]: i["file_name"] for i in content["images"]}
    names = {c["id"]: c["name"] for c in content["categories"]}
    rows = []
    for a in content["annotations"]:
        x, y, w, h = a["bbox"]
        rows.append((a["image_id"], files[a["image_id"]], x, y, x + w, y + h, a["score"], a["category_id"],
                     names[a["category_id"]]))  # fmt: skip
    return rows


def test_csv_and_parquet_hold_what_the_coco_file_holds(out):
    wanted = expected(out)
    assert [row[0] for row in wanted] == [1, 1, 2, 2, 4, 4, 5, 5] and len({row[1] for row in wanted}) == 4
    header, *rows = csv.reader((out / "detections.csv").open(newline=""))
    assert header == ["image_id", "file_name", "x1", "y1", "x2", "y2", "score", "category_id", "name"]
    assert [(int(r[0]), r[1], *map(float, r[2:7]), int(r[7]), r[8]) for r in rows] == wanted
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(out / "detections.parquet")
    assert table.column_names == header
    assert [tuple(row.values()) for row in table.to_pylist()] == [
        (*w[:2], *np.float32(w[2:7]).tolist(), *w[7:]) for w in wanted
    ]


def test_parquet_is_written_in_pieces(out, tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(formats, "ROWS", 3)
    sources = [str(tmp_path / f"{n}.png") for n in range(5)]
    list(write_detections(Finder(), sources, tmp_path / "pieces", formats=("parquet",)))
    file = parquet.ParquetFile(tmp_path / "pieces" / "detections.parquet")
    assert file.num_row_groups > 1 and file.read() == parquet.read_table(out / "detections.parquet")


def test_yolos_text_of_each_picture(out):
    assert sorted(p.name for p in (out / "labels").iterdir()) == [f"{n}.txt" for n in range(5)]
    assert (out / "labels" / "2.txt").read_text() == ""
    rows = [[float(v) for v in line.split()] for line in (out / "labels" / "0.txt").read_text().splitlines()]
    first = [0, 6.0625 / 40, 12 / 30, 10.125 / 40, 20 / 30]
    np.testing.assert_allclose(rows, [first, [1, 35 / 40, 25 / 30, 10 / 40, 10 / 30]], rtol=1e-5)


def test_crops_are_the_objects_pixels(out):
    found = sorted(str(p.relative_to(out)) for p in (out / "crops").rglob("*.jpg"))
    assert found == sorted(
        f"crops/{name}/{n}_{k}.jpg" for n in (0, 1, 3, 4) for k, name in ((1, "cell"), (2, "odd____name"))
    )
    assert Image.open(out / "crops" / "cell" / "0_1.jpg").size == (10, 20)
    assert Image.open(out / "crops" / "odd____name" / "0_2.jpg").size == (10, 10)  # cut at the picture's corner


def test_formats_are_checked_before():
    with pytest.raises(ValueError, match=r"format: .*parquet, yolo, crops, got xml"):
        check_formats(("json", "xml"))
