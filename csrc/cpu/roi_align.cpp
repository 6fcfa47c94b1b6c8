// RoIAlign over one map or a pyramid. Channels-last maps run vectorised over channels, NCHW maps plane by plane; both read
// the tensor through its strides, so no layout is ever copied.
#include "roi_align.h"
#include "threads.h"

namespace fastrcnn {
namespace {

constexpr int64_t kLanes = 64;  // channels kept in registers while a bin's pixels are summed

template <class T, class F>
HOST_DEVICE void forward_bin_body(const F* map, int64_t stride_h, int64_t stride_w, const int* row, const T* row_w,
                                  int rows, const int* col, const T* col_w, int cols, T scale, int64_t channels,
                                  F* out) {
  for (int64_t c0 = 0; c0 < channels; c0 += kLanes) {
    T sum[kLanes] = {};
    const int64_t n = channels - c0;
    for (int r = 0; r < rows; ++r) {
      for (int q = 0; q < cols; ++q) {
        const F* pixel = map + row[r] * stride_h + col[q] * stride_w + c0;
        const T w = row_w[r] * col_w[q];
        if (n >= kLanes) {
#pragma omp simd
          for (int64_t c = 0; c < kLanes; ++c) sum[c] += w * static_cast<T>(pixel[c]);
        } else {
#pragma omp simd
          for (int64_t c = 0; c < n; ++c) sum[c] += w * static_cast<T>(pixel[c]);
        }
      }
    }
    const int64_t m = n < kLanes ? n : kLanes;
#pragma omp simd
    for (int64_t c = 0; c < m; ++c) out[c0 + c] = static_cast<F>(sum[c] * scale);
  }
}

// kPlanes planes go side by side: their cache misses overlap, and a tap's offset and weight are read once for all.
template <class T, class F>
HOST_DEVICE void forward_planes_body(const F* map, int64_t stride_c, const int64_t* offset, const T* weight,
                                     const int* begin, int64_t bins, int64_t channels, F* out) {
  for (int64_t c0 = 0; c0 < channels; c0 += kPlanes) {
    const F* plane[kPlanes];
    for (int64_t u = 0; u < kPlanes; ++u) plane[u] = map + std::min(c0 + u, channels - 1) * stride_c;
    const int64_t planes = std::min(kPlanes, channels - c0);
    for (int64_t b = 0; b < bins; ++b) {
      T sum[kPlanes] = {};
      for (int k = begin[b]; k < begin[b + 1]; ++k)
        for (int64_t u = 0; u < kPlanes; ++u) sum[u] += weight[k] * static_cast<T>(plane[u][offset[k]]);
      for (int64_t u = 0; u < planes; ++u) out[(c0 + u) * bins + b] = static_cast<F>(sum[u]);
    }
  }
}

// target_clones does not reach into templates: one set of loops for each arithmetic type and feature type.
#define DEFINE_LOOPS(CLONES, T, F)                                                                                    \
  CLONES void forward_bin(const F* map, int64_t sh, int64_t sw, const int* row, const T* row_w, int rows,             \
                          const int* col, const T* col_w, int cols, T scale, int64_t channels, F* out) {              \
    forward_bin_body<T, F>(map, sh, sw, row, row_w, rows, col, col_w, cols, scale, channels, out);                    \
  }                                                                                                                   \
  CLONES void forward_planes(const F* map, int64_t sc, const int64_t* offset, const T* weight, const int* begin,      \
                             int64_t bins, int64_t channels, F* out) {                                                \
    forward_planes_body<T, F>(map, sc, offset, weight, begin, bins, channels, out);                                   \
  }
#define NO_CLONES
DEFINE_LOOPS(SIMD_CLONES, float, float)
DEFINE_LOOPS(SIMD_CLONES, float, BFloat16)
DEFINE_LOOPS(SIMD_CLONES, float, Half)
DEFINE_LOOPS(NO_CLONES, double, double)
#undef DEFINE_LOOPS

template <class T, class F>
void forward(const Problem& p, const T* rois, int64_t num_rois, bool channels_last, F* out) {
  const int64_t bins = static_cast<int64_t>(p.pooled_h) * p.pooled_w, out_size = bins * p.channels;
  share(num_rois, 8, threads_for(num_rois * out_size, 1 << 20), [&](int64_t first, int64_t last, int64_t) {
    RoiTaps<T> taps;
    PlaneTaps<T> planes;
    for (int64_t k = first; k < last; ++k) {
      taps.build(rois + k * 5, p);
      F* dst = out + k * out_size;
      if (taps.level == nullptr) {
        std::fill_n(dst, out_size, static_cast<F>(0.0f));
        continue;
      }
      const FeatureMap& level = *taps.level;
      const F* map = static_cast<const F*>(level.data) + taps.image * level.stride_n;
      if (!channels_last) {
        planes.build(taps, p.pooled_h, p.pooled_w);
        forward_planes(map, level.stride_c, planes.offset.data(), planes.weight.data(), planes.begin.data(), bins,
                       p.channels, dst);
        continue;
      }
      for (int ph = 0; ph < p.pooled_h; ++ph) {
        const int r = taps.rows.begin[ph], rows = taps.rows.begin[ph + 1] - r;
        for (int pw = 0; pw < p.pooled_w; ++pw, dst += p.channels) {
          const int q = taps.columns.begin[pw], cols = taps.columns.begin[pw + 1] - q;
          forward_bin(map, level.stride_h, level.stride_w, taps.rows.index.data() + r, taps.rows.weight.data() + r, rows,
                      taps.columns.index.data() + q, taps.columns.weight.data() + q, cols, taps.scale, p.channels, dst);
        }
      }
    }
  });
}

Tensor multilevel_roi_align(std::vector<Tensor> features, const Tensor& rois, int64_t pooled_h, int64_t pooled_w,
                            std::vector<double> scales, int64_t sampling_ratio, bool aligned,
                            std::vector<double> level_rule) {
  const Problem p = make_problem(features, rois, scales, pooled_h, pooled_w, sampling_ratio, aligned, level_rule);
  const ScalarType dtype = features[0].scalar_type();
  const Tensor r = contiguous_as(rois, coordinate_type(features[0]));
  const bool channels_last = all_channels_last(features);
  const int64_t num_rois = rois.size(0);
  Tensor out = empty_like_device(rois, {num_rois, p.channels, pooled_h, pooled_w}, dtype,
                                 channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  if (dtype == ScalarType::Double) {
    forward(p, checked_rois<double>(r, p), num_rois, channels_last, out.mutable_data_ptr<double>());
  } else if (dtype == ScalarType::Float) {
    forward(p, checked_rois<float>(r, p), num_rois, channels_last, out.mutable_data_ptr<float>());
  } else if (dtype == ScalarType::BFloat16) {
    forward(p, checked_rois<float>(r, p), num_rois, channels_last, out.mutable_data_ptr<BFloat16>());
  } else {
    CHECK_ARGUMENT(dtype == ScalarType::Half, "features must be float64, float32, float16 or bfloat16");
    forward(p, checked_rois<float>(r, p), num_rois, channels_last, out.mutable_data_ptr<Half>());
  }
  return out;
}

Tensor roi_align(const Tensor& input, const Tensor& rois, int64_t pooled_h, int64_t pooled_w, double spatial_scale,
                 int64_t sampling_ratio, bool aligned) {
  return multilevel_roi_align({input}, rois, pooled_h, pooled_w, {spatial_scale}, sampling_ratio, aligned, kAnyLevel);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrcnn, CPU, m) {
  m.impl("roi_align", TORCH_BOX(&roi_align));
  m.impl("multilevel_roi_align", TORCH_BOX(&multilevel_roi_align));
}

}  // namespace fastrcnn
