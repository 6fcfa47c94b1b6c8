import math

import pytest
import torch
from torch import nn

from fastrcnn.layers.non_local import MODES, NonLocal2d, attend

CONV = ["conv.weight", "conv.bias"]


def randomise(module: nn.Module) -> nn.Module:
    """A fresh block is the identity and would hide a missing term."""
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    return module


def naive(block: NonLocal2d, x: torch.Tensor) -> torch.Tensor:
    """Position by position, with the pairwise functions of the paper."""

    def embed(module, picture):
        out = picture if module is None else module(picture)
        return out[0].flatten(1).T  # [H * W, C]

    pictures = []
    for picture in x.split(1):
        theta, phi, g = (embed(m, picture) for m in (block.theta, block.phi, block.g))
        y = []
        for t in theta:
            if block.mode == "concatenation":
                w = block.concat_project.conv.weight.flatten()
                f = torch.stack([(w * torch.cat([t, p])).sum().clamp(min=0) / len(phi) for p in phi])
            elif block.mode == "dot_product":
                f = torch.stack([(t * p).sum() / len(phi) for p in phi])
            else:
                f = torch.stack([(t * p).sum() for p in phi])
                f = torch.exp(f / math.sqrt(len(t)) if block.scale != 1 else f)
                f = f / f.sum()
            y.append(sum(weight * value for weight, value in zip(f, g)))
        pictures.append(picture + block.conv_out(torch.stack(y).T.reshape(1, -1, *x.shape[2:])))
    return torch.cat(pictures)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sub_sample", [False, True])
@pytest.mark.parametrize("reduction, use_scale", [(1, True), (2, True), (2, False), (99, True)])
def test_equals_the_definition(mode, sub_sample, reduction, use_scale):
    block = randomise(NonLocal2d(6, sub_sample, reduction, use_scale, mode=mode)).double()
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(block(x), naive(block, x))


@pytest.mark.parametrize(
    "mode, use_scale, y",
    [
        # theta, phi and g double x = (0, 1): pairs of theta phi are (0, 0), (0, 4); the width is 1, so scaling is by 1.
        ("gaussian", True, [1, 2 * math.e / (1 + math.e)]),
        ("embedded_gaussian", True, [1, 2 * math.e**4 / (1 + math.e**4)]),
        ("dot_product", True, [0, 4]),
        # relu(theta + phi) is (0, 2), (2, 4).
        ("concatenation", True, [2, 4]),
    ],
)
def test_a_worked_example(mode, use_scale, y):
    block = NonLocal2d(1, reduction=1, use_scale=use_scale, mode=mode)
    for m in block.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.constant_(m.weight, 2)
    nn.init.ones_(block.conv_out.conv.weight)
    if mode == "concatenation":
        nn.init.ones_(block.concat_project.conv.weight)
    x = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)
    torch.testing.assert_close(block(x) - x, torch.tensor(y, dtype=torch.float32).view(1, 1, 1, 2))


