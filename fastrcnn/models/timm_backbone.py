"""A network of timm as a backbone: dict(type="timm", name="mobilenetv2_100"). Needs the extra `timm`."""

from collections.abc import Sequence

from torch import Tensor, nn

PYRAMID = (4, 8, 16, 32)  # strides of a pyramid's levels


class TimmBackbone(nn.Module):
    """`timm.create_model(name, features_only=True, **options)`: images [B, C, H, W] -> maps [B, channels[i], H / s, W / s].

    out_indices: which of timm's maps (default: those of strides 4, 8, 16 and 32). A neck beside it takes `channels` for its
    in_channels. pretrained: a file or https address with the network's weights, by timm's names or, of the same network as
    another library has it (torchvision's mobilenet_v2 for mobilenetv2_100), in the same order; `init_weights` loads them.
    Nothing is downloaded otherwise. norm_eval, norm_cfg (type BN; requires_grad, eps): as ResNet's, for all its norms.

    Raises ImportError without timm, ValueError naming what does not fit.
    """

    def __init__(
        self,
        name: str,
        out_indices: Sequence[int] | None = None,
        in_channels: int = 3,
        features_only: bool = True,
        pretrained: str | None = None,
        norm_eval: bool = True,
        norm_cfg: dict | None = None,
        frozen_stages: int = -1,
        **options,
    ):
        super().__init__()
        try:
            import timm
        except ImportError:
            raise ImportError("a backbone of type timm needs timm: pip install 'fastrcnn[timm]'") from None
        if not features_only or frozen_stages != -1:
            raise ValueError("backbone: timm takes features_only=True and frozen_stages=-1 alone")
        try:
            self.body = timm.create_model(name, features_only=True, in_chans=in_channels, **options)
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"backbone: timm cannot make {name!r} ({error})") from None
        strides, channels = self.body.feature_info.reduction(), self.body.feature_info.channels()
        if out_indices is None:
            out_indices = [strides.index(s) for s in PYRAMID if s in strides]
            if len(out_indices) < len(PYRAMID):
                raise ValueError(f"backbone: {name} has strides {strides}, a pyramid takes {PYRAMID}: name out_indices")
        if not all(0 <= i < len(strides) for i in out_indices):
            raise ValueError(f"out_indices: {name} has {len(strides)} maps, got {list(out_indices)}")
        self.out_indices, self.in_channels = tuple(out_indices), in_channels
        self.channels = [channels[i] for i in out_indices]
        self.last_axis = str(getattr(self.body, "output_fmt", "NCHW")).endswith("NHWC")
        self.pretrained = None if pretrained is None else (pretrained, "")
        self.norm_eval = norm_eval
        self._set_norms(**(norm_cfg or {}))

    def _norms(self) -> list[nn.Module]:
        return [m for m in self.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    def _set_norms(self, type: str = "BN", requires_grad: bool = True, eps: float | None = None) -> None:
        if type != "BN":
            raise ValueError(f"norm_cfg: a timm backbone keeps its own norms, of which BN can be set, got {type!r}")
        for m in self._norms():
            m.eps = m.eps if eps is None else eps
            m.requires_grad_(requires_grad)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        maps = self.body(images)
        return tuple(maps[i].permute(0, 3, 1, 2) if self.last_axis else maps[i] for i in self.out_indices)

    def train(self, mode: bool = True) -> "TimmBackbone":
        super().train(mode)
        if self.norm_eval:
            for m in self._norms():
                m.eval()
        return self

    def init_weights(self, state: dict[str, Tensor] | None = None) -> None:
        """timm's own start, which building gave; or a classifier's weights. Raises ValueError where they do not fit."""
        if state is None:
            return
        own = self.body.state_dict()
        named = {k: state[k] for k in own if k in state}
        if len(named) < len(own):  # the same network under other names: what follows the last of ours is its classifier
            named = dict(zip(own, state.values())) if len(state) >= len(own) else {}
        wrong = [k for k, v in own.items() if k not in named or named[k].shape != v.shape]
        if wrong:
            raise ValueError(
                f"pretrained: no weights for {len(wrong)} of {len(own)} tensors of the backbone, {wrong[0]} first"
            )
        self.body.load_state_dict(named)
