import pytest
import torch
import torchvision
from torch import nn

from fastrcnn.layers import ConvModule, build_norm, fold_batch_norm
from fastrcnn.models import ResNet, ResNetV1d, ResNeXt
from fastrcnn.models.resnet import BasicBlock, Bottleneck

NARROW = dict(base_channels=16)


def randomise_norms(model: nn.Module) -> nn.Module:
    """Batch norms that change their input: fresh ones are the identity and would hide a missing term."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, std=0.2)
            m.running_mean.normal_(std=0.2)
            m.running_var.uniform_(0.5, 1.5)
    return model


def torchvision_maps(model, x):
    x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
    maps = []
    for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
        x = layer(x)
        maps.append(x)
    return maps


def assert_maps_close(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


def pair(depth: int):
    """torchvision's ResNet and ours, with the same weights and norms that are not the identity."""
    theirs = randomise_norms(torchvision.models.get_model(f"resnet{depth}", weights=None))
    ours = ResNet(depth)
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")}, strict=True)
    return ours, theirs


@pytest.mark.parametrize("depth", [18, 34, 50, 101])
def test_keys_are_those_of_torchvision(depth):
    with torch.device("meta"):
        theirs = torchvision.models.get_model(f"resnet{depth}", weights=None).state_dict()
        ours = ResNet(depth).state_dict()
    assert set(ours) == {k for k in theirs if not k.startswith("fc.")}
    assert all(ours[k].shape == theirs[k].shape for k in ours)


@pytest.mark.parametrize("depth", [18, 34, 50, 101])
def test_eval_output_equals_torchvision(depth, device):
    ours, theirs = (m.eval().to(device) for m in pair(depth))
    x = torch.randn(1, 3, 75, 62, device=device)
    with torch.no_grad():
        assert_maps_close(ours(x), torchvision_maps(theirs, x))


@pytest.mark.parametrize("depth", [18, 50])
def test_training_with_norm_eval_equals_torchvision_in_eval_mode(depth):
    ours, theirs = pair(depth)
    ours.train()
    theirs.eval()
    x = torch.randn(2, 3, 40, 48)
    maps, expected = ours(x), torchvision_maps(theirs, x)
    assert_maps_close(maps, expected)
    sum((m * m).mean() for m in maps).backward()
    sum((m * m).mean() for m in expected).backward()
    gradients = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        expected_grad = gradients[name].grad
        torch.testing.assert_close(p.grad, expected_grad, rtol=1e-3, atol=1e-4 * expected_grad.abs().max().item())


def test_norm_eval_false_trains_the_batch_norms():
    theirs = randomise_norms(torchvision.models.resnet18())
    ours = ResNet(18, norm_eval=False)
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")})
    ours.train()
    theirs.train()
    x = torch.randn(4, 3, 48, 48)
    assert_maps_close(ours(x), torchvision_maps(theirs, x))
    assert ours.bn1.training
    torch.testing.assert_close(ours.layer4[1].bn2.running_mean, theirs.layer4[1].bn2.running_mean)
    assert int(ours.bn1.num_batches_tracked) == 1


def test_resnext_equals_torchvision():
    theirs = randomise_norms(torchvision.models.resnext50_32x4d()).eval()
    ours = ResNeXt(depth=50, groups=32, base_width=4).eval()
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")}, strict=True)
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert_maps_close(ours(x), torchvision_maps(theirs, x))


