// What the CPU and CUDA kernels of deformable convolution share: argument checks, layouts, and the loop that gathers the
// columns of some rows and multiplies them by the weight. The products are torch's own (MKL, oneDNN, cuBLAS).
#pragma once

#include "deform_conv2d_math.h"

#include <algorithm>

namespace fastrcnn {

// Hidden, as the stable Tensor is: the struct never leaves the library.
struct __attribute__((visibility("hidden"))) DeformConv {
  DeformShape shape;
  ScalarType dtype, acc;       // of the products; of coordinates and sums
  Tensor input;                // [B, H, W, C], in memory
  Tensor offset;               // [B, offset_groups * taps * 2, OH * OW], acc
  std::optional<Tensor> mask;  // [B, offset_groups * taps, OH * OW], acc
  Tensor weight;               // [groups, O / groups, taps * C / groups]
};

inline Tensor channels_innermost(const Tensor& t, ScalarType dtype) {
  return torch::stable::contiguous(t.scalar_type() == dtype ? t : torch::stable::to(t, dtype), MemoryFormat::ChannelsLast);
}

// `t` [B, H, W, C] as [B, C, H, W] in the memory format that `like` has: the rule of fastrcnn/ops/roi_align.py.
inline Tensor as_image(const Tensor& t, const Tensor& like) {
  const Tensor image = torch::stable::transpose(torch::stable::transpose(t, 1, 3), 2, 3);
  const Tensor typed = t.scalar_type() == like.scalar_type() ? image : torch::stable::to(image, like.scalar_type());
  return like.size(1) > 1 && like.stride(1) == 1 ? typed : torch::stable::contiguous(typed);
}

inline DeformConv make_deform_conv(const Tensor& input, const Tensor& offset, const Tensor& weight,
                                   const std::optional<Tensor>& mask, const std::vector<int64_t>& stride,
                                   const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                                   ScalarType dtype) {
  CHECK_ARGUMENT(input.dim() == 4 && weight.dim() == 4 && offset.dim() == 4,
                 "input, offset and weight must have four dimensions");
  CHECK_ARGUMENT(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2 && stride[0] > 0 && stride[1] > 0,
                 "stride, padding and dilation must be pairs, stride positive");
  CHECK_ARGUMENT(input.size(2) * input.size(3) < (int64_t{1} << 31), "input: H * W must be below 2^31");
  const ScalarType acc = coordinate_type(input);
  const auto out_size = [&](int axis) {
    const int64_t padded = as_int("padding", input.size(2 + axis) + 2 * padding[axis]);
    return as_int("stride", (padded - dilation[axis] * (weight.size(2 + axis) - 1) - 1) / stride[axis] + 1);
  };
  DeformShape s;
  s.batch = input.size(0), s.channels = as_int("input", input.size(1));
  s.height = as_int("input", input.size(2)), s.width = as_int("input", input.size(3));
  s.kernel_h = as_int("weight", weight.size(2)), s.kernel_w = as_int("weight", weight.size(3));
  s.stride_h = as_int("stride", stride[0]), s.stride_w = as_int("stride", stride[1]);
  s.padding_h = as_int("padding", padding[0]), s.padding_w = as_int("padding", padding[1]);
  s.dilation_h = as_int("dilation", dilation[0]), s.dilation_w = as_int("dilation", dilation[1]);
  s.out_h = out_size(0), s.out_w = out_size(1);
  const int64_t filters = weight.size(0), group_channels = weight.size(1), taps = weight.size(2) * weight.size(3);
  s.taps = as_int("weight", taps), s.pixels = s.height * s.width;
  CHECK_ARGUMENT(group_channels > 0 && taps > 0 && s.channels > 0 && s.channels % group_channels == 0,
                 "weight must be [O, C / groups, kh, kw] for an input of C channels");
  CHECK_ARGUMENT(taps * s.channels < (int64_t{1} << 31), "weight: kh * kw * C must be below 2^31");
  s.group_channels = static_cast<int>(group_channels), s.groups = static_cast<int>(s.channels / group_channels);
  s.offset_groups = as_int("offset", offset.size(1) / (2 * taps));
  CHECK_ARGUMENT(filters % s.groups == 0, "weight: O must be a multiple of the groups");
  CHECK_ARGUMENT(s.offset_groups > 0 && s.channels % s.offset_groups == 0,
                 "offset must have 2 * kh * kw channels for each of its groups, which must divide C");
  s.offset_group_channels = static_cast<int>(s.channels / s.offset_groups);
  CHECK_SHAPE(offset, s.batch, s.offset_groups * taps * 2, s.out_h, s.out_w);
  s.positions = as_int("offset", int64_t{s.out_h} * s.out_w);
  std::optional<Tensor> m;
  if (mask) {
    check_shape(*mask, "mask", "B, offset_groups * kh * kw, OH, OW", s.batch, s.offset_groups * taps, s.out_h, s.out_w);
    m = contiguous_as(*mask, acc);
  }
  // [G, O / G, C / G, taps] -> taps before channels, as the columns have them
  const Tensor by_tap = torch::stable::transpose(
      torch::stable::reshape(contiguous_as(weight, dtype), {s.groups, filters / s.groups, group_channels, taps}), 2, 3);
  return {s, dtype, acc, channels_innermost(input, dtype), contiguous_as(offset, acc), m,
          torch::stable::reshape(by_tap, {s.groups, filters / s.groups, taps * group_channels})};
}

// Rows whose columns fill about `bytes`, but no more than there are.
inline int64_t rows_at_once(const DeformConv& p, int64_t bytes, int64_t element) {
  const int64_t row = element * p.shape.taps * p.shape.channels;
  return std::min(std::max<int64_t>(bytes / row, 1), std::max<int64_t>(p.shape.rows(), 1));
}

// im2col(first row, rows, columns) fills columns [groups, rows, taps * C / groups].
template <class Im2col>
Tensor deform_forward(const DeformConv& p, const Tensor& like, int64_t step, const Im2col& im2col) {
  const DeformShape& s = p.shape;
  const int64_t rows = s.rows(), filters = p.weight.size(1);
  Tensor out = empty_like_device(like, {rows, s.groups, filters}, p.dtype), columns = out;
  for (int64_t r = 0; r < rows; r += step) {
    const int64_t n = std::min(step, rows - r);
    if (r == 0 || n != step) columns = empty_like_device(like, {s.groups, n, p.weight.size(2)}, p.dtype);
    im2col(r, n, columns);
    Tensor part = torch::stable::narrow(out, 0, r, n);
    torch::stable::copy_(part, torch::stable::transpose(
                                   torch::stable::matmul(columns, torch::stable::transpose(p.weight, 1, 2)), 0, 1));
  }
  return as_image(torch::stable::view(out, {s.batch, s.out_h, s.out_w, s.groups * filters}), like);
}

using DeformGradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // of input, offset, weight, mask (empty without one)

// col2im(first row, rows, gradient of the columns, grad_input, grad_offset, grad_mask) adds to grad_input [B, H, W, C]
// and writes the other two, which have the layout of p.offset and p.mask; all three are acc.
template <class Im2col, class Col2im>
DeformGradients deform_backward(const DeformConv& p, const Tensor& grad, const Tensor& input, const Tensor& offset,
                                const Tensor& weight, const std::optional<Tensor>& mask, int64_t step,
                                const Im2col& im2col, const Col2im& col2im) {
  const DeformShape& s = p.shape;
  const int64_t rows = s.rows(), filters = p.weight.size(1), taps = s.taps, planes = s.offset_groups * taps;
  CHECK_SHAPE(grad, s.batch, s.groups * filters, s.out_h, s.out_w);
  const auto zeros = [&](std::vector<int64_t> shape) {
    Tensor t = empty_like_device(input, shape, p.acc);
    return torch::stable::zero_(t);
  };
  Tensor grad_input = zeros({s.batch, s.height, s.width, s.channels});
  Tensor grad_weight = zeros({s.groups, filters, p.weight.size(2)});
  Tensor grad_offset = zeros({s.batch, 2 * planes, s.out_h, s.out_w});
  Tensor grad_mask = mask ? zeros({s.batch, planes, s.out_h, s.out_w}) : zeros({0});
  // [B, OH, OW, O] in memory
  Tensor g = torch::stable::transpose(torch::stable::transpose(channels_innermost(grad, p.dtype), 1, 3), 1, 2);
  g = torch::stable::reshape(g, {rows, s.groups, filters});
  Tensor columns = grad_input;
  for (int64_t r = 0; r < rows; r += step) {
    const int64_t n = std::min(step, rows - r);
    if (r == 0 || n != step) columns = empty_like_device(input, {s.groups, n, p.weight.size(2)}, p.dtype);
    im2col(r, n, columns);
    const Tensor part = torch::stable::transpose(torch::stable::narrow(g, 0, r, n), 0, 1);  // [groups, n, O / groups]
    const Tensor product = torch::stable::matmul(torch::stable::transpose(part, 1, 2), columns);
    grad_weight = torch::stable::subtract(grad_weight, product, -1.0);  // a sum: the stable API has no add
    // Under autocast matmul may answer in another dtype.
    col2im(r, n, contiguous_as(torch::stable::matmul(part, p.weight), p.dtype), grad_input, grad_offset, grad_mask);
  }
  const auto typed = [](const Tensor& t, const Tensor& like) {
    return t.scalar_type() == like.scalar_type() ? t : torch::stable::to(t, like.scalar_type());
  };
  grad_weight = torch::stable::view(grad_weight, {s.groups, filters, taps, s.group_channels});
  grad_weight = torch::stable::view(torch::stable::contiguous(torch::stable::transpose(grad_weight, 2, 3)),
                                    {s.groups * filters, s.group_channels, s.kernel_h, s.kernel_w});
  return {as_image(grad_input, input), typed(grad_offset, offset), typed(grad_weight, weight),
          mask ? typed(grad_mask, *mask) : grad_mask};
}

// On the CPU, both in cpu/deform_conv2d.cpp: the dtype to multiply in, and im2col with its threads.
ScalarType deform_cpu_dtype(ScalarType input);
void deform_im2col_cpu(const DeformConv& p, int64_t first, int64_t count, Tensor& columns);
constexpr int64_t kCpuColumnBytes = 8 << 20;  // stays in the last cache between gathering and multiplying

}  // namespace fastrcnn
