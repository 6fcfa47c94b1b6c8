// The arithmetic of preprocess, for the CPU and CUDA kernels: which pixels of an image an output pixel reads, with
// which weights, in each of the three resize rules. Each rule rounds where its peer rounds, bit for bit.
#pragma once

#include "common.h"

#include <cmath>
#include <type_traits>

namespace fastrcnn {

enum class Resize { kOpencv, kInterpolate, kPillow };

// One image [3, H, W] in any layout, and the size it is resized to. Strides are in elements.
template <class T>
struct Picture {
  const T* data;
  int64_t channel, row, column;  // strides
  double scale_h, scale_w;       // old size over new, as the rule computes it
  int height, width, new_height, new_width, index;
};

// Values are float, or double for an image of doubles that is normalised before it is resized.
template <class T, Resize R>
using Value = std::conditional_t<R == Resize::kInterpolate && std::is_same_v<T, double>, double, float>;

// A float image holds 0..1. Adding 2^23 rounds half to even; NaN becomes 0.
HOST_DEVICE int as_byte(uint8_t v) { return v; }
HOST_DEVICE int as_byte(float v) {
  const float scaled = v * 255.0f, byte = scaled > 0.0f ? (scaled < 255.0f ? scaled : 255.0f) : 0.0f;
  return static_cast<int>((byte + 8388608.0f) - 8388608.0f);
}

template <class V>
struct Normalization {
  V mean[3], std[3];  // in the network's channel order and value range
  // Of resized bytes, and of images resized afterwards, which are normalised in the range 0..1.
  HOST_DEVICE V of_byte(int v, int c) const { return (static_cast<V>(v) - mean[c]) / std[c]; }
  HOST_DEVICE V of_unit(uint8_t v, int c) const { return (static_cast<V>(v) / V(255) - mean[c]) / std[c]; }
  HOST_DEVICE V of_unit(V v, int c) const { return (v - mean[c]) / std[c]; }
};

// What a byte stands for, in a table of [3, 256]: a pixel of the batch, or of an image that is interpolated afterwards.
template <class T, class O, Resize R>
using Entry = std::conditional_t<R == Resize::kInterpolate, Value<T, R>, O>;
template <class T, class O, Resize R>
HOST_DEVICE Entry<T, O, R> table_entry(const Normalization<Value<T, R>>& n, int i) {
  const int c = i / 256, v = i % 256;
  if constexpr (R == Resize::kInterpolate) return n.of_unit(static_cast<uint8_t>(v), c);
  return static_cast<Entry<T, O, R>>(n.of_byte(v, c));
}

// The two neighbours on one axis of a bilinear resize, and the weight of the second.
template <class W>
struct ResizeTap {
  int low, high;
  W weight;
};

// OpenCV's resize of bytes: weights of 11 bits. Columns beyond the border stand alone; rows count with both weights.
HOST_DEVICE ResizeTap<int> opencv_tap(int i, int size, double scale, bool columns) {
  const float at = static_cast<float>((i + 0.5) * scale - 0.5), low = std::floor(at);
  const int k = static_cast<int>(low);
  const bool alone = columns && (k < 0 || k >= size - 1);
  const int weight = alone ? 0 : static_cast<int>(std::rint((at - low) * 2048.0f));
  return {k < 0 ? 0 : k < size ? k : size - 1, k + 1 < size ? k + 1 : size - 1, weight};
}
HOST_DEVICE int opencv_row(int a, int b, int weight) { return (a * (2048 - weight) + b * weight) >> 4; }
HOST_DEVICE int opencv_pixel(int top, int bottom, int weight) {  // never above 255
  return ((top * (2048 - weight) >> 16) + (bottom * weight >> 16) + 2) >> 2;
}

// torch's bilinear interpolation, with the products that its CPU and CUDA builds fuse.
template <class V>
HOST_DEVICE ResizeTap<V> interpolate_tap(int i, int size, double scale) {
  const V at = std::fma(static_cast<V>(scale), static_cast<V>(i) + V(0.5), V(-0.5));
  if (at < V(0)) return {0, size > 1 ? 1 : 0, V(0)};
  const int low = static_cast<int>(at) < size ? static_cast<int>(at) : size - 1;
  return {low, low < size - 1 ? low + 1 : low, at - static_cast<V>(low)};
}
template <class V>
HOST_DEVICE V interpolate(V a, V b, V weight) {
  return std::fma(V(1) - weight, a, weight * b);
}

// Pillow's bilinear resize of bytes: a triangle as wide as the reduction, weights of 22 bits, bytes between the passes.
constexpr int kPillowBits = 22, kPillowHalf = 1 << (kPillowBits - 1);
struct Window {
  int first, count;  // pixels
  double centre, sharpness, sum;

  HOST_DEVICE double part(int k) const {
    const double away = std::fabs((first + k - centre + 0.5) * sharpness);
    return away < 1.0 ? 1.0 - away : 0.0;
  }
  HOST_DEVICE int weight(int k) const { return static_cast<int>(part(k) / sum * (1 << kPillowBits) + 0.5); }
};
HOST_DEVICE Window pillow_window(int i, int size, double scale) {
  const double support = scale > 1.0 ? scale : 1.0, centre = (i + 0.5) * scale;
  const int first = static_cast<int>(centre - support + 0.5), end = static_cast<int>(centre + support + 0.5);
  Window w{first > 0 ? first : 0, 0, centre, 1.0 / support, 0.0};
  w.count = (end < size ? end : size) - w.first;
  for (int k = 0; k < w.count; ++k) w.sum += w.part(k);
  return w;
}
// The most pixels that a window can hold.
inline int pillow_taps(double scale) { return 2 * static_cast<int>(std::ceil(scale > 1.0 ? scale : 1.0)) + 1; }
HOST_DEVICE int pillow_byte(int sum) {
  const int v = sum >> kPillowBits;
  return v < 0 ? 0 : v < 255 ? v : 255;
}

}  // namespace fastrcnn
