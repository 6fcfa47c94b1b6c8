"""Convolution, normalisation and activation from MMDetection's `conv_cfg`, `norm_cfg` and `act_cfg` dicts."""

from fastrcnn.layers.builders import build_activation, build_conv, build_norm
from fastrcnn.layers.conv_module import ConvModule, conv_norm_act, fold_batch_norm

__all__ = ["ConvModule", "build_activation", "build_conv", "build_norm", "conv_norm_act", "fold_batch_norm"]
