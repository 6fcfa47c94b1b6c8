"""Winograd's convolution: its kernel in each width of vectors, its twin, and when a model uses it."""

import copy
import importlib
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model
from torch import nn

from fastrcnn import Detector
from fastrcnn.layers import conv_norm_act, fold_batch_norm, prepare_convolutions
from fastrcnn.ops import conv_bn_relu, conv_plan
from fastrcnn.ops.conv_cpu import prepared
from fastrcnn.ops.conv_winograd import LANES, OF_INPUT, OF_OUTPUT, OF_WEIGHT, winograd_weight

conv_cpu, op_module = (importlib.import_module(f"fastrcnn.ops.{name}") for name in ("conv_cpu", "conv_winograd"))
kernel, twin = op_module.conv_winograd, op_module._reference

WIDTHS = [lanes for lanes in (4, 8, 16) if lanes <= LANES]

# batch, channels, filters, height, width: odd sizes, single pixels, channels that fill no vector, several blocks of tiles
SIZES = [
    (1, 3, 5, 1, 1),
    (2, 16, 32, 9, 11),
    (1, 70, 45, 13, 21),
    (3, 33, 17, 5, 4),
    (1, 20, 40, 62, 83),
    (2, 1, 40, 4, 9),
]
CASES = list(product(SIZES, [(1, 1), (0, 2), (2, 0)]))
CASES = [(size, padding) for size, padding in CASES if min(size[3] + 2 * padding[0], size[4] + 2 * padding[1]) > 2]


@pytest.fixture(autouse=True)
def no_plan(need_kernel):
    need_kernel("_conv_winograd", "cpu")
    conv_plan.PLAN.clear()
    yield
    conv_plan.PLAN.clear()


def make(size, padding, residual="none"):
    batch, channels, filters, height, width = size
    x, weight = (
        torch.randn(batch, channels, height, width),
        torch.randn(filters, channels, 3, 3) / (9 * channels) ** 0.5,
    )
    shape = [batch, filters, height + 2 * padding[0] - 2, width + 2 * padding[1] - 2]
    if residual == "half":
        shape[2:] = [(n + 1) // 2 for n in shape[2:]]
    return x, weight, torch.randn(filters), None if residual == "none" else torch.randn(shape)


def exact(x, weight, bias, residual, padding, half, relu):
    """In float64, and the sum of absolute terms that roundings are counted in."""
    out = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), 1, padding)
    size = F.conv2d(x.double().abs(), weight.double().abs(), None if bias is None else bias.double().abs(), 1, padding)
    if residual is not None:
        full = residual.double()
        if half:
            full = full.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, : out.shape[2], : out.shape[3]]
        out, size = out + full, size + full.abs()
    return out.relu() if relu else out, size.max()


ROUNDINGS = 8  # as for the direct one (tests/test_conv_bn_relu.py); measured: 4.2 without multiply-add, 2.4 with it


def check(got, right, size):
    assert got.shape == right.shape and got.is_contiguous(memory_format=torch.channels_last)
    error = (got.double() - right).abs().max().item() if got.numel() else 0
    allowed = ROUNDINGS * torch.finfo(torch.float32).eps * float(size)
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def test_the_matrices_make_a_convolution():
    """One axis at a time, in float64, from single pixels and single weights: exact products of polynomials."""
    for d, w in product(torch.eye(6, dtype=torch.float64), torch.eye(3, dtype=torch.float64)):
        got = OF_OUTPUT @ ((OF_INPUT @ d) * (OF_WEIGHT @ w))
        right = [float((d[i : i + 3] * w).sum()) for i in range(4)]
        torch.testing.assert_close(got, torch.tensor(right, dtype=torch.float64), rtol=0, atol=1e-15)


@pytest.mark.parametrize("size, padding", CASES)
@pytest.mark.parametrize("residual", ["none", "full", "half"])
def test_equals_a_direct_convolution_in_float64(size, padding, residual):
    x, weight, bias, addend = make(size, padding, residual)
    layouts = x, x.contiguous(memory_format=torch.channels_last)
    for b in (bias, None):
        right, unit = exact(x, weight, b, addend, padding, residual == "half", False)
        for lanes, relu, given in product(WIDTHS, (False, True), layouts):
            call = given, winograd_weight(weight, lanes), b, addend, padding, len(weight), residual == "half", relu
            check(kernel(*call), right.relu() if relu else right, unit)
    check(twin(*call), right.relu(), unit)


