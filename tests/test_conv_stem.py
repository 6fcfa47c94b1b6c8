"""The stem in one kernel against float64: on a GPU, or emulated with --emulate-cuda; and who answers for it on CUDA."""

import ctypes
import importlib
import math

import pytest
import torch
import torch.nn.functional as F

from fastrcnn.models import ResNet
from fastrcnn.ops import conv_plan
from fastrcnn.ops.conv_plan import PLAN
from fastrcnn.ops.conv_stem import conv_stem, stem

LAST = torch.channels_last
cuda_module = importlib.import_module("fastrcnn.ops.conv_cuda")


@pytest.fixture
def kernel(device, need_cuda_kernel):
    need_cuda_kernel("_conv_stem", device)


def make(device, dtype, size, outputs=64, images=2, bias=torch.float32):
    x = torch.randn(images, 3, *size).to(device, dtype).contiguous(memory_format=LAST)
    w = (torch.randn(outputs, 3, 7, 7) / 147**0.5).to(device, dtype).contiguous(memory_format=LAST)
    return x, w, torch.randn(outputs).to(device, bias) if bias else None


def convolved(x, w, bias):
    """The convolution and ReLU in float64."""
    return F.relu(F.conv2d(x.double(), w.double(), None if bias is None else bias.double(), 2, 3))


def check(x, w, bias):
    """Sums as good as float32's, rounded once to the dtype: no maximum is off by more than its window's worst sum."""
    out = conv_stem(x, w, bias)
    assert out.dtype == x.dtype and out.is_contiguous(memory_format=LAST)
    right = F.max_pool2d(convolved(x, w, bias), 3, 2, 1)
    size = F.max_pool2d(convolved(x.abs(), w.abs(), None if bias is None else bias.abs()), 3, 2, 1)
    allowed = 4 * torch.finfo(torch.float32).eps * size + 0.5 * torch.finfo(out.dtype).eps * right.abs()
    assert out.shape == right.shape
    excess = ((out.double() - right).abs() - allowed).max()
    assert excess <= 0, f"error {excess:.3g} more than allowed"
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(64, 96), (57, 58), (1, 2), (3, 30), (30, 4), (28, 28), (29, 60)])
def test_sizes(device, kernel, dtype, size):
    check(*make(device, dtype, size))


@pytest.mark.parametrize("outputs", [8, 24, 63, 72, 130])
@pytest.mark.parametrize("bias", [None, torch.float32, torch.float16])
def test_outputs_and_biases(device, kernel, outputs, bias):
    check(*make(device, torch.float16, (30, 34), outputs, 1, bias))


def test_a_block_makes_several_tiles(device, kernel):
    check(*make(device, torch.bfloat16, (2, 2), 1024, 18))


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize("copies", ["early", "late"])
@pytest.mark.parametrize("blocks", "14")
def test_the_order_of_threads_blocks_and_copies_does_not_matter(device, kernel, monkeypatch, order, copies, blocks):
    call = make(device, torch.bfloat16, (32, 60), 64, 1)
    first = check(*call)
    for name, value in (("ORDER", order), ("COPIES", copies), ("BLOCKS", blocks)):
        monkeypatch.setenv(f"EMULATED_CUDA_{name}", value)
    assert torch.equal(conv_stem(*call), first)


def test_every_weight_meets_its_pixel(device, kernel):
    """One weight of one and pixels that are whole numbers: exact, position by position."""
    x = torch.arange(3 * 12 * 14).remainder(251).view(1, 3, 12, 14).to(device, torch.bfloat16)
    x = x.contiguous(memory_format=LAST)
    w = torch.eye(147).view(147, 3, 7, 7).to(device, torch.bfloat16).contiguous(memory_format=LAST)
    right = F.max_pool2d(convolved(x, w, None), 3, 2, 1)
    assert torch.equal(conv_stem(x, w, None).double(), right)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_infinity_and_nan_are_the_references(device, kernel, dtype):
    """One pixel alone, under the middle of a kernel of ones and minus ones."""
    for value in (math.nan, -math.nan, math.inf, -math.inf, -0.0, torch.finfo(dtype).max):
        x, w, _ = make(device, dtype, (30, 30), 8, 1, None)
        x.zero_()[0, 1, 14, 16] = value
        w.zero_()[:4, 1] = 1
        w[4:, 1] = -1
        torch.testing.assert_close(
            conv_stem(x, w, None).double(), F.max_pool2d(convolved(x, w, None), 3, 2, 1), equal_nan=True, rtol=0, atol=0
        )


