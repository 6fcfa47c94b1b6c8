"""data/coco.py and data/check.py, COCO's files, and evaluation/coco.py, COCO's average precision."""

import json
import math
import sys
from importlib.resources import files

import numpy as np
import pytest
import torch
from coco_judge import Fixed, crowded, judge, write
from PIL import Image
from torch.utils.data import ConcatDataset, Subset
from torchvision.transforms import v2

from fastrcnn import Detector
from fastrcnn.data import CocoDataset, read_through
from fastrcnn.data.rendered_cells import render_cells
from fastrcnn.data.transforms import apply
from fastrcnn.evaluation import evaluate, evaluate_coco, match_classes
from fastrcnn.evaluation.predict import predict
from fastrcnn.models import faster_rcnn
from fastrcnn.weights import infer_model

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
    return write(tmp_path, dict(images=images, annotations=ANNOTATIONS, categories=CATEGORIES), "train.json")


def changed(file, part, change, drop=()):
    """The file with the second entry of a part changed, or the whole part where `change` is no dict."""
    content = json.loads(file.read_text())
    if isinstance(change, dict):
        content[part][1].update(change)
    else:
        content[part] = change
    for key in drop:
        del content[part][1][key]
    file.write_text(json.dumps(content))
    return file


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


def test_what_is_left_out_or_cut_is_counted_and_the_file_kept_as_it_is(file):
    dataset = CocoDataset(file)
    assert dataset.left_out == {"cut at the edge": 2, "less than a pixel wide or high": 1, "outside the picture": 1}
    assert dataset.truth(range(3)).boxes.tolist() == [a["bbox"] for a in ANNOTATIONS]
    assert read_through(dataset) == {0: 1, 1: 1, 2: 1}
    dataset = CocoDataset(changed(file, "annotations", dict(bbox=[20, 20, 1, 1])))  # a pixel is enough
    assert [20, 20, 21, 21] in dataset.targets[0]["boxes"].tolist()


def test_the_image_folder_can_be_given(file, tmp_path):
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    assert CocoDataset(file, tmp_path / "elsewhere")[0][0].shape == (3, 40, 60)
    with pytest.raises(ValueError, match=r"b\.png"):
        CocoDataset(file)[0]
    with pytest.raises(ValueError, match=r"a\.png.*3 of 3 pictures"):
        read_through(CocoDataset(file))


NAN, INF = math.nan, math.inf
WRONG = [
    ("images", None, "images: expected a list"),
    ("images", [], "images: expected at least one"),
    ("images", ["a.png"], r"images\[0\]: expected an object"),
    ("images", dict(id=5), r"images\[0\] and \[1\] have the same id 5"),
    ("images", dict(id="5"), "have the same id 5"),  # 5 beside "5"
    ("images", dict(id=True), r"images\[1\] \(id True\): id: "),
    ("images", dict(id=1.5), "id: "),
    ("images", dict(file_name=7), r"images\[1\] \(id 9\): file_name: "),
    ("images", dict(width=0), "width: expected pixels"),
    ("images", dict(height=-40), "height: expected pixels"),
    ("images", dict(width=None), "width: .*None"),
    ("categories", [], "categories: expected at least one"),
    ("categories", dict(id=7), "have the same id 7"),
    ("categories", dict(name="wbc"), "have the same name 'wbc'"),
    ("categories", dict(id="red"), "id: expected a whole number, got 'red'"),
    ("categories", dict(name=None), "name: expected a text"),
    ("categories", dict(name=" "), "name: expected a text"),
    ("annotations", None, "annotations: expected a list"),
    ("annotations", [[1, 2]], r"annotations\[0\]: expected an object"),
    ("annotations", dict(image_id=77), r"annotations\[1\] \(id 2\): image_id: no image has the id 77"),
    ("annotations", dict(category_id=77), "category_id: no category has the id 77"),
    ("annotations", dict(bbox=[]), "bbox: expected four finite numbers"),
    ("annotations", dict(bbox=None), "bbox: "),
    ("annotations", dict(bbox=[1, 2, 3, 4, 0.5]), "bbox: "),
    ("annotations", dict(bbox=["1", "2", "3", "4"]), "bbox: "),
    ("annotations", dict(bbox=[True, 2, 3, 4]), "bbox: "),
    ("annotations", dict(bbox=[NAN, 2, 3, 4]), "bbox: .*nan"),
    ("annotations", dict(bbox=[1, 2, INF, 4]), "bbox: .*inf"),
    ("annotations", dict(bbox=[1e308, 2, 1e308, 4]), "bbox: "),
    ("annotations", dict(bbox=[1, 10**400, 3, 4]), "bbox: "),
    ("annotations", dict(bbox=[30, 20, -20, -15]), "bbox: .*negative size"),
    ("annotations", dict(iscrowd=2), "iscrowd: expected 0 or 1, got 2"),
    ("annotations", dict(iscrowd="no"), "iscrowd: "),
    ("annotations", dict(area=-1), "area: "),
    ("annotations", dict(area=NAN), "area: "),
    ("annotations", [annotation(1, 5, 7, [0.1, 0.2, 0.5, 0.4])] * 2, "relative coordinates"),
]


