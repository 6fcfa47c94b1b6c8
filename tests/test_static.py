"""One static program: from pixels to `Padded` without a word to the host, compiled, exported and captured."""

import warnings
from functools import partial

import pytest
import torch
from conftest import lively, picture, tiny_model, tiny_options
from torch import nn
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
ROOM = dict(min_size=130, max_size=320)  # no map has a single pixel, which compilers take for a constant


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
        "_to_copy_host",
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


@each_profile
@pytest.mark.parametrize("kind", MODELS)
def test_from_pixels_to_padded_nobody_waits(device, kind, profile):
    model = MODELS[kind](profile).to(device)
    images = torch.stack([picture(64, 96, seed=1), picture(64, 96, seed=2)]).to(device)
    expected = model(list(images))  # what is kept on the device is made at the first call
    with torch.no_grad(), NoWaiting() as mode:
        batch, frame = model.prepare(images.unbind(0))
        found = model.predict_padded(batch, frame.sizes, frame.factors)
    assert mode.calls > 10
    assert found.counts.tolist() == [len(e["boxes"]) for e in expected] and found.counts.min() > 0
    for i, (n, e) in enumerate(zip(found.counts.tolist(), expected)):
        for rows, key in zip(found, ("boxes", "scores", "labels")):
            torch.testing.assert_close(rows[i, :n], e[key], rtol=1e-4, atol=1e-4)
            assert not rows[i, n:].any()


WAITS = [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: bool(x.any()),
         lambda x: torch.tensor([1.0, 2.0]), lambda x: x.to("cpu", copy=True)]  # fmt: skip


@pytest.mark.parametrize("waits", WAITS)
def test_waiting_is_seen(waits):
    with pytest.raises(AssertionError, match=r"wait|copies"), NoWaiting():
        waits(torch.ones(3))


def test_rows_that_no_image_fills_are_no_images():
    """So that RoIAlign does not read for them: tests of that operator show that it gives zeros."""
    rois = padded_rois(torch.ones(3, 2, 4), torch.tensor([1, 0, 2]))
    assert rois[:, 0].tolist() == [0, -1, -1, -1, 2, 2] and rois[:, 1:].eq(1).all()


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


class Counted:
    """A backend that runs what dynamo has traced, and counts the programs."""

    def __init__(self):
        self.programs = 0

    def __call__(self, module, example):
        self.programs += 1
        return module.forward


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    yield Counted()
    torch._dynamo.reset()


TEN = [
    (160, 200),
    (170, 260),
    (300, 180),
    (180, 180),
    (165, 320),
    (200, 240),
    (240, 200),
    (160, 320),
    (190, 170),
    (222, 333),
]


def assert_equal_lists(found, expected) -> None:
    for f, e in zip(found, expected, strict=True):
        assert len(e["boxes"]) > 0
        for key in e:
            torch.testing.assert_close(f[key], e[key], rtol=1e-4, atol=1e-4)


def test_ten_sizes_are_compiled_at_most_three_times(compiler):
    model = tiny_model(min_size=160, max_size=320)
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    for i, size in enumerate(TEN):
        images = [picture(*size, seed=i), picture(*size, seed=i + 20)]
        assert_equal_lists(compiled(images), model(images))
    assert 1 < compiler.programs <= 3


@pytest.mark.parametrize("kind, profile", [("dcn", "torchvision"), ("fcos", "mmdet")])
def test_a_detector_is_one_graph(kind, profile, compiler):
    model, images = MODELS[kind](profile), [picture(64, 96, seed=1), picture(64, 96, seed=2)]
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    assert_equal_lists(compiled(images), model(images))
    assert compiler.programs == 1


class Exported(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch, sizes, factors):
        return tuple(self.model.predict_padded(batch, sizes, factors))


@pytest.mark.parametrize("kind, profile", [("r18_fpn", "torchvision"), ("retinanet", "mmdet")])
def test_export_with_dynamic_batch_height_and_width(kind, profile):
    model = MODELS[kind](profile, **ROOM)
    batch, height, width = (
        torch.export.Dim(n, min=low, max=40) for n, low in (("batch", 1), ("height", 5), ("width", 5))
    )
    shapes = {0: batch, 2: 32 * height, 3: 32 * width}, {0: batch}, {0: batch}
    given, frame = model.prepare([picture(140, 200, seed=1), picture(140, 200, seed=2)])
    program = torch.export.export(Exported(model), (given, frame.sizes, frame.factors), dynamic_shapes=shapes).module()
    for images in ([picture(150, 300, seed=3)], [picture(200, 140, seed=i) for i in range(3)]):
        given, frame = model.prepare(images)
        arguments = given, frame.sizes, frame.factors
        for actual, expected in zip(program(*arguments), model.predict_padded(*arguments)):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_export_from_pixels_of_one_size():
    """Static shapes all the way: with fixed sizes no size in the program is a symbol."""

    class Whole(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, images):
            batch, frame = self.model.prepare(images.unbind(0))
            return tuple(self.model.predict_padded(batch, frame.sizes, frame.factors))

    model, images = tiny_model(), torch.stack([picture(seed=1), picture(seed=2)])
    program = torch.export.export(Whole(model), (images,))
    values = [node.meta["val"] for node in program.graph.nodes if "val" in node.meta]
    shapes = [v.shape for v in torch.utils._pytree.tree_leaves(values) if isinstance(v, torch.Tensor)]
    assert len(shapes) > 100 and all(type(n) is int for shape in shapes for n in shape)
    for actual, expected in zip(program.module()(images), Whole(model)(images)):
        assert torch.equal(actual, expected)


def test_a_detector_compiles(compiler, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=compiler))
    model, image = MODELS["rpn"]("mmdet"), picture(64, 96, seed=3)
    plain, compiled = (Detector(model, device="cpu", compile=compile)([image]) for compile in (False, True))
    assert compiler.programs == 1 and len(plain[0]) > 20
    assert torch.equal(compiled[0].boxes, plain[0].boxes) and torch.equal(compiled[0].scores, plain[0].scores)


def test_inductor_compiles_what_follows_the_network(compiler):
    """The networks themselves take it minutes."""
    head = tiny_model("retinanet_r18_fpn").bbox_head
    maps = [[torch.randn(2, columns * 9, side, side) for side in (12, 6, 3, 2, 2)] for columns in (head.num_classes, 4)]
    frame = Frame(torch.tensor([[90, 96], [64, 80]]), (96, 96), torch.tensor([[2.0, 1.5], [1.0, 1.0]]))
    for actual, expected in zip(
        torch.compile(head.predict, fullgraph=True)(*maps, frame)[0], head.predict(*maps, frame)[0]
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)


def test_training_compiles_up_to_sampling(compiler):
    """Without a break: backbone, neck and heads. What samples and counts targets is not for a compiler."""
    model = tiny_model().train()

    def network(batch, rois):
        feats = model.extract_feat(batch)
        return *model.rpn_head(feats), *model.roi_head(feats, rois)

    arguments = torch.randn(1, 3, 64, 96), torch.tensor([[0, 4.0, 4, 40, 50], [-1, 0, 0, 9, 9]])
    outs = torch.compile(network, fullgraph=True, backend=compiler)(*arguments)
    torch.testing.assert_close(outs, network(*arguments))
    (outs[2].sum() + outs[0][0].sum()).backward()
    assert compiler.programs == 1 and model.neck.lateral_convs[0].conv.weight.grad.abs().sum() > 0


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
