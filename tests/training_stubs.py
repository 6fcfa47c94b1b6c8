"""Small models and pictures for the tests of training."""

import json

import torch
from conftest import tiny_options
from PIL import Image
from torch import nn

from fastrcnn.data.rendered_cells import render_cells
from fastrcnn.models import faster_rcnn
from fastrcnn.models.build import merge
from fastrcnn.models.frame import Frame
from fastrcnn.models.preprocess import DataPreprocessor
from fastrcnn.models.profiles import get_profile
from fastrcnn.training import Recipe

CLASSES = ["red", "white", "platelet"]
# Nothing but the loop itself: a constant rate, no change of the pictures.
PLAIN = Recipe("plain", epochs=1, batch_size=1, base_batch=1, lr=0.1, momentum=0.0, weight_decay=0.0, milestones=(),
               warmup=0, flip=0.0)  # fmt: skip


class Scripted(nn.Module):
    """Gives the losses it is told, whatever it sees, with a gradient of one for `weight` and `bias`, and remembers them."""

    reads_labels, num_classes, class_names, config = False, 1, None, None
    outside = staticmethod(lambda targets: targets)
    inside = staticmethod(lambda targets, count, device: targets)

    def __init__(self, values=()):
        super().__init__()
        self.backbone, self.neck = nn.Identity(), None
        self.data_preprocessor = DataPreprocessor(get_profile("mmdet"), 8, 8)
        self.weight = nn.Parameter(torch.zeros(1, 1, dtype=torch.float64))
        self.bias = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.values, self.trace = values, []

    def prepare(self, images, sizes, least):
        return torch.stack(images), Frame(torch.zeros(len(images), 2), (8, 8), torch.ones(len(images), 2))

    def losses(self, batch, frame, targets):
        value = self.values[len(self.trace)] if self.values else 0.0
        self.trace.append(self.bias.item())
        return dict(loss_a=self.weight.sum() + self.bias.sum() - (self.weight + self.bias).detach().sum() + value,
                    loss_b=self.weight.sum() * 0)  # fmt: skip


def pictures(count: int = 5, labels=(0,)):
    boxes = torch.tensor([[1.0, 1.0, 6.0, 6.0]] * len(labels)).reshape(-1, 4)
    return [(torch.full((3, 8, 8), i, dtype=torch.uint8), dict(boxes=boxes, labels=torch.tensor(labels, dtype=torch.int64)))
            for i in range(count)]  # fmt: skip


def tiny(name: str = "r18_fpn", seed: int = 0, **overrides):
    """A detector of a few thousand weights, all of which train."""
    torch.manual_seed(seed)
    training = dict(backbone=dict(frozen_stages=-1, norm_eval=False))
    model = faster_rcnn(name, 3, **merge(merge(tiny_options(name), training), overrides))
    model.class_names = CLASSES
    return model


def cells(folder, count: int = 6, height: int = 64, width: int = 96, first: int = 0):
    """A COCO file of rendered pictures in `folder`; the last one of them has no object."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for n in range(count):
        picture, boxes, labels = render_cells(first + n, height, width)
        Image.fromarray(picture).save(folder / "images" / f"{n}.png")
        images.append(dict(id=n, file_name=f"{n}.png", width=width, height=height))
        for (x1, y1, x2, y2), label in zip(boxes.tolist(), labels.tolist() if n + 1 < count else ()):
            annotations.append(dict(id=len(annotations), image_id=n, category_id=label + 1, bbox=[x1, y1, x2 - x1, y2 - y1],
                                    area=(x2 - x1) * (y2 - y1), iscrowd=0))  # fmt: skip
    categories = [dict(id=i + 1, name=name) for i, name in enumerate(CLASSES)]
    path = folder / "all.json"
    path.write_text(json.dumps(dict(images=images, annotations=annotations, categories=categories)))
    return path