def test_any_number_of_threads_gives_the_same_bits():
    x, weight, bias, _ = make((1, 96, 100, 59, 90), (1, 1))
    packed, before, outs = winograd_weight(weight), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outs.append(kernel(x, packed, bias, None, (1, 1), 100, False, False))
    finally:
        torch.set_num_threads(before)
    check(outs[0], *exact(x, weight, bias, None, (1, 1), False, False))
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_views_and_an_empty_batch():
    x, weight, bias, residual = make((2, 32, 24, 10, 14), (1, 1), "full")
    right, unit = exact(x[:, ::2, 1:-1, ::2], weight[:, :16], bias, residual[..., 2:, 7:], (1, 1), False, True)
    packed = winograd_weight(weight[:, :16])
    check(kernel(x[:, ::2, 1:-1, ::2], packed, bias, residual[..., 2:, 7:], (1, 1), 24, False, True), right, unit)
    assert kernel(x[:0, :16], packed, bias, None, (1, 1), 24, False, True).shape == (0, 24, 10, 14)


def test_relu_keeps_nan_and_a_bad_pixel_stays_in_its_tiles():
    x = torch.zeros(1, 16, 12, 12)
    x[0, 3, 5, 5] = torch.nan
    weight = torch.randn(16, 16, 3, 3)
    out = kernel(x, winograd_weight(weight), None, None, (1, 1), 16, False, True)
    assert out[:, :, 4:7, 4:7].isnan().all() and not out[:, :, 8:].isnan().any()


def test_wrong_arguments_are_refused():
    x, weight, bias, residual = make((1, 16, 16, 6, 6), (1, 1), "full")
    packed = winograd_weight(weight)
    right = dict(x=x, packed=packed, bias=bias, residual=residual)
    wrong = [dict(x=x[:, :8, :, :].repeat(1, 5, 1, 1)), dict(x=x.double()), dict(packed=packed[:35]), dict(bias=bias[:3]),
             dict(residual=residual[..., :3]), dict(packed=packed[..., :3])]  # fmt: skip
    for change in wrong:
        tensors = {**right, **change}.values()
        with pytest.raises(ValueError):
            kernel(*tensors, (1, 1), 16, False, True)
    with pytest.raises(ValueError, match="smaller than the kernel"):
        kernel(x[..., :2], packed, bias, None, (1, 0), 16, False, True)


