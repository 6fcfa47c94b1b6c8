import numpy as np
import pytest
import torch
from conftest import picture as pixels
from conftest import tiny_model
from PIL import Image
from torch import nn
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from fastrcnn import Detections, Detector
from fastrcnn.data import ImageError
from fastrcnn.weights import save

NAMES = ["red", "white", "platelet"]


def tiny(profile="mmdet", num_classes=3, name="r18_fpn", **overrides) -> nn.Module:
    """For pictures of 96 x 128 pixels as they are."""
    return tiny_model(name, profile, num_classes, min_size=96, max_size=128, **overrides)


def picture(height=96, width=128, seed=0) -> np.ndarray:
    return pixels(height, width, seed).permute(1, 2, 0).numpy()


def saved(path, profile="mmdet"):
    """A file that a detector is made from."""
    model = tiny(profile)
    model.class_names = NAMES
    save(model, path)
    return str(path)


@pytest.fixture(scope="module")
def detector():
    model = tiny()
    model.class_names = NAMES
    return Detector(model, device="cpu")


def assert_same(a: Detections, b: Detections) -> None:
    assert torch.equal(a.boxes, b.boxes) and torch.equal(a.scores, b.scores) and torch.equal(a.labels, b.labels)


def test_the_detector_finds_what_the_model_finds(detector, device, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model = tiny()
    image = torch.from_numpy(picture(70, 101)).permute(2, 0, 1)
    (found,) = (detector if device == "cpu" else Detector(tiny(), device=device, precision="fp32"))(image)
    expected = model([image])[0]
    assert len(found) == len(expected["boxes"]) > 20
    torch.testing.assert_close(found.scores, expected["scores"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.boxes, expected["boxes"], rtol=0, atol=0.02)
    assert torch.equal(found.labels, expected["labels"])
    assert found.boxes.device.type == "cpu" and found.boxes.dtype == torch.float32
    assert (found.scores[:-1] >= found.scores[1:]).all() and len(set(found.labels.tolist())) > 1


def test_the_users_model_is_not_changed():
    model = tiny().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    Detector(model, device="cpu", precision="bf16", score_threshold=0.7)(picture())
    assert model.training and model.roi_head.test_cfg["score_thr"] == 0.05
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert any(p.requires_grad for p in model.parameters())
    after = model.state_dict()
    assert set(after) == set(before) and all(torch.equal(after[k], before[k]) for k in before)


def test_convolutions_need_no_copy_of_their_weights(detector):
    convs = [m for m in detector.model.modules() if type(m) is nn.Conv2d]
    assert any(m.kernel_size == (3, 3) for m in convs)
    assert all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in convs)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in detector.model.modules())


def test_every_kind_of_image_gives_the_same(detector, tmp_path):
    array = picture()
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    Image.fromarray(array).save(tmp_path / "a.png")
    (expected,) = detector(array)
    for image in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(array), tensor, tensor / 255.0):
        for images in (image, [image], (image,)):
            found = detector(images)
            assert len(found) == 1
            assert_same(found[0], expected)
    generator = (image for image in [array, tensor])
    assert [len(found) for found in detector(generator)] == [len(expected)] * 2
    assert detector([]) == []


def test_results_keep_the_order_of_the_images_whatever_their_shapes(detector):
    images = [picture(*size, seed=i) for i, size in enumerate([(96, 128), (128, 96), (96, 128), (50, 60), (128, 96)])]
    alone = [detector(image)[0] for image in images]
    for batch_size in (None, 1, 2, 8):
        for found, expected in zip(detector(images, batch_size), alone, strict=True):
            torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found.boxes, expected.boxes, rtol=0, atol=0.01)


def test_an_unreadable_image_stops_a_call_and_not_a_stream(detector, tmp_path):
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    Image.fromarray(picture()).save(good)
    bad.write_bytes(good.read_bytes()[:200])
    with pytest.raises(ImageError, match=r"bad\.png"):
        detector([good, bad])
    with pytest.raises(TypeError, match=r"images\[1\]"):
        detector([good, None])
    with pytest.raises(ValueError, match=r"images\[0\].*\[3, H, W\]"):
        detector(torch.zeros(2, 3, 8, 8))
    results = {i: found for i, _, found in detector.stream([good, bad, None, tmp_path / "none.png", good])}
    assert sorted(results) == [0, 1, 2, 3, 4]
    assert [isinstance(results[i], Exception) for i in range(5)] == [False, True, True, True, False]
    assert isinstance(results[1], ImageError) and isinstance(results[2], TypeError)
    assert_same(results[0], results[4])


