// Deformable RoI pooling (Dai et al., 2017), one source for CPU and CUDA kernels: RoIAlign's arithmetic on a grid that
// each bin moves by gamma * (RoI size) * offset, and the derivative of a sample's weights along an axis.
#pragma once

#include "roi_align_math.h"

#include <algorithm>

namespace fastrcnn {

struct DeformPool {
  int64_t batch, channels, num_rois;
  int height, width, pooled_h, pooled_w, sampling_ratio;
  double spatial_scale, gamma;
  bool channels_last;  // of input and output; the rule of fastrcnn/ops/roi_align.py
};

// One RoI's grid along an axis, and how far an offset of 1 moves a bin, in feature pixels.
template <class T>
struct DeformAxis {
  RoiGrid<T> grid;
  T reach;
};

template <class T>
HOST_DEVICE DeformAxis<T> deform_axis(T low, T high, T scale, T gamma, int pooled, int sampling_ratio) {
  const RoiGrid<T> grid = roi_grid(low, high, scale, pooled, sampling_ratio, true);
  const T start = low * scale - T(0.5), size = high * scale - T(0.5) - start;
  return {grid, grid.samples > 0 ? gamma * size : T(0)};  // a NaN size would make the empty sums of a gradient NaN
}

template <class T>
HOST_DEVICE RoiGrid<T> moved(const DeformAxis<T>& axis, T offset) {
  return {axis.grid.start + axis.reach * offset, axis.grid.bin, axis.grid.samples};
}

// d w_high / d position = -d w_low / d position of sample `i` of bin `p`: 1 between two pixels, 0 where the sample is held
// at the border or lies outside. Written so that NaN gives 0, as in axis_tap.
template <class T>
HOST_DEVICE T axis_slope(const RoiGrid<T>& g, int p, int i, int size) {
  const T v = sample_position(g, p, i);
  return v >= T(0) && v < static_cast<T>(size - 1) ? T(1) : T(0);
}

inline DeformPool make_deform_pool(const Tensor& input, const Tensor& rois, const std::optional<Tensor>& offset,
                                   int64_t pooled_h, int64_t pooled_w, double spatial_scale, int64_t sampling_ratio,
                                   double gamma) {
  const int64_t num_rois = rois.size(0);
  CHECK_ARGUMENT(input.dim() == 4, "input must have shape [B, C, H, W]");
  CHECK_ARGUMENT(num_rois == 0 || (input.size(2) > 0 && input.size(3) > 0), "input must have at least one pixel");
  CHECK_ARGUMENT(pooled_h > 0 && pooled_w > 0, "output_size must be positive");
  CHECK_SHAPE(rois, num_rois, 5);
  if (offset) check_shape(*offset, "offset", "num_rois, 2, pooled_h, pooled_w", num_rois, 2, pooled_h, pooled_w);
  const int64_t channels = input.size(1), most = (int64_t{1} << 31) / std::max<int64_t>(channels, 1);
  const int64_t bins = int64_t{as_int("output_size", pooled_h)} * as_int("output_size", pooled_w);
  CHECK_ARGUMENT(bins < most && int64_t{as_int("input", input.size(2))} * as_int("input", input.size(3)) < most,
                 "input: the map of one image, or the features of one RoI, has more than 2^31 elements");
  return {input.size(0), channels, num_rois, static_cast<int>(input.size(2)), static_cast<int>(input.size(3)),
          static_cast<int>(pooled_h), static_cast<int>(pooled_w), as_int("sampling_ratio", sampling_ratio), spatial_scale,
          gamma, channels > 1 && input.stride(1) == 1};
}

inline MemoryFormat deform_format(const DeformPool& p) {
  return p.channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

// `t` [N, C, H, W] without gaps in the layout of `p`: itself wherever it already is, a copy of a slice or an expansion.
inline Tensor dense(const Tensor& t, const DeformPool& p, ScalarType dtype) {
  const int64_t c = t.size(1), h = t.size(2), w = t.size(3);
  const int64_t nchw[4] = {c * h * w, h * w, w, 1}, nhwc[4] = {h * w * c, 1, w * c, c};
  const int64_t* want = p.channels_last ? nhwc : nchw;
  bool is_dense = t.scalar_type() == dtype;
  for (int64_t i = 0; i < 4; ++i) is_dense = is_dense && (t.size(i) == 1 || t.stride(i) == want[i]);
  if (is_dense) return t;
  Tensor out = empty_like_device(t, {t.size(0), c, h, w}, dtype, deform_format(p));
  torch::stable::copy_(out, t);
  return out;
}

}  // namespace fastrcnn
