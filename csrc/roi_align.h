// RoIAlign's arguments, checked, and its layout rule: one source for CPU and CUDA kernels.
#pragma once

#include "roi_align_math.h"

#include <algorithm>

namespace fastrcnn {

struct FeatureMap {
  void* data;
  int64_t stride_n, stride_c;
  int height, width;
  int64_t stride_h, stride_w;
  double scale;
};

struct Problem {
  int pooled_h, pooled_w, sampling_ratio;
  bool aligned;
  int64_t channels, batch;
  LevelRule rule;
  std::vector<FeatureMap> levels;
};

const std::vector<double> kAnyLevel = {1, 0, 0, 0, 0};  // the rule for one map

// The layout rule shared with the fake kernel in fastrcnn/ops/roi_align.py.
inline bool is_channels_last(const Tensor& t) { return t.size(1) > 1 && t.stride(1) == 1; }

inline Problem make_problem(const std::vector<Tensor>& maps, const Tensor& rois, const std::vector<double>& scales,
                            int64_t pooled_h, int64_t pooled_w, int64_t sampling_ratio, bool aligned,
                            const std::vector<double>& level_rule) {
  const int64_t num_rois = rois.size(0);
  CHECK_ARGUMENT(!maps.empty() && maps.size() == scales.size(), "features and strides must have the same length");
  CHECK_SHAPE(rois, num_rois, 5);
  CHECK_ARGUMENT(pooled_h > 0 && pooled_w > 0, "output_size must be positive");
  Problem p{as_int("output_size", pooled_h), as_int("output_size", pooled_w), as_int("sampling_ratio", sampling_ratio),
            aligned, maps[0].size(1), maps[0].size(0), make_level_rule(level_rule), {}};
  for (size_t i = 0; i < maps.size(); ++i) {
    const Tensor& m = maps[i];
    CHECK_ARGUMENT(m.dim() == 4 && m.size(0) == p.batch && m.size(1) == p.channels &&
                       m.scalar_type() == maps[0].scalar_type(),
                   "features must be [B, C, H, W] of one dtype, with the same B and C on every level");
    CHECK_ARGUMENT(num_rois == 0 || (m.size(2) > 0 && m.size(3) > 0), "features must have at least one pixel");
    p.levels.push_back({m.data_ptr(), m.stride(0), m.stride(1), as_int("features", m.size(2)),
                        as_int("features", m.size(3)), m.stride(2), m.stride(3), scales[i]});
  }
  return p;
}

// The whole pyramid runs in one layout: channels-last where every level is, NCHW otherwise.
inline bool all_channels_last(const std::vector<Tensor>& maps) {
  return std::all_of(maps.begin(), maps.end(), is_channels_last);
}

}  // namespace fastrcnn
