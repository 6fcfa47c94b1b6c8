"""The operators: one file an op (or a family), each with its pure-PyTorch reference, the specification.

Every op accepts float64, float32, float16 and bfloat16; boxes are xyxy in absolute pixels and computed in float32
(float64 for float64). Every op works under `torch.compile(fullgraph=True)` and `torch.export`.
"""

from fastrcnn import _extension  # noqa: F401  registers the compiled kernels
from fastrcnn.ops import conv_cpu, conv_cuda  # noqa: F401  register the kernels of conv_bn_relu
from fastrcnn.ops.conv_bn_relu import conv_bn_relu, conv_bn_relu_reference
from fastrcnn.ops.decode_boxes import decode_boxes, decode_boxes_reference
from fastrcnn.ops.decode_proposals import decode_proposals, decode_proposals_reference
from fastrcnn.ops.deform_conv2d import deform_conv2d, deform_conv2d_reference
from fastrcnn.ops.deform_roi_pool import deform_roi_pool, deform_roi_pool_reference
from fastrcnn.ops.match_boxes import match_boxes, match_boxes_reference
from fastrcnn.ops.multilevel_roi_align import multilevel_roi_align, multilevel_roi_align_reference
from fastrcnn.ops.nms import (
    batched_nms,
    batched_nms_reference,
    nms,
    nms_padded,
    nms_padded_reference,
    nms_reference,
)
from fastrcnn.ops.preprocess import preprocess, preprocess_reference
from fastrcnn.ops.roi_align import roi_align, roi_align_reference
from fastrcnn.ops.select_candidates import select_candidates, select_candidates_reference
from fastrcnn.ops.soft_nms import (
    batched_soft_nms,
    batched_soft_nms_reference,
    soft_nms,
    soft_nms_padded,
    soft_nms_padded_reference,
    soft_nms_reference,
)

__all__ = [
    "batched_nms",
    "batched_nms_reference",
    "batched_soft_nms",
    "batched_soft_nms_reference",
    "conv_bn_relu",
    "conv_bn_relu_reference",
    "decode_boxes",
    "decode_boxes_reference",
    "decode_proposals",
    "decode_proposals_reference",
    "deform_conv2d",
    "deform_conv2d_reference",
    "deform_roi_pool",
    "deform_roi_pool_reference",
    "match_boxes",
    "match_boxes_reference",
    "multilevel_roi_align",
    "multilevel_roi_align_reference",
    "nms",
    "nms_padded",
    "nms_padded_reference",
    "nms_reference",
    "preprocess",
    "preprocess_reference",
    "roi_align",
    "roi_align_reference",
    "select_candidates",
    "select_candidates_reference",
    "soft_nms",
    "soft_nms_padded",
    "soft_nms_padded_reference",
    "soft_nms_reference",
]