def test_fragments_are_read_without_bank_conflicts(device, kernel):
    if device != "cpu":
        pytest.skip("counted by the emulator")
    name = next(n for n in torch.ops.loaded_libraries if n.endswith("emulated_cuda.so"))
    count = ctypes.CDLL(name).emulated_cuda_conflicts
    count.restype = ctypes.c_uint64
    count()
    check(*make(device, torch.bfloat16, (64, 96)))
    assert count() == 0


def test_wrong_arguments_are_refused(device, kernel):
    x, w, bias = make(device, torch.float16, (8, 10))
    wrong = {
        "input must have an even width": (make(device, torch.float16, (8, 9))[0], w, bias),
        "input must be channels-last": (x.contiguous(), w, bias),
        "weight must be channels-last": (x, w.contiguous(), bias),
        "weight must have shape": (x, w[..., :5], bias),
        "weight must have the dtype": (x, w.float(), bias),
        "bias must be float32": (x, w, bias.double()),
        "bias must have shape": (x, w, bias[1:]),
        "input must be float16": (x.float(), w.float(), bias),
    }
    for message, call in wrong.items():
        with pytest.raises(ValueError, match=f"^{message}"):
            conv_stem(*call)
    assert conv_stem(x[:0], w, bias).shape == (0, 64, 2, 3)


@pytest.mark.parametrize("fastest", ["separate", "stem"])
def test_whichever_is_planned_answers(device, kernel, monkeypatch, fastest):
    """The function that is registered for CUDA, on CPU tensors."""
    if device != "cpu":
        pytest.skip("on CPU tensors, with --emulate-cuda")
    PLAN.clear()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    monkeypatch.setattr(conv_plan, "milliseconds", lambda call: 1.0 + (call.args[0] != fastest))
    asked, kernel = [], cuda_module.conv_stem
    monkeypatch.setattr(cuda_module, "conv_stem", lambda *a: asked.append(a) or kernel(*a))
    x, w, bias = make(device, torch.bfloat16, (20, 24))
    cuda_module._stem(x, w, bias)
    (kind,) = PLAN
    assert kind == "H100, bfloat16, 3->64 7x7 /2 p3 d1 g1, 2^8 pixels + bias, relu, max pool"
    assert list(PLAN[kind]) == [fastest, *({"separate", "stem"} - {fastest})]
    asked.clear()
    out = cuda_module._stem(x.contiguous(), w.contiguous(), bias)  # as they come
    assert len(asked) == (fastest == "stem")
    right = F.max_pool2d(convolved(x, w, bias), 3, 2, 1)
    assert (out.double() - right).abs().max() <= 4 * torch.finfo(x.dtype).eps * right.abs().max()
    for other in ((x.float(), w.float(), bias), make(device, x.dtype, (20, 23)), (x[:, :1], w[:, :1], bias)):
        asked.clear()
        out = cuda_module._stem(*other)
        right = F.max_pool2d(convolved(*other), 3, 2, 1)
        assert not asked and (out.double() - right).abs().max() <= 4 * torch.finfo(x.dtype).eps * right.abs().max()
    PLAN.clear()


def test_stem_equals_the_layers_and_has_their_gradient(device):
    x, w, bias = make(device, torch.float32, (21, 26), 8)
    leaves = [t.clone().requires_grad_() for t in (x, w, bias)]
    plain = [t.double().requires_grad_() for t in (x, w, bias)]
    out, right = stem(*leaves), F.max_pool2d(convolved(*plain), 3, 2, 1)
    torch.testing.assert_close(out.double(), right, rtol=1e-5, atol=1e-5)
    for a, b in zip(torch.autograd.grad(out.sum(), leaves), torch.autograd.grad(right.sum(), plain)):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_a_folded_backbone_asks_for_it(device, monkeypatch):
    from fastrcnn.layers import fold_batch_norm
    from fastrcnn.models import resnet

    asked = []
    monkeypatch.setattr(resnet, "stem", lambda *a: asked.append(a) or stem(*a))
    net = ResNet(18, base_channels=8).to(device).eval()
    x = torch.randn(1, 3, 32, 64, device=device)
    with torch.no_grad():
        before = net(x)
        assert not asked
        after = fold_batch_norm(net)(x)
    assert len(asked) == 1
    for a, b in zip(after, before):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