def test_the_threshold_is_on_the_score():
    every, some, none = (Detector(tiny(), device="cpu", score_threshold=t)(picture())[0] for t in (0.0, 0.9, 1.0))
    assert len(every) > len(some) > 0 and len(none) == 0
    assert some.scores.min() > 0.9
    assert none.boxes.shape == (0, 4) and none.to_coco() == [] and none.names == []


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_finds_nearly_the_same(precision, detector):
    low = Detector(tiny(), device="cpu", precision=precision)
    assert low.model.dtype == dict(bf16=torch.bfloat16, fp16=torch.float16)[precision]
    (exact,), (found,) = detector(picture()), low(picture())
    assert found.boxes.dtype == found.scores.dtype == torch.float32
    best = exact[: len(exact) // 4]
    assert len(best) >= 5
    near = (torch.cdist(best.boxes, found.boxes, p=torch.inf) < 2) & (best.labels[:, None] == found.labels[None])
    near &= (best.scores[:, None] - found.scores[None]).abs() < 0.05
    assert near.any(1).float().mean() >= 0.8


@pytest.mark.parametrize("profile", ["mmdet", "torchvision", "detectron2"])
def test_labels_count_from_zero_in_every_profile(profile):
    model = tiny(profile)
    raw = model([torch.from_numpy(picture()).permute(2, 0, 1)])[0]
    (found,) = Detector(model, device="cpu")(picture())
    assert len(found) > 10 and 0 in found.labels and found.labels.max() <= 2
    assert raw["labels"].max() == found.labels.max() + (profile == "torchvision")


def test_class_names_and_category_ids():
    categories = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    by_number = {n: Detector(tiny(num_classes=n), device="cpu") for n in (3, 80, 90)}
    assert by_number[3].class_names == ["class 0", "class 1", "class 2"] and by_number[3].category_ids == [1, 2, 3]
    for n in (80, 90):
        d = by_number[n]
        assert len(d.class_names) == len(d.category_ids) == n
        assert all(categories[c] == name for name, c in zip(d.class_names, d.category_ids))
    assert by_number[80].category_ids[-1] == by_number[90].category_ids[-1] == 90
    model = tiny()
    model.class_names = NAMES
    found = Detector(model, device="cpu")(picture())[0]
    assert set(found.names) <= set(NAMES) and found.names[0] == NAMES[int(found.labels[0])]


def test_a_model_comes_out_of_what_wraps_it(detector):
    (expected,) = detector(picture())
    for wrap in (nn.DataParallel, torch.optim.swa_utils.AveragedModel, lambda m: torch.compile(m, backend="eager")):
        assert_same(Detector(wrap(tiny()), device="cpu")(picture())[0], expected)


def test_category_ids_are_the_models_own():
    model = tiny()
    model.class_names, model.category_ids = NAMES, [7, 1, 3]
    (found,) = Detector(model, device="cpu")(picture())
    own = dict(zip(NAMES, [7, 1, 3]))
    assert [row["category_id"] for row in found.to_coco()] == [own[name] for name in found.names]


def test_a_picture_that_cannot_be_looked_at_stops_a_call_and_not_a_stream(detector, monkeypatch):
    thin, good = np.zeros((1, 20_000, 3), np.uint8), picture()
    prepare = detector.model.prepare

    def refuses(images):
        if any(image.shape[1] == 1 for image in images):
            raise ValueError("images[0]: too thin\nfor this test")
        return prepare(images)

    monkeypatch.setattr(detector.model, "prepare", refuses)
    for batch_size in (1, 2):
        results = {i: found for i, _, found in detector.stream([good, thin, thin, good], batch_size)}
        assert [isinstance(results[i], ImageError) for i in range(4)] == [False, True, True, False]
        assert "images[1]" in str(results[1]) and "20000 x 1" in str(results[1]) and "\n" not in str(results[1])
    with pytest.raises(ImageError, match=r"images\[1\]"):
        detector([good, thin])


def test_boxes_that_are_no_numbers_are_an_error():
    model = tiny()
    nn.init.constant_(model.roi_head.bbox_head.fc_reg.bias, float("nan"))
    with pytest.raises(FloatingPointError, match=r"images\[0\]"):
        Detector(model, device="cpu")(picture())


def test_images_of_many_shapes_do_not_wait_for_ever(detector):
    shapes = [(64 + 2 * i, 80) for i in range(14)]
    read = 0

    def images():
        nonlocal read
        for shape in shapes:
            read += 1
            yield np.zeros((*shape, 3), np.uint8)

    first = next(detector.stream(images(), batch_size=2))
    assert first[0] == 0 and read < len(shapes)
    assert sorted(i for i, _, _ in detector.stream(images(), batch_size=2)) == list(range(14))


@pytest.mark.parametrize("profile", ["mmdet", "torchvision"])
def test_a_detector_from_a_file(tmp_path, profile):
    path = saved(tmp_path / "cells.safetensors", profile)
    (found,), (expected,) = Detector(path, device="cpu")(picture()), Detector(tiny(profile), device="cpu")(picture())
    assert_same(found, expected)
    assert found.class_names == NAMES
    assert_same(Detector("r18_fpn", path, device="cpu")(picture())[0], expected)


@pytest.mark.parametrize(
    "arguments, options, error, names",
    [
        (("r51_fpn", "weights.pth"), {}, ValueError, "model_or_name.*r51_fpn"),
        (("nowhere.pth",), {}, FileNotFoundError, "nowhere.pth"),
        (("r18_fpn", "nowhere.pth"), {}, FileNotFoundError, "nowhere.pth"),
        (("r18_fpn",), dict(precision="fp12"), ValueError, "precision"),
        (("r18_fpn",), dict(precision="fp8"), ValueError, "precision"),
        (("r18_fpn",), dict(score_threshold=1.5), ValueError, "score_threshold"),
        (("r18_fpn",), dict(score_threshold=float("nan")), ValueError, "score_threshold"),
        (("r18_fpn",), dict(score_threshold="high"), ValueError, "score_threshold"),
        (("r18_fpn",), dict(device="gpu"), ValueError, "device.*'gpu'"),
        (("r18_fpn",), dict(device="meta"), ValueError, "device"),
        ((nn.Linear(2, 2),), {}, TypeError, "model_or_name.*Linear"),
        ((None,), {}, TypeError, "model_or_name.*NoneType"),
        (("r18_fpn", 3), {}, TypeError, "weights.*int"),
        (({"a": torch.zeros(2)},), {}, ValueError, "state dict"),
    ],
)
def test_bad_arguments_are_named(arguments, options, error, names):
    with pytest.raises(error, match=names):
        Detector(*arguments, **{"device": "cpu", **options})


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, "2"])
def test_a_bad_batch_size_is_named(detector, batch_size):
    for call in (detector, detector.stream):
        with pytest.raises(ValueError, match="batch_size"):
            call([picture()], batch_size)


