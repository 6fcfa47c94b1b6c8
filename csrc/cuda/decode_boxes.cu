// Box regression deltas -> boxes, one thread a box. Loads are 4 bytes (8 for double): a slice of a tensor need not lie on 16.
#include "decode_boxes.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

namespace fastrcnn {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void decode_boxes_kernel(const Box<T>* anchors, const Box<T>* deltas, const T* max_shape, int64_t total,
                                    int64_t per_image, int64_t classes, DeltaCoder<T> coder, Box<T>* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= total) return;
  const Box<T> d = deltas[i];  // the four deltas
  const T numbers[4] = {d.x1, d.y1, d.x2, d.y2};
  const T* hw = max_shape == nullptr ? nullptr : max_shape + i / classes / per_image * 2;
  out[i] = decode_one(anchors[i / classes], numbers, hw, coder);
}

template <class T>
Tensor run(const Tensor& anchors, const Tensor& deltas, const std::optional<Tensor>& max_shape, ScalarType dtype,
           const DeltaCoder<T>& coder) {
  const torch::stable::accelerator::DeviceGuard guard(anchors.get_device_index());
  const int64_t batch = anchors.size(0), n = anchors.size(1), classes = deltas.size(2) / 4, total = batch * n * classes;
  const Tensor a = contiguous_as(anchors, dtype), d = contiguous_as(deltas, dtype);
  std::optional<Tensor> shape;
  if (max_shape) shape = contiguous_as(*max_shape, dtype);
  Tensor out = empty_like_device(anchors, {batch, n, classes * 4}, dtype);
  if (total == 0) return out;
  decode_boxes_kernel<T><<<(total + kThreads - 1) / kThreads, kThreads, 0, current_stream(anchors)>>>(
      reinterpret_cast<const Box<T>*>(a.template const_data_ptr<T>()),
      reinterpret_cast<const Box<T>*>(d.template const_data_ptr<T>()),
      shape ? shape->template const_data_ptr<T>() : nullptr, total, n, classes, coder,
      reinterpret_cast<Box<T>*>(out.template mutable_data_ptr<T>()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

Tensor decode_boxes(const Tensor& anchors, const Tensor& deltas, std::optional<Tensor> max_shape,
                    std::vector<double> means, std::vector<double> stds, double wh_ratio_clip, bool symmetric_clip) {
  check_decode_boxes(anchors, deltas, max_shape);
  const ScalarType dtype = coordinate_type(anchors);
  if (dtype == ScalarType::Double)
    return run<double>(anchors, deltas, max_shape, dtype, make_coder<double>(means, stds, wh_ratio_clip, symmetric_clip));
  return run<float>(anchors, deltas, max_shape, dtype, make_coder<float>(means, stds, wh_ratio_clip, symmetric_clip));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrcnn, CUDA, m) { m.impl("decode_boxes", TORCH_BOX(&decode_boxes)); }

}  // namespace fastrcnn
