"""Non-local block (Wang et al., "Non-local Neural Networks", 2018): every position gathers from all positions."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastrcnn.layers.conv_module import ConvModule

MODES = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """softmax(scale * query key^T) value, without keeping the [Q, K] matrix where torch has a fused kernel.

    query [B, M, Q, D], key [B, M, K, D], value [B, M, K, E], mask [Q, K] bool, true where attended -> [B, M, Q, E].
    """
    # Fused kernels want one width and a dense last dimension. Zero columns change neither the products nor the sums.
    width = max(query.shape[-1], value.shape[-1])
    padded = [F.pad(t, (0, width - t.shape[-1])).contiguous() for t in (query, key, value)]
    return F.scaled_dot_product_attention(*padded, attn_mask=mask, scale=scale)[..., : value.shape[-1]]


def _positions(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H * W, C]."""
    return x.flatten(2).transpose(1, 2)


class NonLocal2d(nn.Module):
    """x + conv_out(y), where y_i is the sum over positions j of f(theta(x)_i, phi(x)_j) g(x)_j.

    mode: f = softmax_j(x_i . x_j) for "gaussian", softmax_j(theta_i . phi_j) for "embedded_gaussian" (divided by the
    square root of the width if use_scale), theta_i . phi_j / N for "dot_product" and relu(w . [theta_i, phi_j]) / N for
    "concatenation", N the number of positions j. in_channels: C; theta, phi and g have max(C // reduction, 1) channels.
    sub_sample: max-pools phi and g by 2, so that N is a quarter of H * W. norm_cfg: of conv_out alone. std, zeros_init:
    initial deviation of the weights, and whether conv_out starts as zero. Source: mmcv's NonLocal2d; keys `g.conv.*`,
    `theta.conv.*`, `phi.conv.*`, `conv_out.*`, `concat_project.conv.*`, and with sub_sample `g.0.conv.*`, `phi.0.conv.*`.
    """

    def __init__(
        self,
        in_channels: int,
        sub_sample: bool = False,
        reduction: int = 2,
        use_scale: bool = True,
        conv_cfg: dict | None = None,
        norm_cfg: dict | None = None,
        mode: str = "embedded_gaussian",
        std: float = 0.01,
        zeros_init: bool = True,
    ):
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {MODES}, got {mode!r}")
        if reduction < 1:
            raise ValueError(f"reduction: expected at least 1, got {reduction}")
        self.mode = mode
        width = max(in_channels // reduction, 1)
        self.scale = width**-0.5 if use_scale and mode == "embedded_gaussian" else 1.0
        plain = dict(kernel_size=1, conv_cfg=conv_cfg, act_cfg=None)
        pool = nn.MaxPool2d(2) if sub_sample else None
        embed = ConvModule(in_channels, width, **plain)
        self.g = nn.Sequential(embed, pool) if sub_sample else embed
        self.conv_out = ConvModule(width, in_channels, norm_cfg=norm_cfg, **plain)
        if mode == "gaussian":
            self.theta, self.phi = None, pool
        else:
            self.theta = ConvModule(in_channels, width, **plain)
            embed = ConvModule(in_channels, width, **plain)
            self.phi = nn.Sequential(embed, pool) if sub_sample else embed
        self.concat_project = ConvModule(2 * width, 1, 1, bias=False) if mode == "concatenation" else None
        self.std, self.zeros_init = std, zeros_init
        self.init_weights()

    def init_weights(self) -> None:
        """Small normal weights; with zeros_init the last layer is zero and the block starts as the identity."""
        for m in self.modules():
            if isinstance(m, ConvModule):
                nn.init.normal_(m.conv.weight, std=self.std)
                if m.conv.bias is not None:
                    nn.init.zeros_(m.conv.bias)
        last = self.conv_out.conv if self.conv_out.norm is None else self.conv_out.norm
        for m in (self.conv_out, self.concat_project):
            if m is not None and m.conv is not last:
                nn.init.kaiming_normal_(m.conv.weight, mode="fan_out", nonlinearity="relu")
        if self.zeros_init:
            nn.init.zeros_(last.weight)
        else:
            nn.init.normal_(last.weight, std=self.std)
        nn.init.zeros_(last.bias)

    def _gather(self, theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
        """theta [B, Q, D], phi [B, K, D], g [B, K, E] -> y [B, Q, E]."""
        if self.mode == "dot_product":
            # (theta phi^T) g = theta (phi^T g): no [Q, K] matrix. Both factors share the division to stay in half range.
            split = phi.shape[1] ** -0.5
            return theta @ ((phi * split).transpose(1, 2) @ (g * split))
        if self.mode == "concatenation":
            # w . [theta, phi] is the sum of two products: one number for each pair, not 2 D.
            left, right = self.concat_project.conv.weight.flatten(1).chunk(2, 1)
            pairs = F.linear(theta, left) + F.linear(phi, right).transpose(1, 2)  # [B, Q, K]
            return torch.relu(pairs) / phi.shape[1] @ g
        return attend(theta[:, None], phi[:, None], g[:, None], self.scale)[:, 0]

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> the same shape."""
        theta = x if self.theta is None else self.theta(x)
        phi = x if self.phi is None else self.phi(x)
        y = self._gather(_positions(theta), _positions(phi), _positions(self.g(x)))
        return x + self.conv_out(y.transpose(1, 2).unflatten(2, x.shape[2:]))
