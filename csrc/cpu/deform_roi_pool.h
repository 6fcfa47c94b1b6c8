// What deformable RoI pooling's forward and backward share on the CPU: the pixels of a RoI, argument checks.
#pragma once

#include "deform_roi_pool_math.h"

#include <algorithm>

namespace fastrcnn {

// The pixels of one RoI, bin after bin.
template <class T>
struct BinTaps {
  struct AxisTap {
    int pixel;
    T weight, slope;
  };
  struct PixelTap {
    int64_t at;                  // offset of the pixel's first channel
    T weight, slope_y, slope_x;  // slopes: d weight / d offset
  };

  std::vector<PixelTap> taps;
  std::vector<int64_t> begin;  // [bins + 1] into taps
  std::vector<AxisTap> rows, columns;

  static void add(std::vector<AxisTap>& axis, int pixel, T weight, T slope) {
    if (weight == T(0) && slope == T(0)) return;
    const size_t size = axis.size();  // neighbouring samples share pixels
    for (size_t k = size; k > 0 && k + 2 > size; --k) {
      if (axis[k - 1].pixel != pixel) continue;
      axis[k - 1].weight += weight;
      axis[k - 1].slope += slope;
      return;
    }
    axis.push_back({pixel, weight, slope});
  }

  static void list(std::vector<AxisTap>& axis, const RoiGrid<T>& grid, int p, int size, bool slopes) {
    axis.clear();
    for (int i = 0; i < grid.samples; ++i) {
      const Tap<T> tap = axis_tap(grid, p, i, size);
      const T slope = slopes ? axis_slope(grid, p, i, size) : T(0);
      add(axis, tap.low, tap.w_low, -slope);
      add(axis, tap.high, tap.w_high, slope);
    }
  }

  // roi: (image, x1, y1, x2, y2); offset: [2, bins] or null. False where every bin is empty.
  bool build(const T* roi, const T* offset, bool slopes, const DeformPool& p) {
    if (!(roi[0] >= T(0))) return false;
    const T scale = static_cast<T>(p.spatial_scale), gamma = static_cast<T>(p.gamma);
    const DeformAxis<T> x = deform_axis(roi[1], roi[3], scale, gamma, p.pooled_w, p.sampling_ratio);
    const DeformAxis<T> y = deform_axis(roi[2], roi[4], scale, gamma, p.pooled_h, p.sampling_ratio);
    if (x.grid.samples == 0 || y.grid.samples == 0) return false;
    const T mean = T(1) / (static_cast<T>(x.grid.samples) * static_cast<T>(y.grid.samples));
    const int bins = p.pooled_h * p.pooled_w;
    const int64_t step = p.channels_last ? p.channels : 1;
    taps.clear();
    begin.assign(1, 0);
    for (int b = 0; b < bins; ++b) {
      list(columns, offset ? moved(x, offset[b]) : x.grid, b % p.pooled_w, p.width, slopes);
      list(rows, offset ? moved(y, offset[bins + b]) : y.grid, b / p.pooled_w, p.height, slopes);
      for (const AxisTap& r : rows)
        for (const AxisTap& c : columns)
          taps.push_back({(static_cast<int64_t>(r.pixel) * p.width + c.pixel) * step, r.weight * c.weight * mean,
                          r.slope * c.weight * mean * y.reach, r.weight * c.slope * mean * x.reach});
      begin.push_back(static_cast<int64_t>(taps.size()));
    }
    return true;
  }
};

// Before the threads start: an error is raised here, not from inside the loop.
template <class T>
const T* checked_deform_rois(const Tensor& rois, const DeformPool& p) {
  const T* r = rois.const_data_ptr<T>();
  for (int64_t k = 0; k < p.num_rois; ++k)
    CHECK_ARGUMENT(!(r[k * 5] >= static_cast<T>(p.batch)), "rois: row ", k, " has image index ", r[k * 5], ", of ",
                   p.batch, " images");
  return r;
}

}  // namespace fastrcnn
