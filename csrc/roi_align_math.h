// RoIAlign arithmetic (He et al., Mask R-CNN, 2017), one source for CPU and CUDA kernels.
//
// Bilinear sampling on a regular grid is separable: the weight of pixel (y, x) in a sample is wy * wx, and a sample
// outside the map has weight 0 on either axis. So a bin needs one short list of rows and one of columns, not a list of
// pixels: value(bin) = sum over rows, columns of wy * wx * feature[y][x] / samples.
#pragma once

#include "common.h"

#include <cmath>

namespace fastrcnn {

constexpr int kMostSamples = 1 << 16;  // of a bin along an axis

template <class T>
struct RoiGrid {
  T start, bin;   // first edge and bin size along one axis, in feature pixels
  int samples;    // sampling points a bin along this axis
};

// Points along one axis of a RoI [low, high] (image pixels). sampling_ratio <= 0 takes ceil(size / pooled) points,
// kMostSamples at most.
// A RoI with a NaN or infinite edge gets no points: its bins are 0.
template <class T>
HOST_DEVICE RoiGrid<T> roi_grid(T low, T high, T scale, int pooled, int sampling_ratio, bool aligned) {
  const T offset = aligned ? T(0.5) : T(0);
  const T start = low * scale - offset;
  T size = high * scale - offset - start;
  if (!aligned) size = size < T(1) ? T(1) : size;  // the first paper's rule: at least one pixel
  const T bin = size / static_cast<T>(pooled);
  if (!(bin - bin == T(0)) || !(start - start == T(0))) return {T(0), T(0), 0};
  const T adaptive = std::ceil(bin);
  const T most = T(kMostSamples);  // keeps the conversion to int defined
  const int samples = sampling_ratio > 0 ? sampling_ratio
                                         : (adaptive < T(0) ? 0 : static_cast<int>(adaptive < most ? adaptive : most));
  return {start, bin, samples};
}

// Where sample `i` of bin `p` lies on its axis. It never falls as i grows, if bin is positive.
template <class T>
HOST_DEVICE T sample_position(const RoiGrid<T>& g, int p, int i) {
  return g.start + static_cast<T>(p) * g.bin + (static_cast<T>(i) + T(0.5)) * g.bin / static_cast<T>(g.samples);
}

template <class T>
struct Tap {
  int low, high;       // the two neighbouring pixels
  T w_low, w_high;     // their weights; both 0 outside [-1, size]
};

// Sample `i` of bin `p` on an axis of `size` pixels.
template <class T>
HOST_DEVICE Tap<T> axis_tap(const RoiGrid<T>& g, int p, int i, int size) {
  T v = sample_position(g, p, i);
  if (!(v >= T(-1) && v <= static_cast<T>(size))) return {0, 0, T(0), T(0)};
  if (v <= T(0)) v = T(0);
  int low = static_cast<int>(v);
  if (low >= size - 1) return {size - 1, size - 1, T(1), T(0)};
  const T frac = v - static_cast<T>(low);
  return {low, low + 1, T(1) - frac, frac};
}

// Pyramid level of a RoI (Lin et al., FPN, 2017, eq. 1): floor(first + log2(size / scale + inside) + outside) - lowest.
struct LevelRule {
  double scale, first, inside, outside, lowest;
};

inline LevelRule make_level_rule(const std::vector<double>& rule) {
  CHECK_ARGUMENT(rule.size() == 5, "level_rule must hold five numbers, got ", rule.size());
  return {rule[0], rule[1], rule[2], rule[3], rule[4]};
}

template <class T>
HOST_DEVICE int roi_level(T x1, T y1, T x2, T y2, const LevelRule& rule, int num_levels) {
  const T size = std::sqrt((x2 - x1) * (y2 - y1));
  const T octave = std::log2(size / static_cast<T>(rule.scale) + static_cast<T>(rule.inside));
  const T level = std::floor(static_cast<T>(rule.first) + octave + static_cast<T>(rule.outside)) -
                  static_cast<T>(rule.lowest);
  if (!(level > T(0))) return 0;  // also NaN and -inf
  return level < static_cast<T>(num_levels - 1) ? static_cast<int>(level) : num_levels - 1;
}

}  // namespace fastrcnn