def test_weights_beside_a_model_and_a_device_that_is_not_there():
    with pytest.raises(ValueError, match="weights"):
        Detector(tiny(), "weights.pth")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device"):
            Detector(tiny(), device="cuda")


THREE = Detections(
    torch.tensor([[10.0, 20.0, 50.0, 60.0], [0.5, 1.25, 30.0, 30.0], [70.0, 5.0, 95.0, 44.0]]),
    torch.tensor([0.9, 0.75, 0.123456]), torch.tensor([2, 0, 2]), NAMES, [4, 5, 9],
)  # fmt: skip


@pytest.mark.parametrize(
    "index, rows",
    [(slice(0, 2), [0, 1]), (slice(None, None, 2), [0, 2]), (torch.tensor([2, 0]), [2, 0]),
     (torch.tensor([False, True, True]), [1, 2]), (THREE.scores > 0.5, [0, 1]), ([1], [1]), (0, [0]), (-1, [2]),
     (np.int64(1), [1]), (torch.tensor(2), [2]), (slice(None, None, -1), [2, 1, 0]), ([], []),
     (np.array([True, False, True]), [0, 2])],
)  # fmt: skip
def test_slicing(index, rows):
    part = THREE[index]
    assert torch.equal(part.boxes, THREE.boxes[rows]) and torch.equal(part.scores, THREE.scores[rows])
    assert part.labels.tolist() == [THREE.labels.tolist()[r] for r in rows]
    assert (part.class_names, part.category_ids, len(part)) == (NAMES, [4, 5, 9], len(rows))


