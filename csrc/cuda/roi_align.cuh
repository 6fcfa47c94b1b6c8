// What RoIAlign's CUDA kernels share: the maps as a kernel argument, a RoI's place on them, packs of channels.
#pragma once

#include "roi_align.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <cstring>
#include <type_traits>

namespace fastrcnn {

constexpr int kWarp = 32;
constexpr int kMaxLevels = 8;
constexpr int kMaxBins = 512;   // pooled_h + pooled_w: what a RoI keeps in shared memory grows with it
constexpr int kFewSamples = 8;  // a bin with more looks for those it needs by bisection
constexpr int64_t kMaxInt = (int64_t{1} << 31) - 1024;  // leaves room to step beyond the last by a block

// Problem as a kernel argument.
struct Pyramid {
  FeatureMap level[kMaxLevels];
  int num_levels, pooled_h, pooled_w, sampling_ratio, channels, batch;
  bool aligned, channels_last;
  LevelRule rule;
};

inline Pyramid make_pyramid(const Problem& p, int64_t num_rois, bool channels_last) {
  const int64_t num_levels = static_cast<int64_t>(p.levels.size());
  CHECK_ARGUMENT(num_levels <= kMaxLevels, "features: at most ", kMaxLevels, " levels on CUDA, got ", num_levels);
  CHECK_ARGUMENT(p.pooled_h <= kMaxBins && p.pooled_w <= kMaxBins && p.pooled_h + p.pooled_w <= kMaxBins,
                  "output_size: at most ", kMaxBins, " bins along both axes together on CUDA");
  CHECK_ARGUMENT(num_rois <= kMaxInt && p.batch <= kMaxInt && p.channels * p.pooled_h * p.pooled_w <= kMaxInt,
                  "rois: more than 2^31 of them, or of output elements for each");
  Pyramid pyramid{{}, static_cast<int>(num_levels), p.pooled_h, p.pooled_w, p.sampling_ratio,
                  static_cast<int>(p.channels), static_cast<int>(p.batch), p.aligned, channels_last, p.rule};
  std::copy(p.levels.begin(), p.levels.end(), pyramid.level);
  return pyramid;
}

// Where a RoI is read. level -1: nowhere, its output is 0 (padding, an image beyond the batch, no samples, no pixels).
template <class T>
struct Place {
  int level, image;
  RoiGrid<T> y, x;
  T mean;  // 1 / samples of a bin
};

template <class T>
__device__ __forceinline__ void place_on_level(const T* roi, const Pyramid& p, Place<T>& place) {
  const T scale = static_cast<T>(p.level[place.level].scale);
  place.x = roi_grid(roi[1], roi[3], scale, p.pooled_w, p.sampling_ratio, p.aligned);
  place.y = roi_grid(roi[2], roi[4], scale, p.pooled_h, p.sampling_ratio, p.aligned);
  place.mean = T(1) / (static_cast<T>(place.x.samples) * static_cast<T>(place.y.samples));
}

// roi: (image, x1, y1, x2, y2)
template <class T>
__device__ __forceinline__ Place<T> place_roi(const T* roi, const Pyramid& p) {
  Place<T> place{-1, 0, {T(0), T(0), 0}, {T(0), T(0), 0}, T(0)};
  if (!(roi[0] >= T(0) && roi[0] < static_cast<T>(p.batch))) return place;
  place.image = static_cast<int>(roi[0]);
  place.level = roi_level(roi[1], roi[2], roi[3], roi[4], p.rule, p.num_levels);
  const FeatureMap& level = p.level[place.level];
  place_on_level(roi, p, place);
  if (place.x.samples == 0 || place.y.samples == 0 || level.height == 0 || level.width == 0) place.level = -1;
  return place;
}

struct SampleRange {
  int begin, end;
};

// Every sample of bin p that lies within [low, high], and where a bin has few samples also others. A bin of a RoI far
// larger than the map has up to kMostSamples samples: positions never fall as i grows, so bisection finds the few that count.
template <class T>
__device__ __forceinline__ SampleRange samples_within(const RoiGrid<T>& g, int p, T low, T high) {
  if (g.samples <= kFewSamples || !(g.bin > T(0))) return {0, g.samples};
  int begin = 0, end = g.samples;
  for (int above = end; begin < above;) {
    const int middle = (begin + above) / 2;
    if (sample_position(g, p, middle) < low) {
      begin = middle + 1;
    } else {
      above = middle;
    }
  }
  for (int from = begin; from < end;) {
    const int middle = (from + end) / 2;
    if (sample_position(g, p, middle) <= high) {
      from = middle + 1;
    } else {
      end = middle;
    }
  }
  return {begin, end};
}

template <class F, int V>
struct alignas(sizeof(F) * V) Pack {
  F value[V];
};

// V neighbouring channels of memory that no kernel of the launch writes; `from` lies on sizeof(F) * V bytes.
template <class F, int V>
__device__ __forceinline__ Pack<F, V> load_pack(const F* from) {
  Pack<F, V> pack;
  if constexpr (sizeof(pack) == sizeof(int4)) {
    const int4 raw = __ldg(reinterpret_cast<const int4*>(from));
    memcpy(&pack, &raw, sizeof(raw));
  } else {
    for (int v = 0; v < V; ++v) pack.value[v] = from[v];
  }
  return pack;
}

// In the arithmetic's type. A bfloat16 is the upper half of a float: two of them are two instructions.
template <class T, class F, int V>
__device__ __forceinline__ void widen(const Pack<F, V>& pack, T (&value)[V]) {
  if constexpr (std::is_same_v<F, BFloat16> && V % 2 == 0) {
    unsigned pair[V / 2];
    memcpy(pair, &pack, sizeof(pair));
#pragma unroll
    for (int v = 0; v < V; v += 2) {
      value[v] = __uint_as_float(pair[v / 2] << 16);
      value[v + 1] = __uint_as_float(pair[v / 2] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int v = 0; v < V; ++v) value[v] = static_cast<T>(pack.value[v]);
  }
}

// Written once and not read by this launch: the first to leave the L2, where what is read is wanted again.
template <class T, class F, int V>
__device__ __forceinline__ void store_pack(F* to, const T (&value)[V]) {
  Pack<F, V> pack;
#pragma unroll
  for (int v = 0; v < V; ++v) pack.value[v] = static_cast<F>(value[v]);
  if constexpr (sizeof(pack) == sizeof(int4)) {
    int4 raw;
    memcpy(&raw, &pack, sizeof(raw));
    __stcs(reinterpret_cast<int4*>(to), raw);
  } else {
    *reinterpret_cast<Pack<F, V>*>(to) = pack;
  }
}

}  // namespace fastrcnn
