"""One static program: from pixels to `Padded` without a word to the host, and its capture. Compilers: test_compiled.py."""

import warnings

import pytest
import torch
from conftest import lively, picture, tiny_model, tiny_options
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastrcnn import Detector
from fastrcnn.inference import captured
from fastrcnn.inference.captured import Captured, pack, unpack
from fastrcnn.models import FCOSHead
from fastrcnn.models.build import merge
from fastrcnn.models.frame import Frame
from fastrcnn.models.padded import Padded
from fastrcnn.models.roi_head import padded_rois
from fastrcnn.weights.named import named_model

DCN = dict(backbone=dict(dcn=dict(type="DCN", deform_groups=1, fallback_on_stride=False),
                         stage_with_dcn=(False, True, True, True)))  # fmt: skip
FCOS = dict(
    _delete_=True,
    type="FCOSHead",
    in_channels=16,
    feat_channels=16,
    stacked_convs=1,
    strides=[4, 8, 16, 32, 64],
    norm_cfg=None,
)
SOFT = dict(test_cfg=dict(rcnn=dict(nms=dict(type="soft_nms", iou_threshold=0.4))))
AGNOSTIC = dict(roi_head=dict(bbox_head=dict(reg_class_agnostic=True)),
                test_cfg=dict(rcnn=dict(nms=dict(class_agnostic=True), max_per_img=-1)))  # fmt: skip
DEFORM_POOL = dict(
    _delete_=True, type="ModulatedDeformRoIPoolPack", output_size=7, output_channels=16, deform_fc_channels=8
)
SHALLOW = dict(backbone=dict(depth=18), neck=dict(in_channels=[8, 16, 32, 64]))
LEAST = dict(test_cfg=dict(rpn=dict(min_bbox_size=4)))


def rebuilt(profile: str, replace, **overrides) -> nn.Module:
    """A small Faster R-CNN of whose options `replace` has put others in the place of some."""
    options = merge(tiny_options("r18_fpn"), overrides)
    replace(options)
    torch.manual_seed(0)
    model = named_model("r18_fpn", 3, profile, **options).eval()
    if isinstance(model.rpn_head, FCOSHead):
        nn.init.normal_(model.rpn_head.conv_cls.weight, std=2.0)
        nn.init.constant_(model.rpn_head.conv_reg.bias, 2.5)
    nn.init.normal_(model.roi_head.bbox_head.fc_cls.weight, std=2.0)
    return model


def c4(profile: str, **overrides) -> nn.Module:
    """The shared head has the widths of a whole ResNet, so it is a shallow one."""
    heads = dict(shared_head=dict(depth=18), bbox_roi_extractor=dict(out_channels=256), bbox_head=dict(in_channels=512))
    options = dict(min_size=64, max_size=96, backbone=dict(depth=18), roi_head=heads,
                   rpn_head=dict(in_channels=256, feat_channels=8), test_cfg=dict(rpn=dict(max_per_img=20)))  # fmt: skip
    torch.manual_seed(0)
    return lively(named_model("r50_c4", 3, profile, **merge(options, overrides)))


MODELS = {
    "r18_fpn": lambda p, **o: tiny_model("r18_fpn", p, **o),
    "r50_fpn": lambda p, **o: tiny_model("r50_fpn", p, **o),
    "x101": lambda p, **o: tiny_model("x101_32x4d_fpn", p, **o),
    "dc5": lambda p, **o: tiny_model("r50_dc5", p, **o),
    "c4": c4,
    "dcn": lambda p, **o: tiny_model("r50_fpn", p, **merge(DCN, o)),
    "fcos": lambda p, **o: rebuilt(p, lambda options: options.update(rpn_head=FCOS), **o),
    "retinanet": lambda p, **o: tiny_model("retinanet_r18_fpn", p, **o),
    "rpn": lambda p, **o: tiny_model("rpn_r50_fpn", p, **merge(SHALLOW, o)),
    "soft": lambda p, **o: tiny_model("r18_fpn", p, **merge(SOFT, o)),
    "agnostic": lambda p, **o: tiny_model("r18_fpn", p, **merge(AGNOSTIC, o)),
    "deformable pooling": lambda p, **o: rebuilt(
        p, lambda options: options["roi_head"]["bbox_roi_extractor"].update(roi_layer=DEFORM_POOL), **o
    ),
    "least size": lambda p, **o: tiny_model("r18_fpn", p, **merge(LEAST, o)),
}
each_profile = pytest.mark.parametrize("profile", ["mmdet", "torchvision", "detectron2"])


