// Box arithmetic, one source for CPU and CUDA kernels. Boxes are xyxy in absolute pixels.
#pragma once

#include "common.h"

#include <cmath>
#include <cstring>
#include <limits>

namespace fastrcnn {

template <class T>
struct Box {
  T x1, y1, x2, y2;
};

// A box that one or two instructions load. Boxes that come from outside need not lie on 16 bytes.
template <class T>
struct alignas(16) AlignedBox : Box<T> {};

// Unsigned integers that sort as the floats do, NaN last (below -inf).
HOST_DEVICE uint32_t sortable(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  const uint32_t key = bits >> 31 ? ~bits : bits | uint32_t{1} << 31;
  return x == x ? key : 0u;
}
HOST_DEVICE uint64_t sortable(double x) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof(bits));
  const uint64_t key = bits >> 63 ? ~bits : bits | uint64_t{1} << 63;
  return x == x ? key : 0u;
}

// The comparisons are written as (a < b ? b : a) so that a NaN coordinate takes the same branch on every device.
template <class T>
HOST_DEVICE T max_(T a, T b) {
  return a < b ? b : a;
}
template <class T>
HOST_DEVICE T min_(T a, T b) {
  return b < a ? b : a;
}

template <class T>
HOST_DEVICE T area(const Box<T>& b) {
  return (b.x2 - b.x1) * (b.y2 - b.y1);
}

template <class T>
HOST_DEVICE T intersection(const Box<T>& a, const Box<T>& b) {
  const T w = max_(T(0), min_(a.x2, b.x2) - max_(a.x1, b.x1));
  const T h = max_(T(0), min_(a.y2, b.y2) - max_(a.y1, b.y1));
  return w * h;
}

// NaN (0 / 0) for two empty boxes: NMS compares it with a threshold, which is then false.
template <class T>
HOST_DEVICE T iou(const Box<T>& a, T area_a, const Box<T>& b, T area_b) {
  const T inter = intersection(a, b);
  return inter / (area_a + area_b - inter);
}

// exp in plain arithmetic (2^n times a polynomial on [-ln2/2, ln2/2], about 1 ulp off), so that loops vectorise and CPU
// and CUDA give the same bits. Saturates at exp(-87.3) and exp(88.3), both normal numbers; NaN stays NaN.
HOST_DEVICE float exp_(float x) {
  const float clamped = x < -87.3f ? -87.3f : (x > 88.3f ? 88.3f : x);
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds to the nearest integer
  const float n = (clamped * 1.44269504f + magic) - magic;
  const float r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // NaN would make the conversion to int undefined.
  const int32_t e = static_cast<int32_t>(n == n ? n : 0.0f) + 127;
  const uint32_t bits = static_cast<uint32_t>(e) << 23;
  float scale;
  memcpy(&scale, &bits, sizeof(scale));
  return x == x ? p * scale : x;
}
HOST_DEVICE double exp_(double x) { return exp(x); }

template <class T>
HOST_DEVICE T sigmoid(T x) {
  return T(1) / (T(1) + exp_(-x));
}

template <class T>
struct DeltaCoder {
  T means[4], stds[4];
  T max_dwh;      // |log(wh_ratio_clip)|
  T min_dwh;      // -max_dwh (MMDetection), or -inf (torchvision, Detectron2)
};

template <class T>
inline DeltaCoder<T> make_coder(const std::vector<double>& means, const std::vector<double>& stds, double wh_ratio_clip,
                                bool symmetric_clip) {
  CHECK_ARGUMENT(means.size() == 4 && stds.size() == 4, "means and stds must hold four numbers each");
  DeltaCoder<T> coder;
  for (int i = 0; i < 4; ++i) {
    coder.means[i] = static_cast<T>(means[i]);
    coder.stds[i] = static_cast<T>(stds[i]);
  }
  coder.max_dwh = static_cast<T>(std::fabs(std::log(wh_ratio_clip)));
  coder.min_dwh = symmetric_clip ? -coder.max_dwh : -std::numeric_limits<T>::infinity();
  return coder;
}

// (dx, dy, dw, dh) -> box: the centre moves by (dx, dy) anchor sizes, the size grows by exp(dw), exp(dh).
template <class T>
HOST_DEVICE Box<T> decode(const Box<T>& a, T dx, T dy, T dw, T dh, const DeltaCoder<T>& c) {
  dx = dx * c.stds[0] + c.means[0];
  dy = dy * c.stds[1] + c.means[1];
  dw = min_(max_(dw * c.stds[2] + c.means[2], c.min_dwh), c.max_dwh);
  dh = min_(max_(dh * c.stds[3] + c.means[3], c.min_dwh), c.max_dwh);
  const T w = a.x2 - a.x1, h = a.y2 - a.y1;
  const T x = (a.x1 + a.x2) * T(0.5) + w * dx, y = (a.y1 + a.y2) * T(0.5) + h * dy;
  const T half_w = w * exp_(dw) * T(0.5), half_h = h * exp_(dh) * T(0.5);
  return {x - half_w, y - half_h, x + half_w, y + half_h};
}

// v in [0, limit]; NaN where either is, so that a size that is no number shows.
template <class T>
HOST_DEVICE T clip(T v, T limit) {
  return limit == limit ? min_(max_(v, T(0)), limit) : limit;
}
template <class T>
HOST_DEVICE Box<T> clip(const Box<T>& b, T height, T width) {
  return {clip(b.x1, width), clip(b.y1, height), clip(b.x2, width), clip(b.y2, height)};
}

}  // namespace fastrcnn
