import math

import pytest
import torch
from torch import nn

from fastrcnn.layers.context_block import ContextBlock

BOTH = ("channel_add", "channel_mul")


def randomise(module: nn.Module) -> nn.Module:
    """A fresh block is close to the identity and would hide a missing term."""
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    return module


def transform(layers: nn.Sequential, context: torch.Tensor) -> torch.Tensor:
    shrink, norm, _, expand = layers
    hidden = shrink.weight[:, :, 0, 0] @ context + shrink.bias
    hidden = (hidden - hidden.mean()) / (hidden.var(unbiased=False) + norm.eps).sqrt()
    hidden = (hidden * norm.weight[:, 0, 0] + norm.bias[:, 0, 0]).clamp(min=0)
    return expand.weight[:, :, 0, 0] @ hidden + expand.bias


def naive(block: ContextBlock, x: torch.Tensor) -> torch.Tensor:
    """Picture by picture, pixel by pixel."""
    out = []
    for picture in x:
        pixels = picture.flatten(1).T  # [H * W, C]
        if block.conv_mask is None:
            weights = [1 / len(pixels)] * len(pixels)
        else:
            mask = block.conv_mask.weight.flatten(), block.conv_mask.bias
            weights = [math.exp(float(p @ mask[0] + mask[1])) for p in pixels]
            weights = [w / sum(weights) for w in weights]
        context = sum(w * p for w, p in zip(weights, pixels))
        mul, add = torch.ones(len(context)), torch.zeros(len(context))
        if block.channel_mul_conv is not None:
            mul = 1 / (1 + torch.exp(-transform(block.channel_mul_conv, context)))
        if block.channel_add_conv is not None:
            add = transform(block.channel_add_conv, context)
        out.append(picture * mul[:, None, None] + add[:, None, None])
    return torch.stack(out)


@pytest.mark.parametrize("pooling_type", ["att", "avg"])
@pytest.mark.parametrize("fusion_types", [BOTH[:1], BOTH[1:], BOTH, list(BOTH)])
def test_equals_the_definition(pooling_type, fusion_types):
    block = randomise(ContextBlock(8, 0.5, pooling_type, fusion_types)).double()
    x = torch.randn(2, 8, 3, 5, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(block(x), naive(block, x))


def test_a_worked_example():
    block = ContextBlock(1, 1.0)
    nn.init.ones_(block.conv_mask.weight)
    x = torch.tensor([0.0, math.log(3)]).view(1, 1, 1, 2)
    # exp(x) is 1 and 3: the second pixel weighs three quarters.
    torch.testing.assert_close(block._context(x), torch.tensor(0.75 * math.log(3)).view(1, 1, 1, 1))


def test_attention_pools_a_constant_map_to_itself():
    x = torch.randn(2, 8, 1, 1).expand(-1, -1, 4, 6)
    torch.testing.assert_close(randomise(ContextBlock(8, 0.5))._context(x), x[..., :1, :1])


def test_the_order_of_the_pixels_does_not_matter():
    block = randomise(ContextBlock(8, 0.5, fusion_types=BOTH))
    x = torch.randn(1, 8, 4, 6)
    torch.testing.assert_close(block(x.flip(2, 3)).flip(2, 3), block(x))


def test_keys_are_those_of_mmcv():
    pair = ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"]
    add, mul = ([f"{name}_conv.{k}" for k in pair] for name in BOTH)
    assert list(ContextBlock(8, 0.25).state_dict()) == ["conv_mask.weight", "conv_mask.bias"] + add
    assert list(ContextBlock(8, 0.25, "avg", BOTH).state_dict()) == add + mul
    shapes = {k: tuple(v.shape) for k, v in ContextBlock(32, 1 / 16, "avg").state_dict().items()}
    assert shapes["channel_add_conv.0.weight"] == (2, 32, 1, 1)
    assert shapes["channel_add_conv.1.weight"] == (2, 1, 1)


def test_a_fresh_block_adds_nothing_and_halves():
    x = torch.randn(2, 8, 4, 6)
    assert torch.equal(ContextBlock(8, 0.25)(x), x)
    assert torch.equal(ContextBlock(8, 0.25, fusion_types=BOTH)(x), x / 2)
    mask = ContextBlock(4096, 1 / 16).conv_mask
    assert mask.weight.std().item() == pytest.approx((2 / 4096) ** 0.5, rel=0.05)
    assert not mask.bias.any()


def test_gradients():
    block = randomise(ContextBlock(12, 0.5, fusion_types=BOTH)).double()
    x = torch.randn(1, 12, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block, x, fast_mode=True)
    block(x).square().sum().backward()
    # A shift of all logits leaves softmax as it is: the mask's bias has no gradient.
    assert all(p.grad.abs().sum() > 1e-8 for n, p in block.named_parameters() if n != "conv_mask.bias")


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 1e-2), (torch.bfloat16, 6e-2)])
def test_half_precision(dtype, tolerance, device):
    block = randomise(ContextBlock(16, 0.25, fusion_types=BOTH)).to(device)
    x = torch.randn(2, 16, 6, 5, device=device)
    with torch.no_grad():
        expected = block(x)
        out = block.to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("pooling_type", ["att", "avg"])
def test_layouts_empty_batches_and_compile(pooling_type, device):
    block = randomise(ContextBlock(8, 0.5, pooling_type, BOTH)).to(device)
    x = torch.randn(2, 8, 4, 6, device=device)
    torch.testing.assert_close(block(x.contiguous(memory_format=torch.channels_last)), block(x))
    assert block(x[:0]).shape == (0, 8, 4, 6)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), block(x))


@pytest.mark.parametrize(
    "options, names",
    [
        (dict(pooling_type="max"), "pooling_type"),
        (dict(fusion_types=("channel_sub",)), "fusion_types"),
        (dict(fusion_types=()), "fusion_types"),
        (dict(fusion_types="channel_add"), "fusion_types"),
        (dict(ratio=1 / 16), "ratio"),
    ],
)
def test_bad_arguments_are_named(options, names):
    with pytest.raises(ValueError, match=names):
        ContextBlock(**{"in_channels": 8, "ratio": 0.25, **options})