class NoWaiting(TorchDispatchMode):
    """Fails where the host would wait for a device or a shape would depend on data, and counts what runs."""

    forbidden = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "unique",
        "item",
        "is_nonzero",
        "equal",
    )
    ours = ("nms", "batched_nms", "soft_nms", "batched_soft_nms")
    calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        space, name = function.namespace, function._schema.name.split("::")[1]
        self.calls += space == "fastrcnn"
        waits = name in (self.ours if space == "fastrcnn" else self.forbidden) or name.startswith(("nonzero", "unique"))
        if name in ("index", "index_put_", "index_put"):
            waits = any(isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if waits:
            raise AssertionError(f"{function} makes the host wait")
        # On the CPU everything lies in one place: a tensor made of Python's numbers stands for a copy to the device.
        if name in ("lift_fresh", "lift_fresh_copy") or (
            space == "aten" and name == "_to_copy" and "device" in (kwargs or {})
        ):
            raise AssertionError(f"{function} copies from the host")
        return function(*args, **(kwargs or {}))


class NoReading(TorchFunctionMode):
    """Fails at what reads a tensor's memory from Python, of which no operator hears where it lies on the CPU already."""

    forbidden = ("cpu", "tolist", "numpy", "item", "__array__", "__bool__", "__int__", "__float__", "__index__")

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in self.forbidden:
            raise AssertionError(f"{function} makes the host wait")
        return function(*args, **(kwargs or {}))


@each_profile
@pytest.mark.parametrize("kind", MODELS)
def test_from_pixels_to_padded_nobody_waits(device, kind, profile):
    model = MODELS[kind](profile).to(device)
    images = torch.stack([picture(64, 96, seed=1), picture(64, 96, seed=2)]).to(device)
    expected = model(list(images))  # what is kept on the device is made at the first call
    with torch.no_grad(), NoReading(), NoWaiting() as mode:
        batch, frame = model.prepare(images.unbind(0))
        found = model.predict_padded(batch, frame.sizes, frame.factors)
    assert mode.calls > 10
    assert found.counts.tolist() == [len(e["boxes"]) for e in expected] and found.counts.min() > 0
    for i, (n, e) in enumerate(zip(found.counts.tolist(), expected)):
        for rows, key in zip(found, ("boxes", "scores", "labels")):
            torch.testing.assert_close(rows[i, :n], e[key], rtol=1e-4, atol=1e-4)
            assert not rows[i, n:].any()


WAITS = [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: bool(x.any()),
         lambda x: torch.tensor([1.0, 2.0]), lambda x: x.to("cpu", copy=True), lambda x: x.cpu(), lambda x: x.tolist(),
         lambda x: x.numpy(), lambda x: torch.arange(int(x[0]))]  # fmt: skip


@pytest.mark.parametrize("waits", WAITS)
def test_waiting_is_seen(waits):
    x = torch.ones(3)
    with pytest.raises(AssertionError, match=r"wait|copies"), NoReading(), NoWaiting():
        waits(x)


def test_rows_that_no_image_fills_are_no_images():
    """So that RoIAlign does not read for them: tests of that operator show that it gives zeros."""
    rois = padded_rois(torch.ones(3, 2, 4), torch.tensor([1, 0, 2]))
    assert rois[:, 0].tolist() == [0, -1, -1, -1, 2, 2] and rois[:, 1:].eq(1).all()


def test_scores_below_zero_are_scores():
    """A proposal's is a logit in Detectron2's profile."""
    boxes, labels = torch.rand(1, 4, 4), torch.arange(4)[None]
    given = Padded(boxes, torch.tensor([[-3.0, 2.0, -1.0, -1e9]]), labels, torch.tensor([3]))
    kept = Padded.cat([given, given._replace(counts=torch.tensor([1]))])
    assert kept.counts.tolist() == [4] and kept.scores[0, :4].tolist() == [2, -1, -3, -3]
    assert kept.labels[0, :4].tolist() == [1, 2, 0, 0] and not kept.boxes[0, 4:].any()


def test_candidates_of_a_level_that_were_left_out_are_told_though_others_fill_the_places(monkeypatch):
    """The finest level keeps its best alone; what the others find is worse than what it has left out."""
    monkeypatch.setattr("fastrcnn.models.retina_head.MOST_CANDIDATES", 1)
    head = tiny_model("retinanet_r18_fpn", test_cfg=dict(nms_pre=-1, max_per_img=2)).bbox_head
    columns = head.num_anchors * head.num_classes
    logits = [torch.full((2, columns, side, side), -9.0) for side in (8, 4, 2, 1, 1)]
    deltas = [torch.zeros(2, head.num_anchors * 4, *x.shape[2:]) for x in logits]
    logits[0][0, 0, 0, 0], logits[0][0, 0, 7, 7], logits[1][:, 0, 1, 1] = 3.0, 2.9, 1.0
    logits[0][1, 0, 0, 0] = 3.0
    found, lost = head.predict(logits, deltas, Frame(torch.tensor([[64, 64]] * 2), (64, 64)))
    assert found.counts.tolist() == [2, 2] and lost.tolist() == [True, False]


@pytest.mark.parametrize("kind, head", [("r18_fpn", "roi_head"), ("retinanet", "retina_head")])
def test_candidates_beyond_the_limit_are_told(kind, head, monkeypatch):
    """`predict` warns where they may have cost a detection, and only there."""
    limits = dict(max_per_img=30, **(dict(nms_pre=-1) if kind == "retinanet" else {}))
    model = MODELS[kind]("mmdet", test_cfg=limits if kind == "retinanet" else dict(rcnn=limits))
    images = [picture(64, 96, seed=1), picture(64, 96, seed=2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = model(images)
    monkeypatch.setattr(f"fastrcnn.models.{head}.MOST_CANDIDATES", 5)
    with pytest.warns(UserWarning, match=r"images \[0, 1\].*score_thr"):
        few = model(images)
    assert all(0 < len(f["boxes"]) < len(w["boxes"]) for f, w in zip(few, whole))
    with pytest.warns(UserWarning, match="detections may be missing"):
        Detector(model, device="cpu")(images[0])
    monkeypatch.setattr(f"fastrcnn.models.{head}.MOST_CANDIDATES", 600)  # enough for 30 detections, not for all
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for f, w in zip(model(images), whole):
            assert torch.equal(f["boxes"], w["boxes"])


def test_what_is_packed_comes_back():
    found = Padded(
        torch.rand(2, 3, 4), torch.rand(2, 3), torch.tensor([[7, 0, 0], [1203, 5, 90]]), torch.tensor([1, 3])
    )
    lost = torch.tensor([False, True])
    back, also_lost = unpack(pack(found, lost))
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip((*back, also_lost), (*found, lost)))


def test_a_shape_is_captured_at_its_second_batch_and_few_are_kept(monkeypatch):
    """The bookkeeping; a graph itself needs a card."""
    made = []

    class Recorded:
        def __init__(self, program, images, pool):
            made.append(tuple(images.shape))
            self.run = program

        def __call__(self, images):
            return self.run(images) + 100

    monkeypatch.setattr(captured, "Graph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    run = Captured(lambda images: images.sum())
    shapes = [torch.ones(1, 3, 2, n) for n in range(1, captured.MOST_GRAPHS + 3)]
    assert [run(shapes[0]).item() for _ in range(3)] == [6, 106, 106] and len(made) == 1
    assert run(shapes[0].to(torch.uint8)).item() == 6  # another program
    for images in shapes:
        run(images), run(images)
    assert len(run.graphs) == captured.MOST_GRAPHS and len(made) == len(shapes)
    assert run(shapes[0]).item() == 6  # forgotten, and seen anew

    def fails(*_):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(captured, "Graph", fails)
    with pytest.warns(UserWarning, match="without CUDA graphs: operation not permitted when stream is capturing$"):
        assert run(shapes[0]).item() == 6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [run(shapes[0]).item() for _ in range(3)] == [6] * 3  # not tried again
