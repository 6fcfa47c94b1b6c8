// What the CPU and CUDA kernels of decode_boxes share: one box's arithmetic, and the check of the arguments.
#pragma once

#include "box_math.h"

namespace fastrcnn {

// One anchor and its four deltas; hw is the image's (height, width), or null for no clipping.
template <class T>
HOST_DEVICE Box<T> decode_one(const Box<T>& anchor, const T* d, const T* hw, const DeltaCoder<T>& coder) {
  const Box<T> b = decode(anchor, d[0], d[1], d[2], d[3], coder);
  return hw == nullptr ? b : clip(b, hw[0], hw[1]);
}

// anchors [B, N, 4], deltas [B, N, 4 * C], max_shape [B, 2]
inline void check_decode_boxes(const Tensor& anchors, const Tensor& deltas, const std::optional<Tensor>& max_shape) {
  const int64_t batch = anchors.size(0), n = anchors.size(1), columns = deltas.size(2);
  CHECK_SHAPE(anchors, batch, n, 4);
  CHECK_SHAPE(deltas, batch, n, columns);
  CHECK_ARGUMENT(columns % 4 == 0, "deltas must have 4 columns a class, got ", columns);
  if (max_shape) CHECK_SHAPE(*max_shape, batch, 2);
}

}  // namespace fastrcnn
