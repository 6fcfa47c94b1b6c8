"""Generalised attention (Zhu et al., "An Empirical Study of Spatial Attention Mechanisms in Deep Networks", 2019)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastrcnn.layers.non_local import attend

# With spatial_range the mask is stored for the largest map of stage conv3 (256 channels) or conv4 (512), as in mmcv.
LARGEST_MAP = {256: 84, 512: 42}


def _sum(*terms: Tensor | None) -> Tensor:
    first, *rest = (t for t in terms if t is not None)
    return sum(rest, first)


class GeneralizedAttention(nn.Module):
    """x + gamma * proj(attention), with an energy of up to four terms between query q and key k at offset o:

        E(q, k) = q . k + q . P(o) + a . k + g . P(o)        attention_type = "1111", one digit for each term

    where a = appr_bias, g = geom_bias and P(o) = (fc_x(waves(o_x)) + fc_y(waves(o_y))) / sqrt(2) embeds the offset in
    pixels of x, times position_magnitude, as sines and cosines. attention_type "0010" alone is a map of salient keys,
    the same for all queries. "?1?0" is mmcv's: the vertical part of q . P(o) takes the query of the transposed
    map, and the map must be square, as GRoIE's RoIs are.

    in_channels: C; each of num_heads heads has C // num_heads channels. spatial_range: how far a query sees, -1 for
    everywhere; else C must be 256 (maps up to 84 x 84) or 512 (42 x 42). position_embedding_dim: numbers in the waves of
    both axes, -1 for C; a multiple of 4. q_stride, kv_stride: every how many pixels there is a query or a key. Source:
    mmcv's GeneralizedAttention, whose state-dict keys these are.
    """

    def __init__(
        self,
        in_channels: int,
        spatial_range: int = -1,
        num_heads: int = 9,
        position_embedding_dim: int = -1,
        position_magnitude: float = 1,
        kv_stride: int = 2,
        q_stride: int = 1,
        attention_type: str = "1111",
    ):
        super().__init__()
        if not isinstance(attention_type, str) or len(attention_type) != 4 or not set(attention_type) <= {"0", "1"}:
            raise ValueError(f'attention_type: expected four digits 0 or 1 such as "0010", got {attention_type!r}')
        if not 1 <= num_heads <= in_channels:
            raise ValueError(f"num_heads: expected 1..{in_channels} (in_channels), got {num_heads}")
        if min(kv_stride, q_stride) < 1:
            raise ValueError(f"kv_stride, q_stride: expected at least 1, got {kv_stride} and {q_stride}")
        if spatial_range >= 0 and in_channels not in LARGEST_MAP:
            raise ValueError(f"spatial_range: needs in_channels in {tuple(LARGEST_MAP)}, got {in_channels}")
        self.num_heads, self.kv_stride, self.q_stride = num_heads, kv_stride, q_stride
        self.position_magnitude, self.spatial_range = position_magnitude, spatial_range
        self.position_embedding_dim = position_embedding_dim if position_embedding_dim > 0 else in_channels
        self.head_dim = in_channels // num_heads
        self.attention_type = tuple(digit == "1" for digit in attention_type)
        query_key, query_offset, key, offset = self.attention_type
        width = self.head_dim * num_heads

        def linear_map() -> nn.Conv2d:
            return nn.Conv2d(in_channels, width, 1, bias=False)

        if query_key or query_offset:
            self.query_conv = linear_map()
        if query_key or key:
            self.key_conv = linear_map()
        self.value_conv = linear_map()
        if query_offset or offset:
            if self.position_embedding_dim % 4:
                raise ValueError(
                    f"position_embedding_dim: expected a multiple of 4, got {self.position_embedding_dim}"
                    + ("" if position_embedding_dim > 0 else " (in_channels)")
                )
            self.appr_geom_fc_x = nn.Linear(self.position_embedding_dim // 2, width, bias=False)
            self.appr_geom_fc_y = nn.Linear(self.position_embedding_dim // 2, width, bias=False)
        if key:
            self.appr_bias = nn.Parameter(torch.empty(width))
        if offset:
            self.geom_bias = nn.Parameter(torch.empty(width))
        self.proj_conv = nn.Conv2d(width, in_channels, 1)
        self.gamma = nn.Parameter(torch.empty(1))
        if spatial_range >= 0:
            self.register_buffer("local_constraint_map", self._constraint_map(LARGEST_MAP[in_channels]))
        self.init_weights()

    def init_weights(self) -> None:
        """LeCun-uniform maps, biases within (2 head_dim)^-1/2, gamma = 0: the block starts as the identity."""
        for m in self.children():
            nn.init.kaiming_uniform_(m.weight, a=1, mode="fan_in", nonlinearity="leaky_relu")
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        bound = (2 * self.head_dim) ** -0.5
        for name in ("appr_bias", "geom_bias"):
            if hasattr(self, name):
                nn.init.uniform_(getattr(self, name), -bound, bound)
        nn.init.zeros_(self.gamma)

    def _constraint_map(self, size: int) -> Tensor:
        """[size, size, K, K] uint8, 1 where the query (y, x) does not see the key (v, u)."""
        query = torch.arange(size)[:, None]
        key = torch.arange((size - 1) // self.kv_stride + 1)
        first = (query - self.spatial_range).div(self.kv_stride, rounding_mode="floor")
        last = (query + self.spatial_range + 1).div(self.kv_stride, rounding_mode="floor")
        seen = (first <= key) & (key <= last)  # [size, K]
        return (~(seen[:, None, :, None] & seen[None, :, None, :])).byte()

    def _mask(self, h: int, w: int, h_kv: int, w_kv: int) -> Tensor | None:
        """[h * w, h_kv * w_kv] bool, true where the query sees the key."""
        if self.spatial_range < 0:
            return None
        size, _, size_kv, _ = self.local_constraint_map.shape
        if max(h, w) > size or max(h_kv, w_kv) > size_kv:
            raise ValueError(f"spatial_range: maps end at {size} queries and {size_kv} keys a side, got "
                             f"{h} x {w} and {h_kv} x {w_kv}")  # fmt: skip
        return (self.local_constraint_map[:h, :w, :h_kv, :w_kv] == 0).reshape(h * w, h_kv * w_kv)

    def _heads(self, x: Tensor) -> Tensor:
        """[B, M * D, H, W] -> [B, M, H, W, D]."""
        return x.unflatten(1, (self.num_heads, self.head_dim)).permute(0, 1, 3, 4, 2)

    def _offset_embedding(self, fc: nn.Linear, size: int, size_kv: int, x: Tensor) -> Tensor:
        """fc of the waves of the offsets along one axis, over sqrt(2): [size, size_kv, M, D]."""
        # Offsets in pixels pass 256, where bfloat16 has no odd numbers: they keep float32 whatever x has.
        like = dict(device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        query = torch.arange(size, **like) * self.q_stride
        key = torch.arange(size_kv, **like) * self.kv_stride
        quarter = self.position_embedding_dim // 4
        wave_length = 1000 ** (torch.arange(quarter, **like) / quarter)
        apart = query[:, None, None] - key[:, None]
        phase = apart * self.position_magnitude / wave_length  # [size, size_kv, quarter]
        waves = torch.cat([phase.sin(), phase.cos()], 2).to(fc.weight.dtype)
        return fc(waves).unflatten(2, (self.num_heads, self.head_dim)) / 2**0.5

    def _attention(self, x_q: Tensor, x_kv: Tensor) -> Tensor:
        """[B, C, h, w] and [B, C, h_kv, w_kv] -> what each query gathers, [B, M * D, h, w].

        The energy is brought into one dot product, so that no [h * w, h_kv * w_kv] matrix is kept: the offset terms are
        a row X[u] and a row Y[v] for each query, and the key at (v, u) picks its entries with two one-hot vectors.
        """
        query_key, query_offset, key, offset = self.attention_type
        (n, _, h, w), (h_kv, w_kv) = x_q.shape, x_kv.shape[2:]
        if self.attention_type == (False, False, True, False):
            h = w = 1  # all queries agree; under spatial_range they see what the first one sees, as in mmcv
        value = self._heads(self.value_conv(x_kv))
        query = self._heads(self.query_conv(x_q)) if query_key or query_offset else None
        bias_shape = 1, self.num_heads, 1, 1, self.head_dim
        left, right = [], []
        if query_key or key:
            bias = self.appr_bias.view(bias_shape) if key else None
            left.append(_sum(query if query_key else None, bias))
            right.append(self._heads(self.key_conv(x_kv)))
        if query_offset or offset:
            bias = self.geom_bias.view(bias_shape) if offset else None
            geometry = _sum(query if query_offset else None, bias)
            embedding_x = self._offset_embedding(self.appr_geom_fc_x, w, w_kv, x_q)
            embedding_y = self._offset_embedding(self.appr_geom_fc_y, h, h_kv, x_q)
            left.append(torch.einsum("nmyxd,xumd->nmyxu", geometry, embedding_x))
            if not offset:
                # mmcv's vertical term reads the query at (x, y) here. The released weights (GRoIE's) were trained so.
                if h != w:
                    raise ValueError(f"attention_type: without its last term this needs square maps, got {h} x {w}")
                geometry = geometry.transpose(2, 3)
            left.append(torch.einsum("nmyxd,yvmd->nmyxv", geometry, embedding_y))
            right.append(torch.eye(w_kv, dtype=value.dtype, device=value.device))
            right.append(torch.eye(h_kv, dtype=value.dtype, device=value.device)[:, None])

        def stack(terms: list[Tensor], height: int, width: int) -> Tensor:
            shape = n, self.num_heads, height, width, -1
            # "0000" has no term: vectors of width 0, and every key counts the same.
            terms = [t.expand(shape) for t in terms] or [value.new_zeros(*shape[:-1], 0)]
            return torch.cat(terms, -1).flatten(2, 3)

        mask = self._mask(h, w, h_kv, w_kv)
        out = attend(stack(left, h, w), stack(right, h_kv, w_kv), value.flatten(2, 3), mask=mask)
        return out.transpose(2, 3).flatten(1, 2).unflatten(2, (h, w))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> the same shape."""
        x_q, x_kv = (x[..., ::stride, ::stride] for stride in (self.q_stride, self.kv_stride))
        out = self.proj_conv(self._attention(x_q, x_kv))
        if self.q_stride > 1:
            out = F.interpolate(out, x.shape[2:], mode="bilinear", align_corners=False)
        return x + self.gamma * out
