// What Winograd's convolution and the gradient of its weight share: the tiles of a map, and the instruction sets.
#pragma once

#include "threads.h"

#include <algorithm>
#include <cstring>

// Contraction is off in this build for the comparisons of other kernels; here multiply-adds are what counts.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=fast")
#endif

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define BEGIN_TARGET(isa) _Pragma("GCC push_options") _Pragma(isa)
#define END_TARGET _Pragma("GCC pop_options")
#define CPU_HAS(feature) __builtin_cpu_supports(feature)
#else
#define BEGIN_TARGET(isa)
#define END_TARGET
#define CPU_HAS(feature) true
#endif

namespace fastrcnn {
namespace {

constexpr float kPoint1 = 0.70710678f, kPoint2 = 1.41421356f;

constexpr int64_t kSmall = 1 << 26;  // multiply-adds, about a millisecond of one thread's

inline int64_t multiple(int64_t n, int64_t of) { return (n + of - 1) / of * of; }

struct Tile {
  int64_t image, y, x;  // of its first output
};

// The tiles of 4x4 outputs of maps.
struct Tiles {
  int64_t rows, columns;
  Tile at(int64_t t) const { return {t / columns / rows, t / columns % rows * 4, t % columns * 4}; }
};
inline Tiles tiles_of(int64_t height, int64_t width) { return {multiple(height, 4) / 4, multiple(width, 4) / 4}; }

// Channels-last maps; `zeros` stands for every pixel outside.
struct Maps {
  const float *data, *zeros;
  int64_t height, width, channels;

  // The size x size pixels whose first one is (y, x) of an image.
  template <int size>
  void window(int64_t image, int64_t y, int64_t x, bool inside, const float* pixel[size * size]) const {
    for (int64_t i = 0; i < size * size; ++i) {
      const int64_t row = y + i / size, column = x + i % size;
      const bool in = inside && row >= 0 && row < height && column >= 0 && column < width;
      pixel[i] = in ? data + ((image * height + row) * width + column) * channels : zeros;
    }
  }
};

inline void check_lanes(int64_t lanes) {
  CHECK_ARGUMENT(lanes == 4 || (lanes == 8 && CPU_HAS("avx2") && CPU_HAS("fma")) ||
                     (lanes == 16 && CPU_HAS("avx512f") && CPU_HAS("avx512bw") && CPU_HAS("avx512dq") && CPU_HAS("avx512vl")),
                 "lanes: this CPU has no vectors of ", lanes, " floats");
}

}  // namespace
}  // namespace fastrcnn
