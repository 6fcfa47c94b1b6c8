// What RoIAlign's forward and backward share on the CPU: a RoI's rows and columns.
#pragma once

#include "../roi_align.h"

namespace fastrcnn {

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

template <class T>
struct RoiTaps {
  const FeatureMap* level = nullptr;  // null: nowhere, its bins are 0 (padding, no samples)
  int64_t image = 0;
  AxisTaps<T> rows, columns;
  T scale = T(0);  // 1 / number of samples in a bin

  // roi: (batch index, x1, y1, x2, y2)
  void build(const T* roi, const Problem& p) {
    level = nullptr;
    if (!(roi[0] >= T(0))) return;
    image = static_cast<int64_t>(roi[0]);
    const int num_levels = static_cast<int>(p.levels.size());
    level = &p.levels[num_levels == 1 ? 0
                                      : roi_level(roi[1], roi[2], roi[3], roi[4], p.rule, num_levels)];
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

constexpr int64_t kPlanes = 8;  // NCHW planes worked on together

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
    const FeatureMap& level = *taps.level;
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

// Before the threads start: an error is raised here, not from inside the loop.
template <class T>
const T* checked_rois(const Tensor& rois, const Problem& p) {
  const T* r = rois.const_data_ptr<T>();
  for (int64_t k = 0; k < rois.size(0); ++k)
    CHECK_ARGUMENT(!(r[k * 5] >= static_cast<T>(p.batch)), "rois: row ", k, " has image index ", r[k * 5], ", of ",
                   p.batch, " images");
  return r;
}

}  // namespace fastrcnn
