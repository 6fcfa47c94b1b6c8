// The operators' declarations, for programs without Python: there fastrcnn.ops declares them, and this file is not built in.
// One library of it and csrc/cpu/*.cpp is all that an exported .pt2 needs beside libtorch (docs/cpp/CMakeLists.txt).
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(fastrcnn, m) {
  m.def("decode_boxes(Tensor anchors, Tensor deltas, Tensor? max_shape, float[] means, float[] stds, float wh_ratio_clip, "
        "bool symmetric_clip) -> Tensor");
  m.def("decode_proposals(Tensor[] cls_logits, Tensor[] bbox_deltas, Tensor[] base_anchors, float[] strides, "
        "Tensor image_sizes, SymInt nms_pre, float[] means, float[] stds, float wh_ratio_clip, bool symmetric_clip, "
        "float min_size, bool topk_on_logits, bool return_logits) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("deform_conv2d(Tensor input, Tensor offset, Tensor weight, Tensor? mask, SymInt[] stride, SymInt[] padding, "
        "SymInt[] dilation) -> Tensor");
  m.def("deform_roi_pool(Tensor input, Tensor rois, Tensor? offset, SymInt pooled_h, SymInt pooled_w, float spatial_scale, "
        "SymInt sampling_ratio, float gamma) -> Tensor");
  m.def("multilevel_roi_align(Tensor[] features, Tensor rois, SymInt pooled_h, SymInt pooled_w, float[] scales, "
        "SymInt sampling_ratio, bool aligned, float[] level_rule) -> Tensor");
  m.def("nms_padded(Tensor boxes, Tensor scores, Tensor? groups, float iou_threshold, SymInt max_output, "
        "Tensor? counts=None) -> (Tensor, Tensor)");
  m.def("preprocess(Tensor[] images, SymInt[] sizes, SymInt height, SymInt width, float[] mean, float[] std, str resize, "
        "bool bgr, ScalarType dtype) -> Tensor");
  m.def("roi_align(Tensor input, Tensor rois, SymInt pooled_h, SymInt pooled_w, float spatial_scale, "
        "SymInt sampling_ratio, bool aligned) -> Tensor");
}
