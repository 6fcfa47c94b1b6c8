// Which boxes of a tile overlap others by more than a threshold, as bits: the pairs that NMS spends its time on.
#pragma once

#include "box_math.h"

#include <cuda_runtime.h>

namespace fastrcnn {

// IoU > threshold, and what is possible of it: the intersection then exceeds threshold / (1 + threshold) of the sum of both
// areas. A margin of 1e-4, and one for underflow, keep rounding out of that. The 2 is that of doubled_width.
template <class T>
struct Bound {
  T threshold, factor;
  explicit Bound(T t) : threshold(t), factor(T(2 * 0.9999) * t / (T(1) + t)) {}
  __device__ T share(const Box<T>& b) const { return fmax(area(b) * factor - std::numeric_limits<T>::min(), T(0)); }
};
// Boxes that every thread of a block compares with its own.
template <class T, int kBoxes>
struct Staged {
  AlignedBox<T> box[kBoxes];
  T share[kBoxes];
  __device__ void set(int i, const AlignedBox<T>& b, const Bound<T>& bound) {
    box[i] = b;
    share[i] = bound.share(b);
  }
};

// 2 w, or 0 where w < 0: two apart in x and in y must not look like two that meet. An addition, since additions have
// twice the throughput of a maximum.
template <class T>
__device__ T doubled_width(T w) {
  return w + fabs(w);
}
__device__ inline unsigned sign_bit(float x) { return __float_as_uint(x) >> 31; }
__device__ inline unsigned sign_bit(double x) { return static_cast<unsigned>(__double_as_longlong(x) >> 63) & 1; }

// Bits [first, last) of 32, for whatever first and last.
__device__ inline unsigned bit_range(int first, int last) {
  const unsigned from = first <= 0 ? ~0u : (first < 32 ? ~0u << first : 0u);
  const unsigned until = last <= 0 ? 0u : (last < 32 ? ~(~0u << last) : ~0u);
  return from & until;
}

// Which of the 32 staged boxes from `begin` on overlap `b` by IoU > threshold, of those wanted. Each pair costs a product
// instead of IEEE's division, which decides the few that pass. fmin and fmax take one instruction; that they drop a NaN,
// and what the bound makes of infinite areas, does not matter: the IoU of such boxes exceeds nothing.
template <class T, int kBoxes>
__device__ unsigned overlap_word(const Staged<T, kBoxes>& staged, int begin, unsigned wanted, const Box<T>& b, T share,
                                 const Bound<T>& bound) {
  if (wanted == 0) return 0;  // bounds differ between threads, and a warp often skips whole words
  unsigned word = 0;
#pragma unroll
  for (int k = 31; k >= 0; --k) {
    const AlignedBox<T>& a = staged.box[begin + k];
    const T w = fmin(a.x2, b.x2) - fmax(a.x1, b.x1), h = fmin(a.y2, b.y2) - fmax(a.y1, b.y1);
    word = word << 1 | sign_bit(fma(-doubled_width(w), h, staged.share[begin + k] + share));
  }
  word &= wanted;
  const T area_b = area(b);
  for (unsigned rest = word; rest != 0; rest &= rest - 1) {
    const int k = __ffs(rest) - 1;
    const AlignedBox<T>& a = staged.box[begin + k];
    if (!(iou(a, area(a), b, area_b) > bound.threshold)) word &= ~(1u << k);
  }
  return word;
}

}  // namespace fastrcnn
