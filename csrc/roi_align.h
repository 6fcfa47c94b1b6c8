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
  double finest_scale;
  LevelRule rule;
  std::vector<FeatureMap> levels;
};

// The layout rule shared with the fake kernel in fastrcnn/ops/roi_align.py.
inline bool is_channels_last(const Tensor& t) { return t.size(1) > 1 && t.stride(1) == 1; }

inline Problem make_problem(const std::vector<Tensor>& maps, const Tensor& rois, const std::vector<double>& scales,
                            int64_t pooled_h, int64_t pooled_w, int64_t sampling_ratio, bool aligned,
                            double finest_scale, const std::string& profile) {
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
inline bool all_channels_last(const std::vector<Tensor>& maps) {
  return std::all_of(maps.begin(), maps.end(), is_channels_last);
}

}  // namespace fastrcnn