@pytest.mark.parametrize("mode", MODES)
def test_the_order_of_the_positions_does_not_matter(mode):
    block = randomise(NonLocal2d(6, mode=mode)).double()
    x = torch.randn(1, 6, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(block(x.flip(2, 3)).flip(2, 3), block(x))


def test_keys_are_those_of_mmcv():
    def keys(**options):
        return set(NonLocal2d(8, **options).state_dict())

    def names(*modules):
        return {f"{m}.{k}" for m in modules for k in CONV}

    assert keys() == keys(mode="dot_product") == names("g", "conv_out", "theta", "phi")
    assert keys(mode="gaussian") == names("g", "conv_out")
    assert keys(mode="gaussian", sub_sample=True) == names("g.0", "conv_out")
    assert keys(sub_sample=True) == names("g.0", "conv_out", "theta", "phi.0")
    assert keys(mode="concatenation") == names("g", "conv_out", "theta", "phi") | {"concat_project.conv.weight"}
    bn = {f"conv_out.bn.{k}" for k in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
    assert keys(norm_cfg=dict(type="BN")) == names("g", "theta", "phi") | {"conv_out.conv.weight"} | bn
    assert NonLocal2d(8, reduction=3).theta.conv.weight.shape == (2, 8, 1, 1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm_cfg", [None, dict(type="BN")])
def test_a_fresh_block_is_the_identity(mode, norm_cfg):
    x = torch.randn(2, 8, 4, 6)
    assert torch.equal(NonLocal2d(8, mode=mode, norm_cfg=norm_cfg)(x), x)
    block = NonLocal2d(8, mode=mode, norm_cfg=norm_cfg, zeros_init=False)
    assert not torch.equal(block(x), x)


def test_initial_deviations():
    block = NonLocal2d(256, norm_cfg=dict(type="BN"), mode="concatenation", std=0.02, zeros_init=False)
    for m in (block.g, block.theta, block.phi):
        assert m.conv.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert not m.conv.bias.any()
    assert block.conv_out.bn.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert block.conv_out.conv.weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.05)
    assert block.concat_project.conv.weight.std().item() == pytest.approx(2**0.5, rel=0.2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sub_sample", [False, True])
def test_gradients(mode, sub_sample):
    block = randomise(NonLocal2d(4, sub_sample, mode=mode)).double()
    x = torch.randn(1, 4, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block, x, fast_mode=True)
    block(x).square().sum().backward()
    # phi's bias shifts a row of logits as a whole, which softmax does not see.
    unseen = "phi.0.conv.bias" if sub_sample else "phi.conv.bias"
    unseen = unseen if mode == "embedded_gaussian" else None
    assert all(p.grad.abs().sum() > 1e-8 for n, p in block.named_parameters() if n != unseen)


@pytest.mark.parametrize("mode", ["gaussian", "embedded_gaussian", "dot_product"])
def test_no_matrix_of_all_pairs_is_kept(mode):
    block = NonLocal2d(8, mode=mode)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        block(torch.randn(1, 8, 32, 32, requires_grad=True))
    assert 0 < max(saved) < 1024 * 1024


@pytest.mark.parametrize("width", [3, 5, 8])
def test_attend_takes_values_of_another_width(width):
    query, key, value = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 6, 5), torch.randn(2, 3, 6, width)
    mask = torch.rand(4, 6) < 0.5
    mask[:, 0] = True
    expected = (query @ key.transpose(2, 3) * 0.3).masked_fill(~mask, -math.inf).softmax(3) @ value
    torch.testing.assert_close(attend(query, key, value, 0.3, mask), expected)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 1e-2), (torch.bfloat16, 6e-2)])
@pytest.mark.parametrize("mode", MODES)
def test_half_precision(dtype, tolerance, mode, device):
    block = randomise(NonLocal2d(16, mode=mode)).to(device)
    x = torch.randn(2, 16, 6, 5, device=device) / 2
    with torch.no_grad():
        expected = block(x)
        out = block.to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def test_dot_product_stays_in_the_range_of_half_floats():
    block = NonLocal2d(1, reduction=1, mode="dot_product")
    for m in block.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.ones_(m.weight)
    x = torch.full((1, 1, 100, 100), 6.0)
    # 10,000 products of 36 sum to more than 65,504; divided by the number of positions they are 36 again.
    torch.testing.assert_close(block.half()(x.half()).float(), x + 6 * 36, rtol=5e-3, atol=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sub_sample", [False, True])
def test_layouts_empty_batches_and_compile(mode, sub_sample, device):
    block = randomise(NonLocal2d(8, sub_sample, mode=mode)).to(device)
    x = torch.randn(2, 8, 4, 6, device=device)
    expected = block(x)
    torch.testing.assert_close(block(x.contiguous(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-4)
    assert block(x[:0]).shape == (0, 8, 4, 6)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options, names",
    [(dict(mode="cosine"), "mode"), (dict(reduction=0), "reduction"), (dict(norm_cfg=dict(type="LN")), "norm_cfg")],
)
def test_bad_arguments_are_named(options, names):
    with pytest.raises(ValueError, match=names):
        NonLocal2d(8, **options)
