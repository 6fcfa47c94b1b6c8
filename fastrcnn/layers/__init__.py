"""Layers from MMDetection's dicts: convolution, normalisation, activation, deformable layers, plugins."""

from fastrcnn.layers.builders import build_activation, build_conv, build_norm, construct
from fastrcnn.layers.context_block import ContextBlock
from fastrcnn.layers.conv_module import ConvModule, conv_norm_act, fold_batch_norm, prepare_convolutions
from fastrcnn.layers.deform_conv import DeformConv2dPack, ModulatedDeformConv2dPack
from fastrcnn.layers.deform_roi_pool import DeformRoIPoolPack, ModulatedDeformRoIPoolPack
from fastrcnn.layers.generalized_attention import GeneralizedAttention
from fastrcnn.layers.non_local import NonLocal2d
from fastrcnn.layers.plugins import build_plugin

__all__ = [
    "ContextBlock",
    "ConvModule",
    "DeformConv2dPack",
    "DeformRoIPoolPack",
    "GeneralizedAttention",
    "ModulatedDeformConv2dPack",
    "ModulatedDeformRoIPoolPack",
    "NonLocal2d",
    "build_activation",
    "build_conv",
    "build_norm",
    "build_plugin",
    "construct",
    "conv_norm_act",
    "fold_batch_norm",
    "prepare_convolutions",
]
