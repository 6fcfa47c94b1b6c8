import itertools
import math

import pytest
import torch
from torch import nn

from fastrcnn.layers.generalized_attention import GeneralizedAttention

ATTENTION_TYPES = ["".join(digits) for digits in itertools.product("01", repeat=4)]
NARROW = dict(in_channels=8, num_heads=2)


def is_square_only(attention_type: str) -> bool:
    return attention_type[1] == "1" and attention_type[3] == "0"


def randomise(module: nn.Module) -> nn.Module:
    """A fresh block is the identity and would hide a missing term."""
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    return module


def waves(offset: float, dim: int) -> torch.Tensor:
    """Position embedding of one offset along one axis: dim / 4 sines, then as many cosines."""
    phases = [offset / 1000 ** (4 * i / dim) for i in range(dim // 4)]
    return torch.tensor([math.sin(p) for p in phases] + [math.cos(p) for p in phases], dtype=torch.float64)


def naive(m: GeneralizedAttention, x: torch.Tensor) -> torch.Tensor:
    """Query by query, key by key, head by head, term by term; q_stride 1 and no spatial range. x [1, C, H, W]."""
    size, dim = m.head_dim, m.position_embedding_dim
    height, width = x.shape[2:]
    gathered = torch.zeros(size * m.num_heads, height, width, dtype=x.dtype)
    uses = m.attention_type
    keys = list(itertools.product(range(0, height, m.kv_stride), range(0, width, m.kv_stride)))
    for y, x0, head in itertools.product(range(height), range(width), range(m.num_heads)):
        of = slice(head * size, (head + 1) * size)

        def project(conv, row, column, of=of):
            return conv.weight[of, :, 0, 0] @ x[0, :, row, column]

        energies = []
        for v, u in keys:
            energy = torch.zeros((), dtype=x.dtype)
            if uses[0]:
                energy = energy + project(m.query_conv, y, x0) @ project(m.key_conv, v, u)
            if uses[2]:
                energy = energy + m.appr_bias[of] @ project(m.key_conv, v, u)
            if uses[1] or uses[3]:
                p_x = m.appr_geom_fc_x.weight[of] @ waves((x0 - u) * m.position_magnitude, dim) / math.sqrt(2)
                p_y = m.appr_geom_fc_y.weight[of] @ waves((y - v) * m.position_magnitude, dim) / math.sqrt(2)
            if uses[1]:
                energy = energy + project(m.query_conv, y, x0) @ p_x
                energy = energy + project(m.query_conv, *((y, x0) if uses[3] else (x0, y))) @ p_y
            if uses[3]:
                energy = energy + m.geom_bias[of] @ (p_x + p_y)
            energies.append(energy)
        weights = torch.stack(energies).softmax(0)
        gathered[of, y, x0] = sum(w * project(m.value_conv, v, u) for w, (v, u) in zip(weights, keys))
    projected = torch.einsum("oc,chw->ohw", m.proj_conv.weight[:, :, 0, 0], gathered) + m.proj_conv.bias[:, None, None]
    return x + m.gamma * projected


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
@pytest.mark.parametrize(
    "options", [dict(kv_stride=1), dict(num_heads=3, position_magnitude=0.5), dict(position_embedding_dim=12)]
)
def test_equals_the_definition(attention_type, options):
    m = randomise(GeneralizedAttention(**{**NARROW, **options, "attention_type": attention_type})).double()
    x = torch.randn(1, 8, *((3, 3) if is_square_only(attention_type) else (3, 4)), dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(m(x), naive(m, x))


def test_a_worked_example():
    m = GeneralizedAttention(1, num_heads=1, kv_stride=1, attention_type="0010")
    for p in m.parameters():
        nn.init.ones_(p)
    nn.init.zeros_(m.proj_conv.bias)
    x = torch.tensor([0.0, math.log(3)]).view(1, 1, 1, 2)
    # Both pixels gather a quarter of the first and three quarters of the second.
    torch.testing.assert_close(m(x), x + 0.75 * math.log(3))


def test_without_terms_every_key_counts_the_same():
    m = randomise(GeneralizedAttention(**NARROW, kv_stride=2, attention_type="0000"))
    x = torch.randn(2, 8, 5, 6)
    mean = m.value_conv(x)[..., ::2, ::2].mean((2, 3), keepdim=True)
    torch.testing.assert_close(m(x), x + m.gamma * m.proj_conv(mean))


def test_key_content_alone_gives_all_queries_the_same():
    m = randomise(GeneralizedAttention(**NARROW, q_stride=2, attention_type="0010"))
    x = torch.randn(2, 8, 5, 6)
    added = m(x) - x
    torch.testing.assert_close(added, added[..., :1, :1].expand_as(added), rtol=1e-4, atol=1e-5)


def test_relative_position_alone_sees_the_values_not_the_content():
    m = randomise(GeneralizedAttention(**NARROW, attention_type="0001"))
    a, b = torch.randn(2, 1, 8, 5, 6)
    # With fixed weights the block is linear in x, save for the projection's bias.
    bias = m.gamma * m.proj_conv.bias[:, None, None]
    torch.testing.assert_close(m(a + b) + bias, m(a) + m(b), rtol=1e-4, atol=1e-4)


def test_strides_sample_queries_and_keys():
    m = randomise(GeneralizedAttention(**NARROW, kv_stride=3, q_stride=2)).double()
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)
    every = randomise(GeneralizedAttention(**NARROW, kv_stride=3)).double()
    every.load_state_dict(m.state_dict())
    with torch.no_grad():
        queries = (every(x) - x)[..., ::2, ::2]
        expected = x + nn.functional.interpolate(queries, (9, 7), mode="bilinear", align_corners=False)
        torch.testing.assert_close(m(x), expected)


@pytest.mark.parametrize("spatial_range, kv_stride", [(0, 1), (2, 1), (1, 2), (4, 3)])
def test_spatial_range_limits_what_a_query_sees(spatial_range, kv_stride):
    m = GeneralizedAttention(512, spatial_range, 8, kv_stride=kv_stride, attention_type="0000").double()
    nn.init.ones_(m.gamma)
    x = torch.randn(1, 512, 7, 6, dtype=torch.float64)
    with torch.no_grad():
        values, out = m.value_conv(x[..., ::kv_stride, ::kv_stride])[0], m(x)
        for y, x0 in itertools.product(range(7), range(6)):

            def seen(i, spatial_range=spatial_range):
                first = max((i - spatial_range) // kv_stride, 0)
                return slice(first, (i + spatial_range + 1) // kv_stride + 1)

            mean = values[:, seen(y), seen(x0)].mean((1, 2))
            expected = x[0, :, y, x0] + m.proj_conv.weight[:, :, 0, 0] @ mean
            torch.testing.assert_close(out[0, :, y, x0], expected)


def test_a_map_larger_than_the_stored_mask_is_refused():
    m = GeneralizedAttention(512, 2, 8)
    assert m.local_constraint_map.shape == (42, 42, 21, 21)
    assert m.local_constraint_map.dtype == torch.uint8
    assert m(torch.randn(1, 512, 42, 42)).shape == (1, 512, 42, 42)
    with pytest.raises(ValueError, match="spatial_range"):
        m(torch.randn(1, 512, 43, 4))


def test_keys_are_those_of_mmcv():
    def keys(attention_type, **options):
        return set(GeneralizedAttention(**{**NARROW, **options, "attention_type": attention_type}).state_dict())

    always = {"value_conv.weight", "proj_conv.weight", "proj_conv.bias", "gamma"}
    offsets = {"appr_geom_fc_x.weight", "appr_geom_fc_y.weight"}
    assert keys("0000") == always
    assert keys("1000") == always | {"query_conv.weight", "key_conv.weight"}
    assert keys("0100") == always | offsets | {"query_conv.weight"}
    assert keys("0010") == always | {"key_conv.weight", "appr_bias"}
    assert keys("0001") == always | offsets | {"geom_bias"}
    assert keys("1111") == keys("1000") | offsets | {"appr_bias", "geom_bias"}
    assert keys("0000", in_channels=512, spatial_range=1) == always | {"local_constraint_map"}
    shapes = {k: tuple(v.shape) for k, v in GeneralizedAttention(256, kv_stride=2).state_dict().items()}
    assert shapes["query_conv.weight"] == (252, 256, 1, 1)  # nine heads of 28
    assert shapes["appr_geom_fc_x.weight"] == (252, 128)
    assert shapes["geom_bias"] == (252,)


def test_a_fresh_block_is_the_identity():
    m = GeneralizedAttention(256, num_heads=8)
    x = torch.randn(1, 256, 4, 6)
    assert torch.equal(m(x), x)
    assert m.query_conv.weight.std().item() == pytest.approx(1 / 16, rel=0.05)  # uniform of variance 1 / fan-in
    assert m.query_conv.weight.abs().max() <= 3**0.5 / 16
    assert m.appr_bias.abs().max() <= 1 / 8
    assert not m.proj_conv.bias.any()


@pytest.mark.parametrize("attention_type", ["1111", "0010", "0100", "0001", "1010"])
def test_gradients(attention_type):
    m = randomise(GeneralizedAttention(4, num_heads=2, attention_type=attention_type)).double()
    x = torch.randn(1, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(m, x, fast_mode=True)
    m(x).square().sum().backward()
    assert all(p.grad.abs().sum() > 1e-8 for p in m.parameters())


def test_no_matrix_of_all_pairs_is_kept():
    m = GeneralizedAttention(8, num_heads=2, kv_stride=1)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        m(torch.randn(1, 8, 32, 32, requires_grad=True))
    assert 0 < max(saved) < 1024 * 1024


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 1e-2), (torch.bfloat16, 6e-2)])
@pytest.mark.parametrize("attention_type", ["1111", "0010"])
def test_half_precision(dtype, tolerance, attention_type, device):
    m = GeneralizedAttention(16, num_heads=2, attention_type=attention_type).to(device)
    nn.init.ones_(m.gamma)
    x = torch.randn(2, 16, 9, 7, device=device)
    with torch.no_grad():
        expected = m(x)
        out = m.to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def test_offsets_in_bfloat16_keep_their_odd_pixels():
    m = GeneralizedAttention(8, num_heads=2, kv_stride=1, attention_type="0001").bfloat16()
    x = torch.zeros(1, 8, 1, 1, dtype=torch.bfloat16)
    offsets = m._offset_embedding(m.appr_geom_fc_x, 400, 1, x)
    expected = m.float()._offset_embedding(m.appr_geom_fc_x, 400, 1, x.float())
    torch.testing.assert_close(offsets.float(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_layouts_and_empty_batches(attention_type, device):
    m = randomise(GeneralizedAttention(**NARROW, attention_type=attention_type)).to(device)
    x = torch.randn(2, 8, 6, 6, device=device)
    torch.testing.assert_close(m(x.contiguous(memory_format=torch.channels_last)), m(x), rtol=1e-4, atol=1e-4)
    assert m(x[:0]).shape == (0, 8, 6, 6)


@pytest.mark.parametrize("attention_type", ["0000", "0010", "0100", "1111"])
def test_compile(attention_type):
    m = randomise(GeneralizedAttention(**NARROW, q_stride=2, attention_type=attention_type))
    x = torch.randn(2, 8, 6, 6)
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), m(x), rtol=1e-4, atol=1e-4)


def test_query_and_offset_without_bias_need_a_square_map():
    with pytest.raises(ValueError, match="attention_type"):
        GeneralizedAttention(**NARROW, attention_type="0100")(torch.randn(1, 8, 4, 6))


@pytest.mark.parametrize(
    "options, names",
    [
        (dict(attention_type="111"), "attention_type"),
        (dict(attention_type="1121"), "attention_type"),
        (dict(attention_type=1111), "attention_type"),
        (dict(num_heads=0), "num_heads"),
        (dict(num_heads=9), "num_heads"),
        (dict(kv_stride=0), "kv_stride"),
        (dict(spatial_range=1), "spatial_range"),
        (dict(position_embedding_dim=6), "position_embedding_dim"),
    ],
)
def test_bad_arguments_are_named(options, names):
    with pytest.raises(ValueError, match=names):
        GeneralizedAttention(**{**NARROW, **options})