@pytest.mark.parametrize("groups, base_width, width", [(32, 4, 128), (32, 8, 256), (64, 4, 256)])
def test_resnext_width(groups, base_width, width):
    with torch.device("meta"):
        model = ResNeXt(depth=101, groups=groups, base_width=base_width)
    assert list(model.layer1[0].conv2.weight.shape) == [width, width // groups, 3, 3]


def test_v1d_has_a_deep_stem_and_pools_before_the_shortcut():
    model = randomise_norms(ResNetV1d(depth=50, **NARROW)).eval()
    keys = set(model.state_dict())
    assert {f"stem.{i}.weight" for i in (0, 1, 3, 4, 6, 7)} <= keys
    assert {"layer1.0.downsample.1.weight", "layer1.0.downsample.2.weight"} <= keys
    assert not any(k.startswith(("conv1", "bn1", "layer1.0.downsample.0")) for k in keys)
    assert [model.stem[i].stride for i in (0, 3, 6)] == [(2, 2), (1, 1), (1, 1)]
    assert [model.stem[i].out_channels for i in (0, 3, 6)] == [8, 8, 16]
    pool, conv, _ = model.layer2[0].downsample
    assert (pool.kernel_size, pool.stride, pool.ceil_mode, pool.count_include_pad) == (2, 2, True, False)
    assert conv.stride == (1, 1)
    x = torch.randn(1, 3, 70, 50)
    with torch.no_grad():
        maps = model(x)
        expected = model.maxpool(model.stem(x))
        for block in model.layer1:
            expected = plain_bottleneck(block, expected)
    assert [list(m.shape[1:]) for m in maps] == [[64, 18, 13], [128, 9, 7], [256, 5, 4], [512, 3, 2]]
    torch.testing.assert_close(maps[0], expected, rtol=1e-4, atol=1e-4)


def plain_bottleneck(block, x):
    out = torch.relu(block.bn1(block.conv1(x)))
    out = torch.relu(block.bn2(block.conv2(out)))
    return torch.relu(block.bn3(block.conv3(out)) + (x if block.downsample is None else block.downsample(x)))


@pytest.mark.parametrize("style, strides", [("pytorch", (1, 2)), ("caffe", (2, 1))])
def test_style_places_the_stride(style, strides):
    model = randomise_norms(ResNet(50, style=style, **NARROW)).eval()
    for layer in (model.layer2, model.layer3, model.layer4):
        assert (layer[0].conv1.stride[0], layer[0].conv2.stride[0]) == strides
        assert layer[0].downsample[0].stride == (2, 2)
        assert layer[1].conv1.stride == layer[1].conv2.stride == (1, 1)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        maps = model(x)
        expected = maps[0]
        for block in model.layer2:
            expected = plain_bottleneck(block, expected)
    torch.testing.assert_close(maps[1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frozen_stages", [-1, 0, 1, 4])
@pytest.mark.parametrize("cls, depth", [(ResNet, 18), (ResNetV1d, 50)])
def test_frozen_stages_do_not_train(frozen_stages, cls, depth):
    model = cls(depth=depth, frozen_stages=frozen_stages, norm_eval=False, **NARROW).train()
    stem = ("stem.",) if cls is ResNetV1d else ("conv1.", "bn1.")
    frozen = (stem if frozen_stages >= 0 else ()) + tuple(f"layer{i}." for i in range(1, frozen_stages + 1))
    for name, p in model.named_parameters():
        assert p.requires_grad == (not name.startswith(frozen)), name
    for name, m in model.named_modules():
        if isinstance(m, nn.BatchNorm2d):
            assert m.training == (not f"{name}.".startswith(frozen)), name
    before = {k: v.clone() for k, v in model.state_dict().items() if "running" in k}
    model(torch.randn(2, 3, 64, 64))
    for key, value in before.items():
        assert torch.equal(value, model.state_dict()[key]) == key.startswith(frozen), key


def test_norm_eval_leaves_the_affine_parameters_trainable():
    model = ResNet(18, norm_eval=True, **NARROW).train()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and not any(m.training for m in norms)
    assert all(m.weight.requires_grad and m.bias.requires_grad for m in norms)
    fixed = ResNet(18, norm_cfg=dict(type="BN", requires_grad=False), **NARROW)
    assert not any(p.requires_grad for n, p in fixed.named_parameters() if "bn" in n or "downsample.1" in n)
    assert all(p.requires_grad for n, p in fixed.named_parameters() if "conv" in n)


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("norm_eval", [True, False])
def test_checkpointing_gives_the_same_gradients(depth, norm_eval):
    options = dict(norm_eval=norm_eval, num_stages=2, out_indices=(0, 1), **NARROW)
    plain = randomise_norms(ResNet(depth, **options)).train()
    saving = ResNet(depth, with_cp=True, **options).train()
    saving.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 32, 40)
    for model in (plain, saving):
        sum((m * m).mean() for m in model(x)).backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6 * a.grad.abs().max().item(), msg=name)


@pytest.mark.parametrize("depth, last", [(18, "bn2"), (50, "bn3")])
@pytest.mark.parametrize("zero", [True, False])
def test_zero_init_residual(depth, last, zero):
    model = ResNet(depth, zero_init_residual=zero, **NARROW)
    blocks = [m for m in model.modules() if isinstance(m, BasicBlock | Bottleneck)]
    assert blocks and all((getattr(b, last).weight == (0.0 if zero else 1.0)).all() for b in blocks)
    assert all((b.bn1.weight == 1.0).all() for b in blocks)


def test_initial_convolutions_have_fan_out_variance():
    weight = ResNet(18).layer4[1].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)


