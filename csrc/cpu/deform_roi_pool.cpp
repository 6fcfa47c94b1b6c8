// Deformable RoI pooling. A RoI's pixels are listed bin by bin with their weights, then the list runs over blocks of
// channels: lanes of channels-last maps, planes of NCHW ones.
#include "deform_roi_pool.h"

namespace fastrcnn {
namespace {

// kLast: channels-last. image and out are one image and one RoI; `plane` = height * width.
template <class T, class F, bool kLast>
HOST_DEVICE void forward_body(const BinTaps<T>& t, const F* image, int64_t bins, int64_t channels, int64_t plane, F* out) {
  constexpr int64_t kBlock = kLast ? 64 : 8;  // planes go side by side, so that their cache misses overlap
  const int64_t stride = kLast ? 1 : plane;
  for (int64_t c = 0; c < channels; c += kBlock) {
    const int64_t n = std::min(kBlock, channels - c);
    for (int64_t b = 0; b < bins; ++b) {
      T sum[kBlock] = {};
      for (int64_t k = t.begin[b]; k < t.begin[b + 1]; ++k) {
        const F* at = image + t.taps[k].at + c * stride;
        const T w = t.taps[k].weight;
        if (n == kBlock) {
#pragma omp simd
          for (int64_t u = 0; u < kBlock; ++u) sum[u] += w * static_cast<T>(at[u * stride]);
        } else {
          for (int64_t u = 0; u < n; ++u) sum[u] += w * static_cast<T>(at[u * stride]);
        }
      }
      for (int64_t u = 0; u < n; ++u) out[kLast ? b * channels + c + u : (c + u) * bins + b] = static_cast<F>(sum[u]);
    }
  }
}

// target_clones does not reach into templates: one set of loops for each arithmetic type and feature type.
#define DEFINE_LOOPS(CLONES, T, F)                                                                                    \
  CLONES void forward_roi(const BinTaps<T>& t, const F* image, int64_t bins, int64_t channels, int64_t plane,         \
                          bool last, F* out) {                                                                        \
    if (last) return forward_body<T, F, true>(t, image, bins, channels, plane, out);                                  \
    forward_body<T, F, false>(t, image, bins, channels, plane, out);                                                  \
  }
#define NO_CLONES
DEFINE_LOOPS(SIMD_CLONES, float, float)
DEFINE_LOOPS(SIMD_CLONES, float, BFloat16)
DEFINE_LOOPS(SIMD_CLONES, float, Half)
DEFINE_LOOPS(NO_CLONES, double, double)
#undef DEFINE_LOOPS

Tensor deform_roi_pool(const Tensor& input, const Tensor& rois, std::optional<Tensor> offset, int64_t pooled_h,
                       int64_t pooled_w, double spatial_scale, int64_t sampling_ratio, double gamma) {
  const DeformPool p = make_deform_pool(input, rois, offset, pooled_h, pooled_w, spatial_scale, sampling_ratio, gamma);
  const ScalarType dtype = input.scalar_type(), acc = coordinate_type(input);
  const int64_t bins = pooled_h * pooled_w, plane = static_cast<int64_t>(p.height) * p.width;
  const Tensor x = dense(input, p, dtype), r = contiguous_as(rois, acc);
  std::optional<Tensor> o;
  if (offset) o = contiguous_as(*offset, acc);
  Tensor out = empty_like_device(input, {p.num_rois, p.channels, pooled_h, pooled_w}, dtype, deform_format(p));
  dispatch_features(dtype, [&](auto t, auto f) {
    using T = decltype(t);
    using F = decltype(f);
    const T* roi = checked_deform_rois<T>(r, p);
    const T* moves = o ? o->template const_data_ptr<T>() : nullptr;
    const F* maps = x.template const_data_ptr<F>();
    F* pooled = out.template mutable_data_ptr<F>();
    torch::stable::parallel_for(0, p.num_rois, 1, [&](int64_t first, int64_t last) {
      BinTaps<T> taps;
      for (int64_t k = first; k < last; ++k) {
        F* dst = pooled + k * p.channels * bins;
        if (!taps.build(roi + k * 5, moves ? moves + k * 2 * bins : nullptr, false, p)) {
          std::fill_n(dst, p.channels * bins, static_cast<F>(0.0f));
          continue;
        }
        const F* image = maps + static_cast<int64_t>(roi[k * 5]) * p.channels * plane;
        forward_roi(taps, image, bins, p.channels, plane, p.channels_last, dst);
      }
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrcnn, CPU, m) { m.impl("deform_roi_pool", TORCH_BOX(&deform_roi_pool)); }

}  // namespace fastrcnn
