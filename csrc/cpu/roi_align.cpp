// RoIAlign over one map or a pyramid, forward and backward. Channels-last maps run vectorised over channels, NCHW maps
// plane by plane; both read the tensor through its strides, so no layout is ever copied.
//
// Backward is deterministic: threads share the channels, never the RoIs, so every gradient is summed in RoI order
// whatever the number of threads.
#include "roi_align_math.h"

#include <algorithm>
#include <type_traits>

namespace fastrcnn {
namespace {

struct Level {
  void* data;
  int64_t stride_n, stride_c;
  int height, width;
  int64_t stride_h, stride_w;
  double scale;
};

// The rows (or columns) of the map that a bin touches, with their summed weights.
template <class T>
struct AxisTaps {
  std::vector<int> begin;  // [bins + 1] into index and weight
  std::vector<int> index;
  std::vector<T> weight;

  // Neighbouring samples share pixels: adding up their weights leaves half the reads.
  void add(int pixel, T w) {
    if (w == T(0)) return;
    const int size = static_cast<int>(index.size());
    for (int k = size - 1; k >= begin.back() && k >= size - 2; --k) {
      if (index[k] == pixel) {
        weight[k] += w;
        return;
      }
    }
    index.push_back(pixel);
    weight.push_back(w);
  }

  void build(const RoiGrid<T>& grid, int bins, int size) {
    begin.assign(1, 0);
    index.clear();
    weight.clear();
    for (int p = 0; p < bins; ++p) {
      for (int i = 0; i < grid.samples; ++i) {
        const Tap<T> tap = axis_tap(grid, p, i, size);
        add(tap.low, tap.w_low);
        add(tap.high, tap.w_high);
      }
      begin.push_back(static_cast<int>(index.size()));
    }
  }
};

struct Problem {
  int pooled_h, pooled_w, sampling_ratio;
  bool aligned;
  int64_t channels, batch;
  double finest_scale;
  LevelRule rule;
  std::vector<Level> levels;
};

template <class T>
struct RoiTaps {
  const Level* level = nullptr;  // null: a padding RoI (batch index < 0)
  int64_t image = 0;
  AxisTaps<T> rows, columns;
  T scale = T(0);  // 1 / number of samples in a bin

  // roi: (batch index, x1, y1, x2, y2)
  void build(const T* roi, const Problem& p) {
    level = nullptr;
    image = static_cast<int64_t>(roi[0]);
    if (!(roi[0] >= T(0))) return;
    const int num_levels = static_cast<int>(p.levels.size());
    level = &p.levels[num_levels == 1 ? 0
                                      : roi_level(roi[1], roi[2], roi[3], roi[4], static_cast<T>(p.finest_scale),
                                                  num_levels, p.rule)];
    const T s = static_cast<T>(level->scale);
    const auto x = roi_grid(roi[1], roi[3], s, p.pooled_w, p.sampling_ratio, p.aligned);
    const auto y = roi_grid(roi[2], roi[4], s, p.pooled_h, p.sampling_ratio, p.aligned);
    const int64_t samples = static_cast<int64_t>(x.samples) * y.samples;
    scale = T(1) / static_cast<T>(samples > 1 ? samples : 1);
    rows.build(y, samples > 0 ? p.pooled_h : 0, level->height);
    columns.build(x, samples > 0 ? p.pooled_w : 0, level->width);
    if (samples == 0) level = nullptr;
  }
};

// --- channels-last: one pixel is a run of channels ---------------------------------------------------------------

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

// --- NCHW: the bins of one plane ---------------------------------------------------------------------------------

// A RoI's pixels as offsets into a plane, bin after bin: the same for each of the planes.
template <class T>
struct PlaneTaps {
  std::vector<int64_t> offset;
  std::vector<T> weight;
  std::vector<int> begin;

