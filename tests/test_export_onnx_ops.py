"""Each operator's ONNX form against the operator, by ONNX Runtime."""

import pytest
import torch
from conftest import random_boxes, random_rois
from torch import nn
from torch.export import Dim

from fastrcnn import ops

pytest.importorskip("onnxscript")
onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")

from fastrcnn.export.onnx_ops import level_borders, to_onnx  # noqa: E402
from fastrcnn.ops.multilevel_roi_align import PROFILES  # noqa: E402
from fastrcnn.ops.roi_align import level_rule, roi_levels  # noqa: E402


class Calling(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def runner(function, inputs, dynamic):
    """`function` through ONNX: takes and gives tensors, of any size that `dynamic` leaves open."""
    names = [f"x{i}" for i in range(len(inputs))]
    program = torch.export.export(Calling(function).eval(), inputs, dynamic_shapes=(dynamic,))
    model = to_onnx(program, names, [])
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    def run(*inputs):
        found = session.run(None, {name: x.numpy() for name, x in zip(names, inputs)})
        return [torch.from_numpy(x) for x in found]

    return run


B, N = Dim("b"), Dim("n")


def nms_inputs(batch: int, n: int, seed: int):
    """Boxes with many equal scores, of four groups, of which some rows do not take part."""
    g = torch.Generator().manual_seed(seed)
    boxes = torch.stack([random_boxes(n, 200, 200, seed=seed + i) for i in range(batch)])
    scores = (torch.rand(batch, n, generator=g) * 20).round() / 20
    groups = torch.randint(4, (batch, n), generator=g)
    return boxes, scores, groups, torch.randint(0, n + 1, (batch,), generator=g)


def test_nms_padded():
    def function(boxes, scores, groups, counts):
        grouped = ops.nms_padded(boxes, scores, groups, 0.5, 20, counts)
        return *grouped, *ops.nms_padded(boxes, scores, None, 0.5, 20)

    both = {0: B, 1: N}
    run = runner(function, nms_inputs(2, 100, 0), (both, both, both, {0: B}))
    for case in ((1, 10, 1), (2, 60, 2), (3, 333, 3)):
        inputs = nms_inputs(*case)
        expected = function(*inputs)
        for found, e in zip(run(*inputs), expected):
            assert torch.equal(found, e)
    assert expected[1].max() == 20  # the limit was met


def test_multilevel_roi_align():
    rules = [(True, 0, "mmdet"), (False, 2, "torchvision"), (True, 2, "detectron2"), (False, 0, "mmdet")]

    def function(*inputs):
        *maps, rois = inputs
        several = (ops.multilevel_roi_align(maps, rois, (7, 5), [4, 8, 16], b, a, 8, p) for a, b, p in rules)
        return *several, ops.roi_align(maps[1], rois, 3, 1 / 8)

    def inputs(batch: int, h: int, w: int, n: int, seed: int):
        g = torch.Generator().manual_seed(seed)
        rois = random_rois(n, batch, 16 * max(h, w), 100, seed)
        rois[0, 1:] = torch.tensor([3.0, 3, 19, 19])  # on a boundary between levels
        rois[1, 0] = -1  # padding
        return *(torch.randn(batch, 6, h * s, w * s, generator=g) for s in (4, 2, 1)), rois

    h, w, k = Dim("h", min=2), Dim("w", min=2), Dim("k")
    maps = ({0: B, 2: 4 * h, 3: 4 * w}, {0: B, 2: 2 * h, 3: 2 * w}, {0: B, 2: h, 3: w})
    run = runner(function, inputs(2, 6, 7, 30, 0), (*maps, {0: k}))
    for case in ((1, 5, 8, 12, 1), (3, 9, 4, 40, 2)):
        x = inputs(*case)
        for found, expected in zip(run(*x), function(*x)):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("profile", PROFILES)
def test_borders_of_levels_are_those_of_the_rule(profile):
    borders = level_borders(4, level_rule(56, profile))
    assert len(borders) == 3 and all(abs(b / size - 1) < 1e-4 for b, size in zip(borders, (112, 224, 448)))
    for i, border in enumerate(borders):
        below = torch.nextafter(torch.tensor(border), torch.tensor(0.0)).item()
        rois = torch.tensor([[0, 0, 0, side, side] for side in (below, border)])
        assert roi_levels(rois, 4, 56, profile).tolist() == [i, i + 1]


def test_decode_proposals():
    base = [torch.tensor([[-8.0, -6, 8, 6], [-5, -9, 5, 9], [-8, -8, 8, 8]]) * s for s in (1, 2)]

    def function(logits0, logits1, deltas0, deltas1, sizes):
        maps, coder = ([logits0, logits1], [deltas0, deltas1], base, [4, (8, 9)]), ((0, 0.1, 0, 0), (1, 1, 0.5, 0.5))
        sigmoid = ops.decode_proposals(*maps, sizes, 50, *coder, min_size=8.0)
        logits = dict(topk_on="logits", score="logits", symmetric_clip=False)
        return *sigmoid, *ops.decode_proposals(*maps, sizes, 50, *coder, min_size=8.0, **logits)

    def inputs(batch: int, h: int, w: int, seed: int):
        g = torch.Generator().manual_seed(seed)
        maps = [torch.randn(batch, c, h * s, w * s, generator=g) for c in (3, 12) for s in (2, 1)]
        maps[:2] = [(x * 8).round() * 3 for x in maps[:2]]  # ties, and sigmoids that saturate
        return *maps, torch.tensor([[8 * h - 3 * i, 8 * w - 5] for i in range(batch)])

    h, w = Dim("h", min=2), Dim("w", min=2)
    maps = ({0: B, 2: 2 * h, 3: 2 * w}, {0: B, 2: h, 3: w}) * 2
    run = runner(function, inputs(2, 6, 7, 0), (*maps, {0: B}))
    for case in ((1, 9, 5, 1), (3, 8, 11, 2)):
        x = inputs(*case)
        expected = function(*x)
        for found, e in zip(run(*x), expected):
            torch.testing.assert_close(found, e, rtol=0, atol=1e-4)
        assert 0 < expected[3].min() < expected[0].shape[1]  # some were dropped


def test_decode_boxes():
    def function(anchors, deltas, limits):
        coder = (0.0, 0.1, 0.0, 0.0), (0.1, 0.1, 0.2, 0.2)
        clipped = ops.decode_boxes(anchors, deltas, limits, *coder)
        return clipped, ops.decode_boxes(anchors, deltas, None, *coder, symmetric_clip=False)

    def inputs(batch: int, n: int):
        anchors = torch.stack([random_boxes(n, seed=i) for i in range(batch)])
        limits = torch.tensor([[400.0 + i, 300.0] for i in range(batch)])
        return anchors, torch.randn(batch, n, 12) * torch.logspace(-1, 1.8, 12), limits

    run = runner(function, inputs(2, 30), ({0: B, 1: N}, {0: B, 1: N}, {0: B}))
    for case in ((1, 9), (3, 200)):
        x = inputs(*case)
        for found, expected in zip(run(*x), function(*x)):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-4)


def test_select_candidates():
    def function(scores):
        return ops.select_candidates(scores, 0.5, 12)

    run = runner(function, (torch.rand(2, 40),), ({0: B, 1: N},))
    for batch, n in ((1, 12), (3, 100)):
        scores = (torch.rand(batch, n) * 20).round() / 20
        for found, expected in zip(run(scores), function(scores)):
            assert torch.equal(found, expected)


def test_convolution_with_residual():
    def function(x, residual, weight, bias):
        return ops.conv_bn_relu(x, weight, None, bias, None, None, 0.0, 2, 1, residual=residual)

    def inputs(h, w):
        return torch.randn(2, 8, 2 * h, 2 * w), torch.randn(2, 6, h, w), torch.randn(6, 8, 3, 3), torch.randn(6)

    h, w = Dim("h", min=2), Dim("w", min=2)
    run = runner(function, inputs(5, 6), ({0: B, 2: 2 * h, 3: 2 * w}, {0: B, 2: h, 3: w}, None, None))
    x = inputs(9, 4)
    torch.testing.assert_close(run(*x)[0], function(*x), rtol=1e-4, atol=1e-4)
