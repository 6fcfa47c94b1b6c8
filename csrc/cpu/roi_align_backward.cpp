// Gradient of RoIAlign with respect to its maps. Deterministic: threads share the channels, never the RoIs, so every
// gradient is summed in RoI order whatever the number of threads.
#include "roi_align.h"

namespace fastrcnn {
namespace {

// grad_out[c] spread over the bin's pixels, for channels [0, channels) of the caller's share.
template <class T, class F>
HOST_DEVICE void backward_bin_body(T* map, int64_t stride_h, int64_t stride_w, const int* row, const T* row_w,
                                   int rows, const int* col, const T* col_w, int cols, T scale, int64_t channels,
                                   const F* grad_out) {
  for (int r = 0; r < rows; ++r) {
    for (int q = 0; q < cols; ++q) {
      T* pixel = map + row[r] * stride_h + col[q] * stride_w;
      const T w = row_w[r] * col_w[q] * scale;
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) pixel[c] += w * static_cast<T>(grad_out[c]);
    }
  }
}

// kPlanes planes go side by side, as in the forward pass.
template <class T, class F>
HOST_DEVICE void backward_planes_body(T* map, int64_t stride_c, const int64_t* offset, const T* weight,
                                      const int* begin, int64_t bins, int64_t channels, const F* grad_out,
                                      int64_t grad_stride_c, int64_t grad_stride_bin) {
  for (int64_t c0 = 0; c0 < channels; c0 += kPlanes) {
    const int64_t planes = std::min(kPlanes, channels - c0);
    for (int64_t b = 0; b < bins; ++b) {
      T g[kPlanes];
      for (int64_t u = 0; u < planes; ++u)
        g[u] = static_cast<T>(grad_out[(c0 + u) * grad_stride_c + b * grad_stride_bin]);
      for (int k = begin[b]; k < begin[b + 1]; ++k) {
        T* at = map + c0 * stride_c + offset[k];
        if (planes == kPlanes) {
          for (int64_t u = 0; u < kPlanes; ++u) at[u * stride_c] += weight[k] * g[u];
        } else {
          for (int64_t u = 0; u < planes; ++u) at[u * stride_c] += weight[k] * g[u];
        }
      }
    }
  }
}

// target_clones does not reach into templates: one set of loops for each arithmetic type and feature type.
#define DEFINE_LOOPS(CLONES, T, F)                                                                                    \
  CLONES void backward_bin(T* map, int64_t sh, int64_t sw, const int* row, const T* row_w, int rows, const int* col,  \
                           const T* col_w, int cols, T scale, int64_t channels, const F* grad) {                      \
    backward_bin_body<T, F>(map, sh, sw, row, row_w, rows, col, col_w, cols, scale, channels, grad);                  \
  }                                                                                                                   \
  CLONES void backward_planes(T* map, int64_t sc, const int64_t* offset, const T* weight, const int* begin,           \
                              int64_t bins, int64_t channels, const F* grad, int64_t gc, int64_t gb) {                \
    backward_planes_body<T, F>(map, sc, offset, weight, begin, bins, channels, grad, gc, gb);                         \
  }
#define NO_CLONES
DEFINE_LOOPS(SIMD_CLONES, float, float)
DEFINE_LOOPS(SIMD_CLONES, float, BFloat16)
DEFINE_LOOPS(SIMD_CLONES, float, Half)
DEFINE_LOOPS(NO_CLONES, double, double)
#undef DEFINE_LOOPS

// p.levels describe the gradients (always T), channels-last exactly when `channels_last`.
template <class T, class F>
void backward(const Problem& p, const T* rois, int64_t num_rois, bool channels_last, const F* grad, int64_t grad_n,
              int64_t grad_c, int64_t grad_bin) {
  const int64_t bins = static_cast<int64_t>(p.pooled_h) * p.pooled_w;
  const int64_t share = std::max<int64_t>(16, (p.channels / torch::stable::get_num_threads() + 15) / 16 * 16);
  torch::stable::parallel_for(0, (p.channels + share - 1) / share, 1, [&](int64_t first, int64_t last) {
    const int64_t c0 = first * share, channels = std::min(p.channels, last * share) - c0;
    RoiTaps<T> taps;
    PlaneTaps<T> planes;
    for (int64_t k = 0; k < num_rois; ++k) {
      taps.build(rois + k * 5, p);
      if (taps.level == nullptr) continue;
      const FeatureMap& level = *taps.level;
      T* map = static_cast<T*>(level.data) + taps.image * level.stride_n + c0 * level.stride_c;
      const F* g = grad + k * grad_n + c0 * grad_c;
      if (!channels_last) {
        planes.build(taps, p.pooled_h, p.pooled_w);
        backward_planes(map, level.stride_c, planes.offset.data(), planes.weight.data(), planes.begin.data(), bins,
                        channels, g, grad_c, grad_bin);
        continue;
      }
      for (int ph = 0; ph < p.pooled_h; ++ph) {
        const int r = taps.rows.begin[ph], rows = taps.rows.begin[ph + 1] - r;
        for (int pw = 0; pw < p.pooled_w; ++pw, g += grad_bin) {
          const int q = taps.columns.begin[pw], cols = taps.columns.begin[pw + 1] - q;
          backward_bin(map, level.stride_h, level.stride_w, taps.rows.index.data() + r, taps.rows.weight.data() + r,
                       rows, taps.columns.index.data() + q, taps.columns.weight.data() + q, cols, taps.scale, channels,
                       g);
        }
      }
    }
  });
}

std::vector<Tensor> multilevel_roi_align_backward(const Tensor& grad, std::vector<Tensor> features, const Tensor& rois,
                                                  std::vector<double> scales, int64_t sampling_ratio, bool aligned,
                                                  std::vector<double> level_rule) {
  const int64_t pooled_h = grad.size(2), pooled_w = grad.size(3), num_rois = rois.size(0);
  const ScalarType dtype = features[0].scalar_type(), acc = coordinate_type(features[0]);
  const bool channels_last = all_channels_last(features);
  std::vector<Tensor> grads;  // summed in float32 (double for double), whatever the features are
  for (const Tensor& f : features) {
    Tensor g = empty_like_device(f, {f.size(0), f.size(1), f.size(2), f.size(3)}, acc,
                                 channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
    grads.push_back(torch::stable::zero_(g));
  }
  const Problem p = make_problem(grads, rois, scales, pooled_h, pooled_w, sampling_ratio, aligned, level_rule);
  CHECK_SHAPE(grad, num_rois, p.channels, pooled_h, pooled_w);
  const Tensor r = contiguous_as(rois, acc);
  // One stride from bin to bin, and channels side by side where the maps have them so.
  Tensor g = grad;
  const bool usable = g.stride(2) == g.stride(3) * pooled_w && (!channels_last || g.stride(1) == 1);
  if (!usable || g.scalar_type() != dtype) {
    g = empty_like_device(grad, {num_rois, p.channels, pooled_h, pooled_w}, dtype,
                          channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
    torch::stable::copy_(g, grad);
  }
  const int64_t gn = g.stride(0), gc = g.stride(1), gb = g.stride(3);
  if (dtype == ScalarType::Double) {
    backward(p, checked_rois<double>(r, p), num_rois, channels_last, g.const_data_ptr<double>(), gn, gc, gb);
  } else if (dtype == ScalarType::Float) {
    backward(p, checked_rois<float>(r, p), num_rois, channels_last, g.const_data_ptr<float>(), gn, gc, gb);
  } else if (dtype == ScalarType::BFloat16) {
    backward(p, checked_rois<float>(r, p), num_rois, channels_last, g.const_data_ptr<BFloat16>(), gn, gc, gb);
  } else {
    CHECK_ARGUMENT(dtype == ScalarType::Half, "features must be float64, float32, float16 or bfloat16");
    backward(p, checked_rois<float>(r, p), num_rois, channels_last, g.const_data_ptr<Half>(), gn, gc, gb);
  }
  if (dtype != acc)
    for (Tensor& t : grads) t = torch::stable::to(t, dtype);
  return grads;
}

Tensor roi_align_backward(const Tensor& grad, const Tensor& input, const Tensor& rois, double spatial_scale,
                          int64_t sampling_ratio, bool aligned) {
  return multilevel_roi_align_backward(grad, {input}, rois, {spatial_scale}, sampling_ratio, aligned, kAnyLevel)[0];
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrcnn, CPU, m) {
  m.impl("roi_align_backward", TORCH_BOX(&roi_align_backward));
  m.impl("multilevel_roi_align_backward", TORCH_BOX(&multilevel_roi_align_backward));
}

}  // namespace fastrcnn
