// Exact greedy NMS of one group. In score order a box survives iff no survivor overlaps it by more than the threshold, so
// boxes go in blocks: a block is first tested against the survivors so far (threads share the block, SIMD lanes the
// survivors), then settled within itself. Memory is O(N), and a suppressed box costs nothing further.
#pragma once

#include "box_math.h"

#include <algorithm>

namespace fastrcnn {

constexpr int64_t kBlock = 512;
constexpr int64_t kChunk = 64;  // survivors tested between two looks at the result

// Boxes of one group in score order, one array a coordinate. The arrays are padded to whole chunks.
template <class T>
struct BoxList {
  std::vector<T> x1, y1, x2, y2, area;
  explicit BoxList(int64_t n) : x1(n), y1(n), x2(n), y2(n), area(n) {}
  void set(int64_t i, const Box<T>& b) {
    x1[i] = b.x1, y1[i] = b.y1, x2[i] = b.x2, y2[i] = b.y2;
    area[i] = fastrcnn::area(b);
  }
  Box<T> box(int64_t i) const { return {x1[i], y1[i], x2[i], y2[i]}; }
};

template <class T>
HOST_DEVICE bool suppressed_by_any_body(const T* x1, const T* y1, const T* x2, const T* y2, const T* areas, int64_t n,
                                        Box<T> b, T area_b, T threshold) {
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    const int64_t end = std::min(begin + kChunk, n);
    int hit = 0;
#pragma omp simd reduction(| : hit)
    for (int64_t i = begin; i < end; ++i)
      hit |= iou(Box<T>{x1[i], y1[i], x2[i], y2[i]}, areas[i], b, area_b) > threshold;
    if (hit) return true;
  }
  return false;
}

template <class T>
HOST_DEVICE void suppress_rest_body(const T* x1, const T* y1, const T* x2, const T* y2, const T* areas, int64_t n,
                                    Box<T> b, T area_b, T threshold, int32_t* dead) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i)
    dead[i] |= iou(b, area_b, Box<T>{x1[i], y1[i], x2[i], y2[i]}, areas[i]) > threshold;
}

#define DEFINE_SCANS(T)                                                                                              \
  SIMD_CLONES inline bool suppressed_by_any(const T* x1, const T* y1, const T* x2, const T* y2, const T* areas, int64_t n,  \
                                     Box<T> b, T area_b, T threshold) {                                              \
    return suppressed_by_any_body<T>(x1, y1, x2, y2, areas, n, b, area_b, threshold);                                \
  }                                                                                                                  \
  SIMD_CLONES inline void suppress_rest(const T* x1, const T* y1, const T* x2, const T* y2, const T* areas, int64_t n,      \
                                 Box<T> b, T area_b, T threshold, int32_t* dead) {                                   \
    suppress_rest_body<T>(x1, y1, x2, y2, areas, n, b, area_b, threshold, dead);                                     \
  }
DEFINE_SCANS(float)
DEFINE_SCANS(double)
#undef DEFINE_SCANS

// One group: boxes[order[0..n)] in score order. keep[i] = 1 for survivors, of which at most max_output are looked for.
template <class T>
void greedy(const Box<T>* boxes, const int64_t* order, int64_t n, T threshold, int64_t max_output, uint8_t* keep) {
  BoxList<T> kept(n), block(kBlock);
  std::vector<int32_t> dead(kBlock);
  int64_t num_kept = 0;
  for (int64_t begin = 0; begin < n && num_kept < max_output; begin += kBlock) {
    const int64_t size = std::min(kBlock, n - begin);
    for (int64_t i = 0; i < size; ++i) block.set(i, boxes[order[begin + i]]);
    const int64_t grain = (1 << 22) / (num_kept + 1) + 1;  // boxes worth the wait for a thread that is not scheduled
    torch::stable::parallel_for(0, size, grain, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i)
        dead[i] = suppressed_by_any(kept.x1.data(), kept.y1.data(), kept.x2.data(), kept.y2.data(), kept.area.data(),
                                    num_kept, block.box(i), block.area[i], threshold);
    });
    for (int64_t i = 0; i < size && num_kept < max_output; ++i) {
      if (dead[i]) continue;
      keep[begin + i] = 1;
      kept.set(num_kept++, block.box(i));
      const int64_t j = i + 1;
      suppress_rest(&block.x1[0] + j, &block.y1[0] + j, &block.x2[0] + j, &block.y2[0] + j, &block.area[0] + j,
                    size - j, block.box(i), block.area[i], threshold, dead.data() + j);
    }
  }
}

}  // namespace fastrcnn