def test_group_norm():
    model = ResNet(50, norm_cfg=dict(type="GN", num_groups=8), **NARROW).train()
    nn.init.normal_(model.layer1[0].gn3.weight)
    assert {"gn1.weight", "layer1.0.gn3.bias", "layer1.0.downsample.1.weight"} <= set(model.state_dict())
    x = torch.randn(2, 3, 64, 64)
    expected = torch.relu(model.gn1(model.conv1(x)))
    expected = model.maxpool(expected)
    block = model.layer1[0]
    out = torch.relu(block.gn2(block.conv2(torch.relu(block.gn1(block.conv1(expected))))))
    expected = torch.relu(block.gn3(block.conv3(out)) + block.downsample(expected))
    torch.testing.assert_close(block(model.maxpool(torch.relu(model.gn1(model.conv1(x))))), expected)
    model(x)[-1].mean().backward()
    assert model.gn1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "options, sizes",
    [
        (dict(), [(25, 19), (13, 10), (7, 5), (4, 3)]),
        (dict(strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2)), [(25, 19), (13, 10), (7, 5), (7, 5)]),
        (dict(num_stages=3, strides=(1, 2, 2), dilations=(1, 1, 1), out_indices=(2,)), [(7, 5)]),
        (dict(strides=(1, 1, 2, 2), out_indices=(1, 3)), [(25, 19), (7, 5)]),
    ],
)
@pytest.mark.parametrize("depth", [18, 50])
def test_strides_and_dilations_give_the_map_sizes(options, sizes, depth):
    model = ResNet(depth, **options, **NARROW).eval()
    with torch.no_grad():
        maps = model(torch.randn(1, 3, 97, 75))
    assert [tuple(m.shape[2:]) for m in maps] == sizes
    if "dilations" in options and options["dilations"][-1] == 2:
        conv = model.layer4[0].conv1 if depth == 18 else model.layer4[1].conv2
        assert (conv.dilation, conv.padding) == ((2, 2), (2, 2))


@pytest.mark.parametrize(
    "options, names",
    [
        (dict(depth=42), "depth"),
        (dict(depth=18, num_stages=2, out_indices=(0, 2)), "out_indices"),
        (dict(depth=18, num_stages=5), "num_stages"),
        (dict(depth=18, strides=(1, 2)), "strides"),
        (dict(depth=18, dilations=(1, 1, 1)), "dilations"),
        (dict(depth=18, frozen_stages=5), "frozen_stages"),
        (dict(depth=50, style="tensorflow"), "style"),
        (dict(depth=18, norm_cfg=dict(type="LN")), "norm_cfg"),
        (dict(depth=18, conv_cfg=dict(type="DCNv3")), "conv_cfg"),
    ],
)
def test_bad_arguments_are_named(options, names):
    with pytest.raises(ValueError, match=names):
        ResNet(**options)


def test_a_norm_cfg_without_a_type_is_refused():
    with pytest.raises(TypeError, match="norm_cfg"):
        build_norm(dict(requires_grad=True), 8)


@pytest.mark.parametrize("make", [lambda: ResNet(18, **NARROW), lambda: ResNetV1d(depth=50, **NARROW)])
def test_folding_the_batch_norms_keeps_the_output(make):
    model = randomise_norms(make()).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = model(x)
        fold_batch_norm(model)
        assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
        assert_maps_close(model(x), before)


@pytest.mark.parametrize("bias", [True, False])
def test_folding_a_conv_module_keeps_the_output(bias):
    module = ConvModule(3, 8, 3, padding=1, bias=bias, norm_cfg=dict(type="BN"), act_cfg=dict(type="LeakyReLU"))
    randomise_norms(module).eval()
    if bias:
        nn.init.normal_(module.conv.bias)
    x = torch.randn(2, 3, 9, 7)
    with torch.no_grad():
        plain = nn.functional.leaky_relu(module.bn(module.conv(x)))
        torch.testing.assert_close(module(x), plain, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(fold_batch_norm(module)(x), plain, rtol=1e-5, atol=1e-5)


def test_maps_are_channels_last_for_either_layout(device):
    model = randomise_norms(ResNet(18, **NARROW)).eval().to(device)
    x = torch.randn(2, 3, 64, 64, device=device)
    with torch.no_grad():
        a, b = model(x), model(x.contiguous(memory_format=torch.channels_last))
    for m, n in zip(a, b):
        assert m.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(m, n)