@pytest.mark.parametrize("part, change, message", WRONG)
def test_what_is_not_cocos_is_refused_by_file_and_entry(file, part, change, message):
    with pytest.raises(ValueError, match=rf"train\.json: .*{message}"):
        CocoDataset(changed(file, part, change))


@pytest.mark.parametrize("part, keys", [("images", ("id", "file_name", "width", "height")), ("categories", ("id", "name")),
                                        ("annotations", ("image_id", "category_id", "bbox"))])  # fmt: skip
def test_a_missing_key_is_named(file, part, keys):
    whole = file.read_text()
    for key in keys:
        with pytest.raises(ValueError, match=rf"train\.json: {part}\[1\].*: {key} is missing"):
            CocoDataset(changed(file, part, {}, [key]))
        file.write_text(whole)


def test_what_tools_write_otherwise_is_read(file):
    expected = CocoDataset(file)
    content = json.loads(file.read_text())
    for a in content["annotations"]:
        a.update(image_id=str(a["image_id"]), category_id=float(a["category_id"]), iscrowd=str(a["iscrowd"]))
        del a["id"], a["area"]
    content["images"][1].update(id="9", width="60", height=40.0)
    content["categories"][2]["name"] = 4
    file.write_text(json.dumps(content))
    dataset = CocoDataset(file)
    for target, other in zip(dataset.targets, expected.targets):
        assert all(torch.equal(target[k], other[k]) for k in ("boxes", "labels", "ignore_boxes"))
        assert target["image_id"] == other["image_id"]
    assert dataset.class_names == ["rbc", "wbc", "4"] and dataset.truth([0]).areas[0] == 300


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_every_encoding_of_json_is_read(file, encoding):
    file.write_bytes(file.read_text().encode(encoding))
    assert len(CocoDataset(file)) == 3


