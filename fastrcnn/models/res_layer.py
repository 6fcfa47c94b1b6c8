"""One ResNet stage on RoI features: the shared head of C4 detectors (MMDetection's ResLayer)."""

from collections.abc import Mapping

from torch import Tensor, nn

from fastrcnn.models.pretrained import pretrained_source, take_pretrained
from fastrcnn.models.resnet import ResNet, init_convs_and_norms, make_res_layer


class ResLayer(nn.Module):
    """One ResNet stage on RoI features: the shared head of C4 detectors. Keys layer{stage + 1}.*"""

    def __init__(
        self,
        depth: int,
        stage: int = 3,
        stride: int = 2,
        dilation: int = 1,
        style: str = "pytorch",
        norm_cfg: dict = dict(type="BN", requires_grad=True),
        norm_eval: bool = True,
        with_cp: bool = False,
        dcn: dict | None = None,
        pretrained: str | None = None,
        init_cfg: dict | None = None,
    ):
        super().__init__()
        self.pretrained = pretrained_source(pretrained, init_cfg)
        if depth not in ResNet.arch_settings:
            raise ValueError(f"depth: expected one of {sorted(ResNet.arch_settings)}, got {depth}")
        block, num_blocks = ResNet.arch_settings[depth]
        planes = 64 * 2**stage
        inplanes, self.norm_eval, self.name = planes // 2 * block.expansion, norm_eval, f"layer{stage + 1}"
        layer = make_res_layer(
            block,
            inplanes,
            planes,
            num_blocks[stage],
            stride,
            dilation,
            norm_cfg=norm_cfg,
            style=style,
            with_cp=with_cp,
            dcn=dcn,
        )
        self.add_module(self.name, layer)
        init_convs_and_norms(self)

    def init_weights(self, state: Mapping[str, Tensor] | None = None) -> None:
        """As `ResNet.init_weights`."""
        init_convs_and_norms(self)
        take_pretrained(self, state)

    def train(self, mode: bool = True):
        super().train(mode)
        if self.norm_eval:
            for m in self.modules():
                if isinstance(m, nn.modules.batchnorm._BatchNorm):
                    m.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.name)(x)
