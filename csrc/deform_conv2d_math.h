// Deformable convolution arithmetic (Dai et al., 2017; Zhu et al., 2019), one source for CPU and CUDA kernels.
//
// Kernel tap k = i * kernel_w + j of output position (p, q) reads its offset group's channels at
//   y = p * stride_h - padding_h + i * dilation_h + offset_y,   x = q * stride_w - padding_w + j * dilation_w + offset_x
// bilinearly, with zeros outside the map. The input is [B, H, W, C], channels innermost: one point serves a whole run of
// channels. Columns are [groups, rows, taps, C / groups], a row being one output position of one image.
#pragma once

#include "common.h"

#include <cmath>

namespace fastrcnn {

// Where a row stands: its image, and its position (y, x) on the output map.
struct DeformRow {
  int64_t image;
  int position, y, x;
};

struct DeformShape {
  int64_t batch, channels;
  int groups, offset_groups;
  int height, width, out_h, out_w, kernel_h, kernel_w;
  int stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  int taps, pixels, positions;                // of the kernel; of an input and of an output map
  int group_channels, offset_group_channels;  // channels / groups, channels / offset_groups

  HOST_DEVICE int64_t rows() const { return batch * positions; }
  HOST_DEVICE DeformRow row(int64_t r) const {
    const int position = static_cast<int>(r % positions);
    return {r / positions, position, position / out_w, position % out_w};
  }
  // Of the column of channel c and tap k in row r, where the columns hold `count` rows. I: int64_t, or int where it fits.
  template <class I>
  HOST_DEVICE I column(I r, int k, int c, I count) const {
    const int g = c / group_channels;
    return ((g * count + r) * taps + k) * group_channels + (c - g * group_channels);
  }
  // Of the mask of tap k of offset group d of an image; the two offsets are plane 2 * index and the next one.
  HOST_DEVICE int64_t plane(int64_t image, int d, int k) const { return (image * offset_groups + d) * taps + k; }
};

// The four pixels around a point: (low y, low x), (low y, high x), (high y, low x), (high y, high x).
template <class T>
struct Corners {
  T fy, fx;         // the point's distance from the low y and the low x
  int pixel[4];     // y * width + x; 0 where outside
  bool inside[4];

  HOST_DEVICE T weight(int i) const { return (i & 2 ? fy : T(1) - fy) * (i & 1 ? fx : T(1) - fx); }
  HOST_DEVICE T slope_y(int i) const { return (i & 2 ? T(1) : T(-1)) * (i & 1 ? fx : T(1) - fx); }
  HOST_DEVICE T slope_x(int i) const { return (i & 1 ? T(1) : T(-1)) * (i & 2 ? fy : T(1) - fy); }
};

// Where tap k of offset group d reads for row r. No corner lies inside for a point outside [-1, height) x [-1, width):
// written as !(in range) so that a NaN is outside, too. At -1 the value is 0 but the slope is that of the border.
template <class T>
HOST_DEVICE Corners<T> deform_corners(const DeformShape& s, const T* offset, const DeformRow& r, int d, int k) {
  const int64_t at = 2 * s.plane(r.image, d, k) * s.positions + r.position;
  const int i = k / s.kernel_w, j = k - i * s.kernel_w;
  const T y = static_cast<T>(r.y * s.stride_h - s.padding_h + i * s.dilation_h) + offset[at];
  const T x = static_cast<T>(r.x * s.stride_w - s.padding_w + j * s.dilation_w) + offset[at + s.positions];
  Corners<T> c = {};
  if (!(y >= T(-1) && y < static_cast<T>(s.height) && x >= T(-1) && x < static_cast<T>(s.width))) return c;
  const T low_y = std::floor(y), low_x = std::floor(x);
  c.fy = y - low_y;
  c.fx = x - low_x;
  for (int n = 0; n < 4; ++n) {
    const int row = static_cast<int>(low_y) + (n >> 1), column = static_cast<int>(low_x) + (n & 1);
    c.inside[n] = row >= 0 && row < s.height && column >= 0 && column < s.width;
    c.pixel[n] = c.inside[n] ? row * s.width + column : 0;
  }
  return c;
}

// The pixels that count, with their weights. Those of weight 0 are not read: four become one while offsets are whole, as
// they are when training starts.
template <class T>
struct Taps {
  int count;
  int pixel[4];
  T weight[4];
};

template <class T>
HOST_DEVICE T deform_scale(const DeformShape& s, const T* mask, const DeformRow& r, int d, int k) {
  return mask == nullptr ? T(1) : mask[s.plane(r.image, d, k) * s.positions + r.position];
}

// What corner n adds with; 0 where outside.
template <class T>
HOST_DEVICE T deform_weight(const Corners<T>& c, int n, T scale) {
  return c.inside[n] ? c.weight(n) * scale : T(0);
}

template <class T>
HOST_DEVICE Taps<T> deform_taps(const DeformShape& s, const T* offset, const T* mask, const DeformRow& r, int d, int k) {
  const Corners<T> c = deform_corners(s, offset, r, d, k);
  const T scale = deform_scale(s, mask, r, d, k);
  Taps<T> taps = {};
  for (int n = 0; n < 4; ++n) {
    const T w = deform_weight(c, n, scale);
    if (w == T(0)) continue;
    taps.pixel[taps.count] = c.pixel[n];
    taps.weight[taps.count++] = w;
  }
  return taps;
}

// Gradients of one point from dot[n] = sum over channels of (column gradient * corner n).
template <class T>
HOST_DEVICE void deform_point_gradients(const DeformShape& s, const Corners<T>& c, const T* dot, T scale,
                                        const DeformRow& r, int d, int k, T* grad_offset, T* grad_mask) {
  T value = T(0), along_y = T(0), along_x = T(0);
  for (int n = 0; n < 4; ++n) {
    if (!c.inside[n]) continue;
    value += c.weight(n) * dot[n];
    along_y += c.slope_y(n) * dot[n];
    along_x += c.slope_x(n) * dot[n];
  }
  const int64_t plane = s.plane(r.image, d, k);
  grad_offset[2 * plane * s.positions + r.position] = along_y * scale;
  grad_offset[(2 * plane + 1) * s.positions + r.position] = along_x * scale;
  if (grad_mask != nullptr) grad_mask[plane * s.positions + r.position] = value;
}

}  // namespace fastrcnn
