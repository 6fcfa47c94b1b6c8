"""The layers DCN and DCNv2: mmcv's keys, initial values and arithmetic, and old checkpoints."""

import math

import pytest
import torch
import torchvision
from torch import nn

from fastrcnn.checkpoints import mmdet
from fastrcnn.layers.deform_conv import DeformConv2dPack, ModulatedDeformConv2dPack

LAYERS = [DeformConv2dPack, ModulatedDeformConv2dPack]


def trained(layer: nn.Module) -> nn.Module:
    """Offsets that are no longer zero."""
    for parameter in layer.conv_offset.parameters():
        nn.init.normal_(parameter, std=0.2)
    return layer


def test_keys_and_shapes():
    layer = DeformConv2dPack(8, 12, 3, padding=1, groups=2, deform_groups=4)
    assert {k: list(v.shape) for k, v in layer.state_dict().items()} == {
        "weight": [12, 4, 3, 3],
        "conv_offset.weight": [72, 8, 3, 3],
        "conv_offset.bias": [72],
    }
    layer = ModulatedDeformConv2dPack(8, 12, (3, 1), deform_groups=2)
    assert {k: list(v.shape) for k, v in layer.state_dict().items()} == {
        "weight": [12, 8, 3, 1],
        "bias": [12],
        "conv_offset.weight": [18, 8, 3, 1],
        "conv_offset.bias": [18],
    }
    assert "bias" not in ModulatedDeformConv2dPack(8, 12, 3, bias=False).state_dict()


def test_initial_values():
    layer = DeformConv2dPack(64, 64, 3)
    bound = math.sqrt(6 / (64 * 9))
    assert 0.95 * bound < layer.weight.abs().max() <= bound
    layer = ModulatedDeformConv2dPack(64, 64, 3)
    bound = 1 / math.sqrt(64 * 9)
    assert 0.95 * bound < layer.weight.abs().max() <= bound
    assert (layer.bias == 0).all()


@pytest.mark.parametrize("stride, dilation, groups", [(1, 1, 1), (2, 1, 2), (1, 2, 4)])
def test_untrained_layers_are_convolutions(device, stride, dilation, groups):
    x = torch.randn(2, 8, 10, 13, device=device)
    where = stride, dilation, dilation, groups  # stride, padding, dilation, groups
    layer = DeformConv2dPack(8, 4, 3, *where).to(device)
    torch.testing.assert_close(layer(x), torch.conv2d(x, layer.weight, None, *where))
    layer = ModulatedDeformConv2dPack(8, 4, 3, *where).to(device)
    nn.init.normal_(layer.bias)
    torch.testing.assert_close(layer(x), torch.conv2d(x, layer.weight / 2, layer.bias, *where))


@pytest.mark.parametrize("deform_groups", [1, 2])
def test_equal_torchvisions_operator(device, deform_groups):
    x = torch.randn(2, 8, 10, 13, device=device)
    layer = trained(DeformConv2dPack(8, 4, 3, 2, 1, deform_groups=deform_groups)).to(device)
    expected = torchvision.ops.deform_conv2d(x, layer.conv_offset(x), layer.weight, None, 2, 1)
    torch.testing.assert_close(layer(x), expected)
    layer = trained(ModulatedDeformConv2dPack(8, 4, 3, 2, 1, deform_groups=deform_groups)).to(device)
    o1, o2, mask = layer.conv_offset(x).chunk(3, dim=1)
    offset, mask = torch.cat([o1, o2], 1), mask.sigmoid()
    expected = torchvision.ops.deform_conv2d(x, offset, layer.weight, layer.bias, 2, 1, mask=mask)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("cls", LAYERS)
def test_every_parameter_learns(device, cls):
    layer = trained(cls(4, 4, 3, padding=1)).to(device)
    layer(torch.randn(2, 4, 6, 7, device=device)).square().sum().backward()
    assert all((p.grad != 0).any() for p in layer.parameters())


@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize("size", [(1, 1), (2, 9), (9, 2)])
def test_inputs_smaller_than_the_kernel(device, cls, size):
    """mmcv pads such an input with zeros below and to the right, and crops the output: the result is the same."""
    x = torch.randn(2, 4, *size, device=device)
    layer = cls(4, 3, 3, padding=1).to(device)
    offset_planes = layer.conv_offset.out_channels
    planes = torch.randn(2, offset_planes, *size, device=device)
    layer.conv_offset.forward = lambda x: planes
    small = layer(x)
    pad = 0, max(3 - size[1], 0), 0, max(3 - size[0], 0)
    planes = nn.functional.pad(planes, pad)
    padded = layer(nn.functional.pad(x, pad))
    torch.testing.assert_close(small, padded[:, :, : size[0], : size[1]])


@pytest.mark.parametrize("cls", LAYERS)
def test_old_checkpoints_hold_the_offsets_beside_the_layer(cls):
    old, new = nn.Module(), nn.Module()
    old.layer1, new.layer1 = nn.Module(), nn.Module()
    old.layer1.conv2, new.layer1.conv2 = trained(cls(4, 4, 3, bias=False)), cls(4, 4, 3, bias=False)
    state = {k.replace("conv2.conv_offset", "conv2_offset"): v for k, v in old.state_dict().items()}
    assert set(state) == {"layer1.conv2.weight", "layer1.conv2_offset.weight", "layer1.conv2_offset.bias"}
    new.load_state_dict(mmdet.convert(state), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(new.state_dict().values(), old.state_dict().values()))


@pytest.mark.parametrize("cls", LAYERS)
def test_channels_last_and_half_precision(device, cls):
    layer = trained(cls(8, 4, 3, padding=1)).to(device)
    x = torch.randn(2, 8, 10, 13, device=device)
    expected = layer(x)
    out = layer.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, expected)
    with torch.autocast(device, torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    # The offsets, too, come from a bfloat16 convolution: 2^-8 of a few pixels moves each sample a little.
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=2**-4 * expected.abs().max().item())


@pytest.mark.parametrize("cls", LAYERS)
def test_compiles_and_exports(device, cls):
    layer, x = trained(cls(4, 4, 3, padding=1)).to(device).eval(), torch.randn(2, 4, 6, 7, device=device)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="bias"):
        DeformConv2dPack(4, 4, 3, bias=True)
    for cls in LAYERS:
        with pytest.raises(ValueError, match="deform_groups"):
            cls(4, 4, 3, deform_groups=3)
        with pytest.raises(ValueError, match="groups"):
            cls(4, 6, 3, groups=4)
