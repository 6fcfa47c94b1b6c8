// The operators' declarations, for programs without Python: there fastrcnn.ops declares them, and this file is not built in.
// One library of it and csrc/cpu/*.cpp is all that an exported .pt2 needs beside libtorch (docs/cpp/CMakeLists.txt). It has
// the convolution, too, whose kernel fastrcnn.ops writes in Python.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

namespace {

using at::IntArrayRef;
using at::Tensor;
using std::optional;

// Where oneDNN fails: an output that may see padding alone, and a stride along outputs at most two wide.
bool narrow(const Tensor& x, const Tensor& w, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation) {
  int64_t width = 0;
  for (int64_t i = 0; i < 2; ++i) {
    const int64_t reach = dilation[i] * (w.size(i + 2) - 1), n = x.size(i + 2);
    if (padding[i] > reach || (padding[i] > 0 && dilation[i] > n)) return true;
    width = (n + 2 * padding[i] - reach - 1) / stride[i] + 1;
  }
  return stride[1] > 1 && width <= 2;
}

// Without AVX-512 oneDNN has no bfloat16.
bool takes_bf16() {
  const auto op = c10::Dispatcher::singleton().findSchema({"mkldnn::_is_mkldnn_bf16_supported", ""});
  torch::jit::Stack stack;
  if (op) op->callBoxed(&stack);
  return op && stack[0].toBool();
}

Tensor fused(const c10::OperatorHandle& op, torch::jit::Stack stack) {
  op.callBoxed(&stack);
  return stack[0].toTensor();
}

Tensor conv_bn_relu(const Tensor& input, const Tensor& weight, const optional<Tensor>& bn_weight,
                    const optional<Tensor>& bn_bias, const optional<Tensor>&, const optional<Tensor>&, double,
                    IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                    const optional<Tensor>& addend, bool relu, bool upsample_residual) {
  TORCH_CHECK(!bn_weight, "bn_weight: expected none, as an exported model's norms are folded into its convolutions");
  const auto format = at::MemoryFormat::ChannelsLast;
  const optional<Tensor> residual = upsample_residual ? std::nullopt : addend;
  const optional<Tensor> bias = bn_bias ? bn_bias->to(weight.scalar_type()) : bn_bias;
  const auto plain = c10::Dispatcher::singleton().findSchema({"mkldnn::_convolution_pointwise", ""});
  const auto adding = c10::Dispatcher::singleton().findSchema({"mkldnn::_convolution_pointwise", "binary"});
  const bool known = input.scalar_type() == at::kFloat || (input.scalar_type() == at::kBFloat16 && takes_bf16());
  Tensor out;
  if (!plain || !adding || !known || input.numel() == 0 || narrow(input, weight, stride, padding, dilation)) {
    const optional<Tensor> wide = bias ? bias->to(at::kDouble) : bias;
    out = at::conv2d(input.to(at::kDouble), weight.to(at::kDouble), wide, stride, padding, dilation, groups);
    out = out.to(input.scalar_type()).contiguous(format);
    if (residual) out.add_(*residual);
  } else {
    const Tensor x = input.contiguous(format), w = weight.contiguous(format);
    const c10::impl::GenericList none(c10::OptionalType::create(c10::NumberType::get()));
    if (residual && groups == 1) {
      out = fused(*adding, {x, residual->contiguous(format), w, bias, padding, stride, dilation, groups, "add",
                            c10::IValue(), c10::IValue(), none, c10::IValue()});
    } else {
      out = fused(*plain, {x, w, bias, padding, stride, dilation, groups, "none", none, ""});
      if (residual) out.add_(*residual);
    }
  }
  if (upsample_residual) out.add_(at::upsample_nearest2d(*addend, {out.size(2), out.size(3)}, 2.0, 2.0));
  return relu ? out.relu_() : out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastrcnn, m) {
  m.def("conv_bn_relu(Tensor input, Tensor weight, Tensor? bn_weight, Tensor? bn_bias, Tensor? bn_mean, Tensor? bn_var, "
        "float eps, SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, Tensor? residual, bool relu, "
        "bool upsample_residual) -> Tensor");
  m.def("decode_boxes(Tensor anchors, Tensor deltas, Tensor? max_shape, float[] means, float[] stds, float wh_ratio_clip, "
        "bool symmetric_clip) -> Tensor");
  m.def("decode_proposals(Tensor[] cls_logits, Tensor[] bbox_deltas, Tensor[] base_anchors, float[] strides, "
        "Tensor image_sizes, SymInt nms_pre, float[] means, float[] stds, float wh_ratio_clip, bool symmetric_clip, "
        "float min_size, bool topk_on_logits, bool return_logits, SymInt[]? batch_shape) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("deform_conv2d(Tensor input, Tensor offset, Tensor weight, Tensor? mask, SymInt[] stride, SymInt[] padding, "
        "SymInt[] dilation) -> Tensor");
  m.def("deform_roi_pool(Tensor input, Tensor rois, Tensor? offset, SymInt pooled_h, SymInt pooled_w, float spatial_scale, "
        "SymInt sampling_ratio, float gamma) -> Tensor");
  m.def("multilevel_roi_align(Tensor[] features, Tensor rois, SymInt pooled_h, SymInt pooled_w, float[] scales, "
        "SymInt sampling_ratio, bool aligned, float[] level_rule) -> Tensor");
  m.def("nms_padded(Tensor boxes, Tensor scores, Tensor? groups, float iou_threshold, SymInt max_output, "
        "Tensor? counts=None) -> (Tensor, Tensor)");
  m.def("roi_align(Tensor input, Tensor rois, SymInt pooled_h, SymInt pooled_w, float spatial_scale, "
        "SymInt sampling_ratio, bool aligned) -> Tensor");
  m.def("select_candidates(Tensor scores, float threshold, SymInt max_candidates) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("soft_nms_padded(Tensor boxes, Tensor scores, Tensor? groups, float iou_threshold, float sigma, float min_score, "
        "str method, SymInt max_output, Tensor? counts=None) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(fastrcnn, CPU, m) { m.impl("conv_bn_relu", conv_bn_relu); }