@pytest.mark.parametrize("content, message", [
    (b"<annotation/>", "not JSON: XML"), (b'{"images": [', "not JSON"), (b'{"images": "c\xe4t"}', "not JSON"),
    (b"", "not JSON"),
    (b"[" * 100_000, "not JSON"), (b"[1, 2]", "not a COCO annotation file.*categories"),
    (b'{"images": [], "annotations": []}', "not a COCO annotation file.*categories"),
])  # fmt: skip
def test_another_format_is_refused(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.json: {message}"):
        CocoDataset(tmp_path / "a.json")
    with pytest.raises(ValueError, match="not a file"):
        CocoDataset(tmp_path)


@pytest.mark.parametrize("kind", ["turned by exif", "resized", "swapped"])
def test_a_picture_of_another_size_than_stated_is_refused(file, kind):
    path = file.parent / "images" / "a.png"
    if kind == "turned by exif":
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.open(path).save(path, exif=exif)
    elif kind == "resized":
        Image.open(path).resize((30, 20)).save(path)
    else:
        changed(file, "images", dict(width=40, height=60))
    with pytest.raises(ValueError, match=r"train\.json: images\[1\]: .*a\.png has"):
        read_through(CocoDataset(file))


def test_transforms_move_image_and_boxes_together(file):
    plain, flipped = CocoDataset(file), CocoDataset(file, transforms=v2.RandomHorizontalFlip(p=1.0))
    (image, target), (moved, after) = plain[0], flipped[0]
    assert torch.equal(moved, image.flip(2)) and type(moved) is torch.Tensor and type(after["boxes"]) is torch.Tensor
    assert after["boxes"].tolist() == [[30, 5, 50, 20], [0, 30, 10, 40]]
    assert after["labels"].tolist() == [1, 2] and after["image_id"] == 5
    assert after["ignore_boxes"].tolist() == [[30, 0, 60, 20]]
    assert torch.equal(plain[0][1]["boxes"], target["boxes"])  # the stored target has not moved


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


def test_average_precision_by_hand():
    perfect = evaluate_coco([truth_of(A, B, C, labels=[0, 1, 0])], [result_of(A, B, C, labels=[0, 1, 0])], 2)
    assert [perfect[k] for k in ("AP", "AP50", "APs", "APm", "APl", "AR100")] == pytest.approx([100.0] * 6)
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
    with pytest.raises(ValueError, match=r"targets\[0\]: expected labels in 0..0, got \[0, 1\]"):
        evaluate_coco(targets, [result_of(A)], 1)
    with pytest.raises(ValueError, match=r"results: .* 1 targets, got 2"):
        evaluate_coco(targets, [result_of(A)] * 2, 2)


def test_detections_in_ignore_regions_do_not_count_against():
    targets = [truth_of(A, ignore=[[90.0, 10, 230, 170]])]
    assert evaluate_coco(targets, [result_of(B, A)], 1)["AP"] == pytest.approx(100)
    assert evaluate_coco([truth_of(A)], [result_of(B, A)], 1)["AP"] < 60


def test_sizes_without_objects_are_nan_and_nothing_found_is_zero():
    scores = evaluate_coco([truth_of(A)], [result_of()], 1)
    assert scores["AP"] == scores["APm"] == 0 and math.isnan(scores["APs"]) and math.isnan(scores["APl"])


@pytest.mark.parametrize("seed", range(3))
def test_the_twelve_numbers_are_pycocotools(tmp_path, seed):
    content, rows = crowded(seed)
    ids = sorted(c["id"] for c in content["categories"])
    expected = judge(content, rows, ids).stats
    assert expected.min() > 0 and expected.max() < 1
    dataset = CocoDataset(write(tmp_path, content))
    found = evaluate(Fixed(rows, [f"c{i}" for i in ids]), dataset)
    assert list(found.values()) == pytest.approx([100 * v for v in expected], abs=1e-9)
    # Another order of labels, one class more that the file lacks: the names say which is which.
    mixed = [[[*row[:5], {0: 4, 1: 0, 2: 3, 3: 1}[int(row[5])]] for row in r] + [[9.0, 9, 9, 9, 0.95, 2]] for r in rows]
    names = [f"c{ids[i]}" for i in (1, 3)] + ["other"] + [f"c{ids[i]}" for i in (2, 0)]
    assert evaluate(Fixed(mixed, names), dataset) == found
    half = dict(content, images=content["images"][::2])
    half["annotations"] = [a for a in content["annotations"] if a["image_id"] in {i["id"] for i in half["images"]}]
    part = evaluate(Fixed(rows[::2], [f"c{i}" for i in ids]), Subset(dataset, range(0, len(dataset), 2)))
    assert list(part.values()) == pytest.approx([100 * v for v in judge(half, rows[::2], ids).stats], abs=1e-9)


def test_classes_are_matched_by_name():
    assert match_classes(["cat", "dog"], ["dog", "cat"]) == [1, 0]
    assert match_classes(["N/A", "cat", "N/A", "dog"], ["dog"]) == [None, None, None, 0]
    with pytest.warns(UserWarning, match="names no classes"):
        assert match_classes(["class 0", "class 1"], ["dog", "cat"], told=False) == [0, 1]
    for names, told in ((["cat", "cow"], True), (["class 0"], False)):
        with pytest.raises(ValueError, match=rf"dog.* none of the model's {len(names)} classes: {names[0]}"):
            match_classes(names, ["cat", "dog"], told)


COCO = {1: "person", 3: "car", 13: "stop sign", 90: "toothbrush"}  # labels 0, 2, 12, 89 of 90; 0, 2, 11, 79 of 80


@pytest.mark.parametrize("classes, label", [(90, 12), (80, 11)])
def test_both_numberings_of_coco_are_measured(tmp_path, classes, label):
    images = [dict(id=1, file_name="1.png", width=64, height=48)]
    annotations = [dict(id=1, image_id=1, category_id=13, bbox=[5, 6, 20, 15], area=300, iscrowd=0)]
    categories = [dict(id=i, name=name) for i, name in COCO.items()]
    dataset = CocoDataset(write(tmp_path, dict(images=images, annotations=annotations, categories=categories)))
    detector = Detector(faster_rcnn("r18_fpn", classes, min_size=32, max_size=64), device="cpu")
    names = detector.class_names
    assert evaluate(Fixed([[[5, 6, 20, 15, 0.9, label]]], names), dataset)["AP"] == pytest.approx(100)
    assert evaluate(detector, dataset)["AP"] == 0  # it has learnt nothing, but knows the names


@pytest.fixture
def demo_weights():
    return str(files("fastrcnn") / "assets" / "demo.safetensors")


def test_detections_do_not_depend_on_the_pictures_around(demo_weights):
    sizes = [(96, 128), (128, 96), (96, 160), (96, 128)]
    pictures = [torch.from_numpy(render_cells(i, *s)[0].transpose(2, 0, 1).copy()) for i, s in enumerate(sizes)]
    detector = Detector(demo_weights, device="cpu", score_threshold=0.3)
    alone = [detector(picture)[0] for picture in pictures]
    assert sum(map(len, alone)) > 20
    for batch_size in (None, 2, 4):
        found = predict(detector, [(p, i) for i, p in enumerate(pictures)], batch_size)
        assert found.targets == [0, 1, 2, 3]
        for i, other in enumerate(alone):
            one = found.on([i])
            assert one.labels.tolist() == other.labels.tolist()
            np.testing.assert_allclose(one.boxes, other.boxes, rtol=0, atol=1e-3)


def test_a_model_is_measured_above_its_own_threshold_and_left_alone(demo_weights):
    picture, boxes, labels = render_cells(3, 96, 128)
    pairs = [(torch.from_numpy(picture.transpose(2, 0, 1).copy()), truth_of(*boxes.tolist(), labels=labels.tolist()))]
    model = infer_model(demo_weights, test_cfg=dict(rcnn=dict(score_thr=0.6))).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    scores = predict(model, pairs).scores
    assert scores.min() > 0.6 and len(scores) > 3
    assert evaluate(model, pairs)["AP50"] > 50
    wrapped = torch.nn.DataParallel(model)
    assert np.array_equal(predict(wrapped, pairs).scores, scores)
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_what_cannot_be_measured_is_refused_before_a_picture_is_looked_at(file, monkeypatch):
    dataset, model = CocoDataset(file), Fixed([], ["rbc", "wbc"])
    with pytest.raises(ValueError, match=r"train\.json: the categories platelet are none of"):
        evaluate(model, dataset)
    with pytest.raises(ValueError, match="transforms"):
        evaluate(model, CocoDataset(file, transforms=v2.RandomHorizontalFlip()))
    with pytest.raises(ValueError, match="several joined"):
        evaluate(model, ConcatDataset([dataset, dataset]))
    with pytest.raises(ValueError, match=r"train\.json: no object is annotated on these 1 pictures"):
        evaluate(model, Subset(dataset, [2]))
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    with pytest.raises(ImportError, match=r"fastrcnn\[eval\]"):
        evaluate(model, dataset)