  void build(const RoiTaps<T>& taps, int pooled_h, int pooled_w) {
    offset.clear();
    weight.clear();
    begin.assign(1, 0);
    const Level& level = *taps.level;
    for (int ph = 0; ph < pooled_h; ++ph) {
      for (int pw = 0; pw < pooled_w; ++pw) {
        for (int r = taps.rows.begin[ph]; r < taps.rows.begin[ph + 1]; ++r) {
          for (int q = taps.columns.begin[pw]; q < taps.columns.begin[pw + 1]; ++q) {
            offset.push_back(taps.rows.index[r] * level.stride_h + taps.columns.index[q] * level.stride_w);
            weight.push_back(taps.rows.weight[r] * taps.columns.weight[q] * taps.scale);
          }
        }
        begin.push_back(static_cast<int>(offset.size()));
      }
    }
  }
};

template <class T, class F>
HOST_DEVICE void forward_planes_body(const F* map, int64_t stride_c, const int64_t* offset, const T* weight,
                                     const int* begin, int64_t bins, int64_t channels, F* out) {
  for (int64_t c = 0; c < channels; ++c) {
    const F* plane = map + c * stride_c;
    for (int64_t b = 0; b < bins; ++b) {
      T sum = T(0);
      for (int k = begin[b]; k < begin[b + 1]; ++k) sum += weight[k] * static_cast<T>(plane[offset[k]]);
      out[c * bins + b] = static_cast<F>(sum);
    }
  }
}

template <class T, class F>
HOST_DEVICE void backward_planes_body(T* map, int64_t stride_c, const int64_t* offset, const T* weight,
                                      const int* begin, int64_t bins, int64_t channels, const F* grad_out,
                                      int64_t grad_stride_c, int64_t grad_stride_bin) {
  for (int64_t c = 0; c < channels; ++c) {
    T* plane = map + c * stride_c;
    for (int64_t b = 0; b < bins; ++b) {
      const T g = static_cast<T>(grad_out[c * grad_stride_c + b * grad_stride_bin]);
      for (int k = begin[b]; k < begin[b + 1]; ++k) plane[offset[k]] += weight[k] * g;
    }
  }
}

// target_clones does not reach into templates: one set of loops for each arithmetic type and feature type.
#define DEFINE_LOOPS(CLONES, T, F)                                                                                    \
  CLONES void forward_bin(const F* map, int64_t sh, int64_t sw, const int* row, const T* row_w, int rows,             \
                          const int* col, const T* col_w, int cols, T scale, int64_t channels, F* out) {              \
    forward_bin_body<T, F>(map, sh, sw, row, row_w, rows, col, col_w, cols, scale, channels, out);                    \
  }                                                                                                                   \
  CLONES void backward_bin(T* map, int64_t sh, int64_t sw, const int* row, const T* row_w, int rows, const int* col,  \
                           const T* col_w, int cols, T scale, int64_t channels, const F* grad) {                      \
    backward_bin_body<T, F>(map, sh, sw, row, row_w, rows, col, col_w, cols, scale, channels, grad);                  \
  }                                                                                                                   \
  CLONES void forward_planes(const F* map, int64_t sc, const int64_t* offset, const T* weight, const int* begin,      \
                             int64_t bins, int64_t channels, F* out) {                                                \
    forward_planes_body<T, F>(map, sc, offset, weight, begin, bins, channels, out);                                   \
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

// --- launchers ---------------------------------------------------------------------------------------------------

// The layout rule shared with the fake kernel in fastrcnn/ops/roi_align.py.
bool is_channels_last(const Tensor& t) { return t.size(1) > 1 && t.stride(1) == 1; }

template <class T, class F>
void forward(const Problem& p, const T* rois, int64_t num_rois, bool channels_last, F* out) {
  const int64_t bins = static_cast<int64_t>(p.pooled_h) * p.pooled_w, out_size = bins * p.channels;
  torch::stable::parallel_for(0, num_rois, 1, [&](int64_t first, int64_t last) {
    RoiTaps<T> taps;
    PlaneTaps<T> planes;
    for (int64_t k = first; k < last; ++k) {
      taps.build(rois + k * 5, p);
      F* dst = out + k * out_size;
      if (taps.level == nullptr) {
        std::fill_n(dst, out_size, static_cast<F>(0.0f));
        continue;
      }
      const Level& level = *taps.level;
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

// Before the threads start: an error is raised here, not from inside the loop.
template <class T>
const T* checked_rois(const Tensor& rois, const Problem& p) {
  const T* r = rois.const_data_ptr<T>();
  for (int64_t k = 0; k < rois.size(0); ++k)
    STD_TORCH_CHECK(!(r[k * 5] >= static_cast<T>(p.batch)), "rois: row ", k, " has batch index ", r[k * 5],
                    ", features have ", p.batch, " images");
  return r;
}

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
      const Level& level = *taps.level;
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

Problem make_problem(const std::vector<Tensor>& maps, const Tensor& rois, const std::vector<double>& scales,
                     int64_t pooled_h, int64_t pooled_w, int64_t sampling_ratio, bool aligned, double finest_scale,
                     const std::string& profile) {
  const int64_t num_rois = rois.size(0);
  STD_TORCH_CHECK(!maps.empty() && maps.size() == scales.size(), "features and strides must have the same length");
  CHECK_SHAPE(rois, num_rois, 5);
  STD_TORCH_CHECK(pooled_h > 0 && pooled_w > 0, "output_size must be positive");
  Problem p{static_cast<int>(pooled_h), static_cast<int>(pooled_w), static_cast<int>(sampling_ratio), aligned,
            maps[0].size(1), maps[0].size(0), finest_scale, level_rule(profile), {}};
  for (size_t i = 0; i < maps.size(); ++i) {
    const Tensor& m = maps[i];
    STD_TORCH_CHECK(m.dim() == 4 && m.size(0) == p.batch && m.size(1) == p.channels &&
                        m.scalar_type() == maps[0].scalar_type(),
                    "features must be [B, C, H, W] of one dtype, with the same B and C on every level");
    p.levels.push_back({m.data_ptr(), m.stride(0), m.stride(1), static_cast<int>(m.size(2)),
                        static_cast<int>(m.size(3)), m.stride(2), m.stride(3), scales[i]});
  }
  return p;
}

// The whole pyramid runs in one layout: channels-last where every level is, NCHW otherwise.
bool all_channels_last(const std::vector<Tensor>& maps) {
  return std::all_of(maps.begin(), maps.end(), is_channels_last);
}

Tensor multilevel_roi_align(std::vector<Tensor> features, const Tensor& rois, int64_t pooled_h, int64_t pooled_w,
                            std::vector<double> scales, int64_t sampling_ratio, bool aligned, double finest_scale,
                            std::string profile) {
  const Problem p =
      make_problem(features, rois, scales, pooled_h, pooled_w, sampling_ratio, aligned, finest_scale, profile);
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
    STD_TORCH_CHECK(dtype == ScalarType::Half, "features must be float64, float32, float16 or bfloat16");
    forward(p, checked_rois<float>(r, p), num_rois, channels_last, out.mutable_data_ptr<Half>());
  }
  return out;
}

std::vector<Tensor> multilevel_roi_align_backward(const Tensor& grad, std::vector<Tensor> features, const Tensor& rois,
                                                  std::vector<double> scales, int64_t sampling_ratio, bool aligned,
                                                  double finest_scale, std::string profile) {
  const int64_t pooled_h = grad.size(2), pooled_w = grad.size(3), num_rois = rois.size(0);
  const ScalarType dtype = features[0].scalar_type(), acc = coordinate_type(features[0]);
  const bool channels_last = all_channels_last(features);
  std::vector<Tensor> grads;  // summed in float32 (double for double), whatever the features are
  for (const Tensor& f : features) {
    Tensor g = empty_like_device(f, {f.size(0), f.size(1), f.size(2), f.size(3)}, acc,
                                 channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
    grads.push_back(torch::stable::zero_(g));
  }
  const Problem p = make_problem(grads, rois, scales, pooled_h, pooled_w, sampling_ratio, aligned, finest_scale, profile);
  CHECK_SHAPE(grad, num_rois, p.channels, pooled_h, pooled_w);
  CHECK_SHAPE(rois, num_rois, 5);
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
    STD_TORCH_CHECK(dtype == ScalarType::Half, "features must be float64, float32, float16 or bfloat16");
    backward(p, checked_rois<float>(r, p), num_rois, channels_last, g.const_data_ptr<Half>(), gn, gc, gb);
  }
  if (dtype != acc)
    for (Tensor& t : grads) t = torch::stable::to(t, dtype);
  return grads;
}

Tensor roi_align(const Tensor& input, const Tensor& rois, int64_t pooled_h, int64_t pooled_w, double spatial_scale,
                 int64_t sampling_ratio, bool aligned) {
  return multilevel_roi_align({input}, rois, pooled_h, pooled_w, {spatial_scale}, sampling_ratio, aligned, 56.0,
                              "mmdet");
}

Tensor roi_align_backward(const Tensor& grad, const Tensor& input, const Tensor& rois, double spatial_scale,
                          int64_t sampling_ratio, bool aligned) {
  return multilevel_roi_align_backward(grad, {input}, rois, {spatial_scale}, sampling_ratio, aligned, 56.0, "mmdet")[0];
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrcnn, CPU, m) {
  m.impl("roi_align", TORCH_BOX(&roi_align));
  m.impl("roi_align_backward", TORCH_BOX(&roi_align_backward));
  m.impl("multilevel_roi_align", TORCH_BOX(&multilevel_roi_align));
  m.impl("multilevel_roi_align_backward", TORCH_BOX(&multilevel_roi_align_backward));
}

}  // namespace fastrcnn
