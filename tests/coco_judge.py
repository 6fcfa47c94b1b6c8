"""Small annotation files, and pycocotools' opinion of what was found on them."""

import contextlib
import io
import json

import numpy as np
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

SIZE = 320, 240


class Fixed(nn.Module):
    """A detector that finds what it is told: rows (x, y, width, height, score, label) of each picture in turn."""

    reads_labels, label_offset = True, 0

    def __init__(self, rows, class_names=None, num_classes=None):
        super().__init__()
        self.weight, self.rows = nn.Parameter(torch.zeros(1)), iter(rows)
        self.class_names, self.num_classes = class_names, num_classes or len(class_names)

    def forward(self, images):
        assert len(images) == 1 and not self.training and torch.is_inference_mode_enabled()
        rows = torch.as_tensor(next(self.rows), dtype=torch.float64).reshape(-1, 6)
        boxes = torch.cat([rows[:, :2], rows[:, :2] + rows[:, 2:4]], 1)
        return [dict(boxes=boxes, scores=rows[:, 4], labels=rows[:, 5].long())]


def write(folder, content, name="a.json"):
    """The file, and a plain picture for each of its images that has none yet."""
    (folder / "images").mkdir(exist_ok=True)
    for image in content["images"]:
        path = folder / "images" / image["file_name"]
        if not path.exists():
            Image.new("RGB", (image["width"], image["height"])).save(path)
    (folder / name).write_text(json.dumps(content))
    return folder / name


def crowded(seed: int, category_ids=(7, 0, 3, 12), pictures: int = 12):
    """A file with everything that annotators write: areas of masks, crowds, slivers, boxes over the edge and outside, ids
    in no order, a category without objects; and rows as `Fixed` takes them, whose labels are places in the order of ids."""
    rng = np.random.default_rng(seed)
    used = sorted(category_ids)[:-1]
    ids = (rng.permutation(pictures) * 3).tolist()
    images = [dict(id=i, file_name=f"{i}.png", width=SIZE[0], height=SIZE[1]) for i in ids]
    annotations, rows = [], []
    for image in images:
        found = []
        for _ in range(rng.integers(0, 9)):
            corner, side = rng.uniform(-30, 330, 2), rng.uniform(0.3, 160, 2) * rng.choice([0.1, 1])
            box, label = [*corner.round(2).tolist(), *side.round(2).tolist()], int(rng.integers(len(used)))
            area, crowd = float(side.prod() * rng.uniform(0.2, 1)), int(rng.random() < 0.2)
            annotations.append(dict(id=len(annotations) + 1, image_id=image["id"], category_id=used[label], bbox=box,
                                    area=area, iscrowd=crowd))  # fmt: skip
            for near in np.array(box) + rng.normal(0, 0.06, (4, 4)) * [*side, *side]:
                score = round(rng.random(), 1)  # ties
                found.append([*np.abs(near), score, label if rng.random() < 0.8 else rng.integers(len(category_ids))])
        found += [[*rng.uniform(0, 200, 4), rng.random(), rng.integers(4)] for _ in range(rng.choice([2, 120]))]
        rows.append(sorted(found, key=lambda row: -row[4]))
    categories = [dict(id=i, name=f"c{i}") for i in category_ids]
    return dict(images=images, annotations=annotations, categories=categories), rows


def judge(content, rows, category_ids, **params) -> COCOeval:
    """pycocotools' evaluation of the same rows; category_ids by label."""
    found = [(image["id"], row) for image, rows_of_one in zip(content["images"], rows) for row in rows_of_one]
    results = [dict(image_id=image, category_id=category_ids[int(row[5])], bbox=list(map(float, row[:4])), score=row[4])
               for image, row in found]  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = content
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        for name, value in params.items():
            setattr(evaluation.params, name, value)
        evaluation.evaluate()
        evaluation.accumulate()
        if not params:
            evaluation.summarize()
    return evaluation
