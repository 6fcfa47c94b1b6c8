"""Extra layers inside residual blocks and RoI extractors, from MMDetection's `plugins` dicts."""

from torch import nn

from fastrcnn.layers.builders import construct, split_type
from fastrcnn.layers.context_block import ContextBlock
from fastrcnn.layers.conv_module import ConvModule
from fastrcnn.layers.generalized_attention import GeneralizedAttention
from fastrcnn.layers.non_local import NonLocal2d

# type -> (state-dict key, layer)
PLUGINS = {
    "ContextBlock": ("context_block", ContextBlock),
    "ConvModule": ("conv_block", ConvModule),
    "GeneralizedAttention": ("gen_attention_block", GeneralizedAttention),
    "NonLocal2d": ("nonlocal_block", NonLocal2d),
}


def build_plugin(cfg: dict, **kwargs) -> tuple[str, nn.Module]:
    """(state-dict key, layer) of dict(type="ContextBlock", ratio=1 / 16, postfix="2"); kwargs: more arguments.

    Raises ValueError for an unknown type.
    """
    kind, options = split_type(cfg, "plugin", PLUGINS)
    name, layer = PLUGINS[kind]
    postfix = options.pop("postfix", "")
    return f"{name}{postfix}", construct(layer, "plugin", kind, **kwargs, **options)
