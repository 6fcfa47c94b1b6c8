// Gradients of deformable RoI pooling in its maps and offsets.
#include "deform_roi_pool.h"

namespace fastrcnn {
namespace {

constexpr int64_t kShare = 32;  // channels of one task; fixed, so that sums do not depend on the number of threads

// Channels [first, last) of the gradients; grad_offset [2, bins] is this share's part, or null.
template <class T, class F, bool kLast>
HOST_DEVICE void backward_body(const BinTaps<T>& t, const F* image, const F* grad, int64_t bins, int64_t channels,
                               int64_t plane, int64_t first, int64_t last, T* grad_image, T* grad_offset) {
  constexpr int64_t kBlock = kLast ? kShare : 8;
  const int64_t stride = kLast ? 1 : plane;
  for (int64_t c = first; c < last; c += kBlock) {
    const int64_t n = std::min(kBlock, last - c);
    for (int64_t b = 0; b < bins; ++b) {
      T g[kBlock] = {}, by_y[kBlock] = {}, by_x[kBlock] = {};
      for (int64_t u = 0; u < n; ++u) g[u] = static_cast<T>(grad[kLast ? b * channels + c + u : (c + u) * bins + b]);
      for (int64_t k = t.begin[b]; k < t.begin[b + 1]; ++k) {
        const auto tap = t.taps[k];
        T* into = grad_image + tap.at + c * stride;
        if (tap.weight != T(0)) {
#pragma omp simd
          for (int64_t u = 0; u < n; ++u) into[u * stride] += tap.weight * g[u];
        }
        if (grad_offset == nullptr) continue;
        const F* at = image + tap.at + c * stride;
#pragma omp simd
        for (int64_t u = 0; u < n; ++u) {
          const T value = static_cast<T>(at[u * stride]);
          by_y[u] += tap.slope_y * value;
          by_x[u] += tap.slope_x * value;
        }
      }
      if (grad_offset == nullptr) continue;
      for (int64_t u = 0; u < n; ++u) grad_offset[b] += by_x[u] * g[u];
      for (int64_t u = 0; u < n; ++u) grad_offset[bins + b] += by_y[u] * g[u];
    }
  }
}

// target_clones does not reach into templates: one set of loops for each arithmetic type and feature type.
#define DEFINE_LOOPS(CLONES, T, F)                                                                                    \
  CLONES void backward_roi(const BinTaps<T>& t, const F* image, const F* g, int64_t bins, int64_t channels,           \
                           int64_t plane, int64_t c0, int64_t c1, bool last, T* grad_image, T* grad_offset) {         \
    if (last) return backward_body<T, F, true>(t, image, g, bins, channels, plane, c0, c1, grad_image, grad_offset);  \
    backward_body<T, F, false>(t, image, g, bins, channels, plane, c0, c1, grad_image, grad_offset);                  \
  }
#define NO_CLONES
DEFINE_LOOPS(SIMD_CLONES, float, float)
DEFINE_LOOPS(SIMD_CLONES, float, BFloat16)
DEFINE_LOOPS(SIMD_CLONES, float, Half)
DEFINE_LOOPS(NO_CLONES, double, double)
#undef DEFINE_LOOPS

// Deterministic: a task owns kShare channels and takes the RoIs in order; its parts of the offsets' gradient, sums over
// those channels, are added up in the order of the channels.
std::tuple<Tensor, Tensor> deform_roi_pool_backward(const Tensor& grad, const Tensor& input, const Tensor& rois,
                                                    std::optional<Tensor> offset, double spatial_scale,
                                                    int64_t sampling_ratio, double gamma) {
  const int64_t pooled_h = grad.size(2), pooled_w = grad.size(3), bins = pooled_h * pooled_w;
  const DeformPool p = make_deform_pool(input, rois, offset, pooled_h, pooled_w, spatial_scale, sampling_ratio, gamma);
  CHECK_SHAPE(grad, p.num_rois, p.channels, pooled_h, pooled_w);
  const ScalarType dtype = input.scalar_type(), acc = coordinate_type(input);
  const int64_t plane = static_cast<int64_t>(p.height) * p.width, shares = (p.channels + kShare - 1) / kShare;
  const int64_t offsets = offset ? p.num_rois * 2 * bins : 0;
  const Tensor x = dense(input, p, dtype), g = dense(grad, p, dtype), r = contiguous_as(rois, acc);
  std::optional<Tensor> o;
  if (offset) o = contiguous_as(*offset, acc);
  Tensor grad_input = empty_like_device(input, {p.batch, p.channels, p.height, p.width}, acc, deform_format(p));
  Tensor parts = empty_like_device(input, {std::max<int64_t>(shares, 1), offsets}, acc);
  torch::stable::zero_(grad_input);
  torch::stable::zero_(parts);
  dispatch_features(dtype, [&](auto t, auto f) {
    using T = decltype(t);
    using F = decltype(f);
    const T* roi = checked_deform_rois<T>(r, p);
    const T* moves = o ? o->template const_data_ptr<T>() : nullptr;
    const F *maps = x.template const_data_ptr<F>(), *from = g.template const_data_ptr<F>();
    T *into = grad_input.template mutable_data_ptr<T>(), *part = parts.template mutable_data_ptr<T>();
    torch::stable::parallel_for(0, shares, 1, [&](int64_t first, int64_t last) {
      BinTaps<T> taps;
      for (int64_t s = first; s < last; ++s) {
        for (int64_t k = 0; k < p.num_rois; ++k) {
          if (!taps.build(roi + k * 5, moves ? moves + k * 2 * bins : nullptr, moves != nullptr, p)) continue;
          const int64_t at = static_cast<int64_t>(roi[k * 5]) * p.channels * plane;
          backward_roi(taps, maps + at, from + k * p.channels * bins, bins, p.channels, plane, s * kShare,
                       std::min(p.channels, (s + 1) * kShare), p.channels_last, into + at,
                       moves ? part + s * offsets + k * 2 * bins : nullptr);
        }
      }
    });
    for (int64_t s = 1; s < shares; ++s)
      for (int64_t i = 0; i < offsets; ++i) part[i] += part[s * offsets + i];
  });
  if (dtype != acc) grad_input = torch::stable::to(grad_input, dtype);
  if (!offset) return {grad_input, empty_like_device(input, {0}, dtype)};
  Tensor grad_offset = empty_like_device(input, {p.num_rois, 2, pooled_h, pooled_w}, offset->scalar_type());
  const std::vector<int64_t> shape = {p.num_rois, 2, pooled_h, pooled_w};
  torch::stable::copy_(grad_offset, torch::stable::view(torch::stable::select(parts, 0, 0), shape));
  return {grad_input, grad_offset};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrcnn, CPU, m) { m.impl("deform_roi_pool_backward", TORCH_BOX(&deform_roi_pool_backward)); }

}  // namespace fastrcnn
