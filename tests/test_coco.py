"""data/coco.py, COCO's files, and evaluation/coco.py, COCO's average precision."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from fastrcnn.data import CocoDataset
from fastrcnn.data.coco import apply
from fastrcnn.evaluation import evaluate, evaluate_coco
from fastrcnn.models.profiles import get_profile

CATEGORIES = [dict(id=7, name="wbc"), dict(id=2, name="rbc"), dict(id=40, name="platelet")]


def annotation(n, image, category, bbox, iscrowd=0):
    return dict(id=n, image_id=image, category_id=category, bbox=bbox, area=bbox[2] * bbox[3], iscrowd=iscrowd)


ANNOTATIONS = [
    annotation(1, 5, 7, [10, 5, 20, 15]),
    annotation(2, 5, 40, [50, 30, 30, 30]),  # leaves the frame of 60 x 40
    annotation(3, 5, 2, [30, 10, 0.5, 10]),  # too narrow
    annotation(4, 5, 2, [70, 10, 10, 10]),  # outside
    annotation(5, 5, 2, [0, 0, 30, 20], iscrowd=1),
    annotation(6, 9, 2, [-4, 3, 10, 10]),
]


@pytest.fixture
def file(tmp_path):
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    images = []
    for n, name in ((5, "b.png"), (9, "a.png"), (11, "empty.png")):
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(tmp_path / "images" / name)
        images.append(dict(id=n, file_name=name, width=60, height=40))
    path = tmp_path / "train.json"
    path.write_text(json.dumps(dict(images=images, annotations=ANNOTATIONS, categories=CATEGORIES)))
    return path


def test_a_dataset(file):
    dataset = CocoDataset(file)
    assert len(dataset) == 3
    assert dataset.class_names == ["rbc", "wbc", "platelet"] and dataset.category_ids == [2, 7, 40]
    image, target = dataset[0]
    assert image.shape == (3, 40, 60) and image.dtype == torch.uint8
    assert torch.equal(image, torch.from_numpy(np.array(Image.open(file.parent / "images/b.png"))).permute(2, 0, 1))
    assert target["boxes"].tolist() == [[10, 5, 30, 20], [50, 30, 60, 40]] and target["boxes"].dtype == torch.float32
    assert target["labels"].tolist() == [1, 2] and target["labels"].dtype == torch.int64
    assert target["ignore_boxes"].tolist() == [[0, 0, 30, 20]] and target["image_id"] == 5
    assert dataset[1][1]["boxes"].tolist() == [[0, 3, 6, 13]]
    empty = dataset[2][1]
    assert empty["boxes"].shape == (0, 4) and empty["labels"].shape == (0,) and empty["ignore_boxes"].shape == (0, 4)


def test_the_image_folder_can_be_given(file, tmp_path):
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    assert CocoDataset(file, tmp_path / "elsewhere")[0][0].shape == (3, 40, 60)
    with pytest.raises(ValueError, match=r"b\.png"):
        CocoDataset(file)[0]


@pytest.mark.parametrize("content", [dict(images=[], annotations=[]), [1, 2]])
def test_another_format_is_refused(tmp_path, content):
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"a\.json: not a COCO annotation file.*categories"):
        CocoDataset(tmp_path / "a.json")


@pytest.mark.parametrize("change", [dict(image_id=77), dict(category_id=77)])
def test_an_annotation_of_nothing_is_named(file, change):
    content = json.loads(file.read_text())
    content["annotations"][1].update(change)
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="annotation 2"):
        CocoDataset(file)


def test_transforms_move_image_and_boxes_together(file):
    plain, flipped = CocoDataset(file), CocoDataset(file, transforms=v2.RandomHorizontalFlip(p=1.0))
    (image, target), (moved, after) = plain[0], flipped[0]
    assert torch.equal(moved, image.flip(2)) and type(moved) is torch.Tensor and type(after["boxes"]) is torch.Tensor
    assert after["boxes"].tolist() == [[30, 5, 50, 20], [0, 30, 10, 40]]
    assert after["labels"].tolist() == [1, 2] and after["image_id"] == 5
    assert torch.equal(plain[0][1]["boxes"], target["boxes"])  # the stored target has not moved


def test_ignore_regions_move_with_the_image(file):
    _, target = CocoDataset(file, transforms=v2.RandomHorizontalFlip(p=1.0))[0]
    assert target["ignore_boxes"].tolist() == [[30, 0, 60, 20]]


def test_boxes_that_leave_the_frame_are_dropped():
    target = dict(boxes=torch.tensor([[0.0, 0, 10, 10], [40, 20, 60, 40]]), labels=torch.tensor([1, 2]))
    image, moved = apply(v2.CenterCrop((20, 30)), torch.zeros(3, 40, 60, dtype=torch.uint8), target)
    assert image.shape == (3, 20, 30)
    assert moved["boxes"].tolist() == [[25, 10, 30, 20]] and moved["labels"].tolist() == [2]
    empty = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    assert apply(v2.RandomVerticalFlip(p=1.0), image, empty)[1]["boxes"].shape == (0, 4)


def truth_of(*boxes, labels=None, ignore=None):
    labels = [0] * len(boxes) if labels is None else labels
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    out = dict(boxes=boxes, labels=torch.tensor(labels, dtype=torch.int64))
    return out if ignore is None else dict(out, ignore_boxes=torch.tensor(ignore))


def result_of(*boxes, scores=None, labels=None):
    scores = torch.linspace(0.9, 0.5, len(boxes)) if scores is None else torch.tensor(scores)
    return dict(truth_of(*boxes, labels=labels), scores=scores)


A, B, C = [10.0, 10, 60, 60], [100.0, 20, 220, 160], [300.0, 300, 310, 312]


def test_a_perfect_answer_scores_100():
    targets = [truth_of(A, B, C, labels=[0, 1, 0]), truth_of(B, labels=[1])]
    results = [result_of(A, B, C, labels=[0, 1, 0]), result_of(B, labels=[1])]
    scores = evaluate_coco(targets, results, 2)
    assert [scores[k] for k in ("AP", "AP50", "AP75", "AR100")] == pytest.approx([100.0] * 4)
    assert [scores[k] for k in ("APs", "APm", "APl")] == pytest.approx([100.0] * 3)


def test_average_precision_by_hand():
    # One of two objects is found, first: precision 1 up to recall 0.5, which are 51 of COCO's 101 recall points.
    assert evaluate_coco([truth_of(A, B)], [result_of(A)], 1)["AP"] == pytest.approx(100 * 51 / 101, abs=0.01)
    # A wrong box ranks first: precision 1/2 throughout.
    assert evaluate_coco([truth_of(A)], [result_of(B, A)], 1)["AP"] == pytest.approx(50, abs=0.01)
    # An IoU of 0.8 counts at the thresholds 0.5, 0.55 ... 0.8.
    shifted = [10.0, 10, 60, 50]
    found = evaluate_coco([truth_of(A)], [result_of(shifted)], 1)
    assert (found["AP"], found["AP50"], found["AP75"]) == pytest.approx((70, 100, 100), abs=0.01)


def test_classes_are_kept_apart_and_averaged():
    targets = [truth_of(A, B, labels=[0, 1])]
    assert evaluate_coco(targets, [result_of(A, B, labels=[0, 0])], 2)["AP"] == pytest.approx(50, abs=0.01)
    assert evaluate_coco(targets, [result_of(A, B, labels=[1, 0])], 2)["AP"] == pytest.approx(0)


def test_detections_in_ignore_regions_do_not_count_against():
    targets = [truth_of(A, ignore=[[90.0, 10, 230, 170]])]
    assert evaluate_coco(targets, [result_of(B, A)], 1)["AP"] == pytest.approx(100)
    assert evaluate_coco([truth_of(A)], [result_of(B, A)], 1)["AP"] < 60


def test_sizes_without_objects_are_nan_and_nothing_found_is_zero():
    scores = evaluate_coco([truth_of(A)], [result_of(A)], 1)
    assert math.isnan(scores["APs"]) and math.isnan(scores["APl"]) and scores["APm"] == pytest.approx(100)
    assert evaluate_coco([truth_of(A)], [result_of()], 1)["AP"] == 0.0


class Oracle(torch.nn.Module):
    """A detector that knows the answers."""

    num_classes = 2

    def __init__(self, answers, profile):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.answers, self.label_offset, self.seen = answers, get_profile(profile).label_offset, 0

    def forward(self, images):
        assert not self.training and torch.is_inference_mode_enabled()
        answers = self.answers[self.seen : self.seen + len(images)]
        self.seen += len(images)
        return [dict(a, labels=a["labels"] + self.label_offset) for a in answers]


@pytest.mark.parametrize("profile", ["mmdet", "torchvision"])
@pytest.mark.parametrize("training", [True, False])
def test_evaluating_a_model_on_a_dataset(profile, training):
    answers = [result_of(A, B, labels=[0, 1]), result_of(B, labels=[1]), result_of(C, labels=[0])]
    dataset = [(torch.zeros(3, 8, 8, dtype=torch.uint8), dict(boxes=a["boxes"], labels=a["labels"])) for a in answers]
    model = Oracle(answers, profile).train(training)
    assert evaluate(model, dataset, batch_size=2)["AP"] == pytest.approx(100)
    assert model.seen == 3 and model.training == training