def test_iteration_gives_the_objects_and_nothing_beyond():
    assert [(len(one), one.names, one.boxes.shape) for one in THREE] == [(1, [n], (1, 4)) for n in THREE.names]
    for index in (3, -4, (0, 1), torch.tensor([True]), None, "a"):
        with pytest.raises(IndexError):
            THREE[index]


def test_detections_without_names_are_numbered():
    plain = Detections(THREE.boxes, THREE.scores, THREE.labels)
    assert plain.names == ["class 2", "class 0", "class 2"]
    assert [row["category_id"] for row in plain.to_coco()] == [3, 1, 3]
    assert plain.draw(np.zeros((80, 120, 3), np.uint8)).any()


def test_aliases_and_coco_results():
    assert isinstance(THREE.xyxy, np.ndarray) and np.array_equal(THREE.xyxy, THREE.boxes.numpy())
    assert np.array_equal(THREE.confidence, THREE.scores.numpy())
    assert THREE.class_id.tolist() == [2, 0, 2] and THREE.names == ["platelet", "red", "platelet"]
    rows = THREE.to_coco(image_id=17)
    assert rows[0] == dict(image_id=17, category_id=9, bbox=[10.0, 20.0, 40.0, 40.0], score=0.9)
    assert rows[1]["bbox"] == [0.5, 1.25, 29.5, 28.75] and rows[1]["category_id"] == 4
    assert rows[2]["score"] == 0.12346


def test_drawing_changes_the_boxes_edges_and_nothing_far_from_them():
    plain = np.full((80, 120, 3), 128, np.uint8)
    drawn = THREE[:1].draw(plain)
    assert drawn.shape == (3, 80, 120) and drawn.dtype == torch.uint8
    changed = (drawn != 128).any(0)
    assert changed[20:61, 10].all() and changed[20:61, 50].all()  # left and right edge
    assert changed[20, 10:51].all() and changed[60, 10:51].all()  # upper and lower
    assert not changed[63:].any() and not changed[30:55, 15:46].any() and not changed[:, 118:].any()
    assert (plain == 128).all()
    assert torch.equal(THREE[:0].draw(plain), torch.full((3, 80, 120), 128, dtype=torch.uint8))


def test_drawing_on_every_kind_of_image_and_beyond_its_edges(tmp_path):
    array = picture(40, 50)
    Image.fromarray(array).save(tmp_path / "a.png")
    boxes = torch.tensor([[-20.0, -20, 500, 500], [30, 39, 30, 39], [-torch.inf, 3, 1e30, torch.nan]])
    wild = Detections(boxes, torch.ones(3), torch.tensor([0, 1, 2]), ["red", "\udcff\n", "x" * 10_000])
    drawn = wild.draw(array)
    assert drawn.shape == (3, 40, 50)
    for image in (tmp_path / "a.png", Image.fromarray(array), torch.from_numpy(array).permute(2, 0, 1)):
        assert torch.equal(wild.draw(image), drawn)


def test_labels_have_colours_of_their_own():
    plain = np.zeros((60, 60, 3), np.uint8)
    box, one = torch.tensor([[10.0, 30.0, 50.0, 50.0]]), torch.ones(1)
    colours = [Detections(box, one, torch.tensor([i]), NAMES).draw(plain)[:, 40, 10].tolist() for i in range(3)]
    assert len({tuple(c) for c in colours}) == 3


@pytest.mark.parametrize("name, label", [("retinanet_r18_fpn", "class 2"), ("rpn_r50_fpn", "object")])
def test_the_other_detectors_find_above_the_threshold(name, label):
    model = tiny(name=name)
    head = getattr(model, "bbox_head", None) or model.rpn_head
    head.test_cfg["max_per_img"] = 10_000
    many, few = (Detector(model, device="cpu", score_threshold=t)(picture())[0] for t in (0.3, 0.6))
    assert 0 < len(few) < len(many) and few.scores.min() > 0.6 and many.scores.min() > 0.3
    edge = few.scores.min().item()  # an object of just this score is not above it
    assert 0 < len(Detector(model, device="cpu", score_threshold=edge)(picture())[0]) < len(few)
    assert label in many.names