def test_which_convolutions_are_prepared():
    def of(*shape, stride=1, dilation=1, groups=1, dtype=torch.float32):
        return prepared(torch.ones(shape, dtype=dtype), (stride, stride), (dilation, dilation), groups)

    assert of(32, 16, 3, 3).shape == (36, -(-32 // (2 * LANES)), 16, 2 * LANES)
    others = [of(32, 16, 1, 1), of(32, 16, 3, 3, stride=2), of(32, 16, 3, 3, dilation=2), of(32, 16, 3, 3, groups=2)]
    others += [of(32, 16, 3, 3, dtype=torch.float64), of(32, 16, 3, 3, dtype=torch.bfloat16), of(32, 3, 3, 3)]
    assert all(other is None for other in others)


@pytest.fixture
def asked(monkeypatch):
    """What conv_prepared called, in order."""
    calls = []
    for module, name in ((op_module, "conv_winograd"), (conv_cpu, "_direct")):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=function, n=name: calls.append(n) or f(*a))
    return calls


@pytest.mark.parametrize("fastest", ["winograd", "onednn"])
def test_the_plan_decides(asked, monkeypatch, fastest):
    """Both are run once for the proof, timed, and the faster answers; later calls of the kind go to it at once."""
    times = {"winograd": 2.0, "onednn": 2.0, fastest: 1.0}
    monkeypatch.setattr(conv_plan, "host_milliseconds", lambda call: times[call.args[0]])
    x, weight, bias, residual = make((2, 16, 32, 9, 200), (1, 1), "full")
    packed = prepared(weight, (1, 1), (1, 1), 1)
    right, unit = exact(x, weight, bias, residual, (1, 1), False, True)
    name = {"winograd": "conv_winograd", "onednn": "_direct"}[fastest]
    for calls in (["_direct", "conv_winograd", name], [name]):
        check(conv_cpu.conv_prepared(x, weight, packed, bias, (1, 1), residual), right, unit)
        assert asked == calls
        asked.clear()
    ((kind, measured),) = conv_plan.PLAN.items()
    assert next(iter(measured)) == fastest and measured == times
    assert kind.startswith("CPU ") and kind.endswith("float32, 16->32 3x3 /1 p1 d1 g1, 2^10.25 pixels")


@pytest.mark.parametrize("default", [torch.float64, torch.device("meta")], ids=str)
def test_the_process_defaults_of_torch_do_not_decide(default):
    x, weight, bias, _ = make((1, 32, 48, 40, 52), (1, 1))
    packed = prepared(weight, (1, 1), (1, 1), 1)
    of_device = default if isinstance(default, torch.device) else torch.device("cpu")
    torch.set_default_dtype(default if isinstance(default, torch.dtype) else torch.float32)
    try:
        with of_device:
            out = conv_cpu.conv_prepared(x, weight, packed, bias, (1, 1))
    finally:
        torch.set_default_dtype(torch.float32)
    ((_, measured),) = conv_plan.PLAN.items()
    assert set(measured) == {"onednn", "winograd"} and out.dtype == torch.float32 and out.device == x.device


def test_deterministic_mode_measures_nothing(asked):
    x, weight, bias, _ = make((1, 16, 16, 9, 9), (1, 1))
    torch.use_deterministic_algorithms(True)
    try:
        conv_cpu.conv_prepared(x, weight, prepared(weight, (1, 1), (1, 1), 1), bias, (1, 1))
    finally:
        torch.use_deterministic_algorithms(False)
    assert asked == ["conv_winograd"] and not conv_plan.PLAN


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(16, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24).eval()
        nn.init.normal_(self.bn.running_mean)
        nn.init.uniform_(self.bn.weight, 0.5, 1.5)

    def norm_pairs(self):
        yield self.conv, self, "bn"

    def forward(self, x):
        return conv_norm_act(x, self.conv, self.bn)


def test_only_a_prepared_layer_uses_it_without_gradients_and_never_in_an_export(asked):
    layer, x = Layer().eval(), torch.randn(1, 16, 10, 10)
    right = layer(x).detach()
    unfolded = prepare_convolutions(copy.deepcopy(layer).requires_grad_(False))
    torch.testing.assert_close(unfolded(x), right)  # with its norm
    folded = fold_batch_norm(copy.deepcopy(layer)).requires_grad_(False)
    torch.testing.assert_close(folded(x), right)
    assert not asked
    prepare_convolutions(folded)
    torch.testing.assert_close(folded(x), right)
    assert asked.pop() and not prepare_convolutions(copy.deepcopy(folded).bfloat16()).conv.winograd
    asked.clear()
    leaf = x.clone().requires_grad_()
    (got,) = torch.autograd.grad(folded(leaf).sum(), leaf)
    (want,) = torch.autograd.grad(layer(leaf).sum(), leaf)
    torch.testing.assert_close(got, want)
    program = torch.export.export(folded, (x,))
    called = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert [name for name in called if "fastrcnn" in name] == ["fastrcnn.conv_bn_relu.default"]
    assert not asked
    torch.testing.assert_close(torch.compile(folded, backend="eager", fullgraph=True)(x), right)
    assert asked == ["conv_winograd"]


def test_a_detector_finds_with_it_what_it_finds_without(asked):
    image = torch.randint(0, 256, (3, 90, 120), dtype=torch.uint8)
    torch.use_deterministic_algorithms(True)
    try:
        detector = Detector(tiny_model(), device="cpu", precision="fp32", score_threshold=0.0)
        (found,) = detector(image)
        assert "conv_winograd" in asked
        for m in detector.model.modules():
            m.winograd = None
        asked.clear()
        (direct,) = detector(image)
        assert "conv_winograd" not in asked
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(found.scores) == len(direct.scores) > 0
    assert torch.equal(found.labels, direct.labels)
    torch.testing.assert_close(found.boxes, direct.boxes, rtol=0, atol=1e-2)
    torch.testing.assert_close(found.scores, direct.scores, rtol=0, atol=1e-5)


def test_detectors_of_other_precisions_are_not_prepared():
    model = tiny_model()
    for precision in ("bf16", "fp16"):
        detector = Detector(model, device="cpu", precision=precision)
        assert all(getattr(m, "winograd", None) is None for m in detector.model.modules())
    assert Detector(model, device="cpu").precision == "fp32"  # "auto" never rounds on a CPU


def test_public_operator_stays_direct(asked):
    x, weight, bias, _ = make((1, 16, 16, 9, 9), (1, 1))
    conv_bn_relu(x, weight, None, bias, None, None, padding=1)
    assert not asked
