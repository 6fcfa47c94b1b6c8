"""The static program as compilers take it: one graph, few over many sizes, exported with dynamic shapes, trained."""

from functools import partial

import pytest
import torch
from conftest import picture, tiny_model
from test_static import MODELS
from torch import nn
from torch.export import Dim

from fastrcnn import Detector
from fastrcnn.models.frame import Frame
from fastrcnn.training import get_recipe
from fastrcnn.training.state import adapt

ROOM = dict(min_size=130, max_size=320)  # no map has a single pixel, which compilers take for a constant


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


EACH = [("r18_fpn", "torchvision"), ("retinanet", "mmdet"), ("rpn", "detectron2"), ("c4", "detectron2"), ("dc5", "mmdet"),
        ("fcos", "mmdet"), ("dcn", "torchvision"), ("x101", "torchvision")]  # fmt: skip


@pytest.mark.parametrize("kind, profile", EACH)
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


@pytest.mark.parametrize("kind, profile", EACH)
def test_export_with_dynamic_batch_height_and_width(kind, profile):
    model = MODELS[kind](profile, **ROOM)
    step = max(model.data_preprocessor.pad_size_divisor, 2)
    batch, (height, width) = Dim("batch", min=1, max=40), (Dim(n, min=65 // step + 1, max=900) for n in ("y", "x"))
    shapes = {0: batch, 2: step * height, 3: step * width}, {0: batch}, {0: batch}
    given, frame = model.prepare([picture(140, 200, seed=1), picture(140, 200, seed=2)])
    program = torch.export.export(Exported(model), (given, frame.sizes, frame.factors), dynamic_shapes=shapes).module()
    for images in ([picture(150, 300, seed=3)], [picture(200, 140, seed=i) for i in range(3)]):
        given, frame = model.prepare(images)
        arguments = given, frame.sizes, frame.factors
        for actual, expected in zip(program(*arguments), model.predict_padded(*arguments)):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["r18_fpn", "rpn"])
def test_export_of_a_list_of_images(kind):
    """As many as were given, of any one size: `forward` itself, whose lists have as many rows as there are objects."""
    model, sides = (
        MODELS[kind]("mmdet", **ROOM),
        {1: Dim("height", min=100, max=900), 2: Dim("width", min=100, max=900)},
    )
    program = torch.export.export(
        model, ([picture(140, 200, seed=i) for i in range(2)],), dynamic_shapes=dict(images=[sides, sides])
    )
    for size in ((140, 200), (210, 150)):
        images = [picture(*size, seed=i + 5) for i in range(2)]
        assert_equal_lists(program.module()(images), model(images))


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
    for key in ("boxes", "scores"):  # eager may take Winograd's convolutions, a compiler sees oneDNN's
        torch.testing.assert_close(getattr(compiled[0], key), getattr(plain[0], key), rtol=1e-4, atol=1e-4)


def test_inductor_compiles_what_follows_the_network(compiler):
    """The networks themselves take it minutes."""
    head = tiny_model("retinanet_r18_fpn").bbox_head
    maps = [[torch.randn(2, columns * 9, side, side) for side in (12, 6, 3, 2, 2)] for columns in (head.num_classes, 4)]
    frame = Frame(torch.tensor([[90, 96], [64, 80]]), (96, 96), torch.tensor([[2.0, 1.5], [1.0, 1.0]]))
    for actual, expected in zip(
        torch.compile(head.predict, fullgraph=True)(*maps, frame)[0], head.predict(*maps, frame)[0]
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", ["r18_fpn", "retinanet", "rpn"])
def test_losses_are_one_graph(kind, compiler):
    """From the batch and checked targets, random sampling included: what looks at targets alone waits for them."""
    model = MODELS[kind]("mmdet").train()
    batch, frame = model.prepare([picture(64, 96, seed=1), picture(64, 96, seed=2)])
    given = [dict(boxes=torch.tensor([[5.0, 5, 30, 30], [40, 9, 80, 60]]), labels=torch.tensor([0, 0])),
             dict(boxes=torch.tensor([[15.0, 5, 60, 40]]), labels=torch.tensor([0]))]  # fmt: skip
    targets = model.inside(given, 2, batch.device)
    compiled = torch.compile(model.losses, fullgraph=True, backend=compiler)
    sums = []
    for losses in (model.losses, compiled):
        torch.manual_seed(3)
        model.zero_grad()
        found = losses(batch, frame._replace(factors=None), targets)
        sum(found.values()).backward()
        sums.append((found, model.neck.lateral_convs[-1].conv.weight.grad.clone()))
    torch.testing.assert_close(sums[1], sums[0])
    assert compiler.programs == 1 and min(sums[0][0].values()) > 0 and sums[0][1].abs().sum() > 0


def test_a_recipe_compiles_backbone_neck_and_heads(compiler, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=compiler, fullgraph=True))
    model = tiny_model().train()
    batch, frame = model.prepare([picture(64, 96, seed=1)])
    target = [dict(boxes=torch.tensor([[5.0, 5, 30, 30]]), labels=torch.tensor([0]))]
    torch.manual_seed(3)
    expected = model.loss(batch, frame.sizes, target)
    adapt(model, get_recipe("finetune", compile=True))
    torch.manual_seed(3)
    torch.testing.assert_close(model.loss(batch, frame.sizes, target), expected)
    assert compiler.programs == 4
