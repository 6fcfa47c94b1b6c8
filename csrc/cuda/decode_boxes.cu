// Box regression deltas -> boxes, one thread a box. Memory limits it: 16-byte loads and stores where the tensors lie on
// 16 bytes (a slice need not), and deltas of low precision are read as they are, without a pass that converts them.
#include "decode_boxes.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

namespace fastrcnn {
namespace {

constexpr int kThreads = 256;

// The four numbers of a box: x1, y1, x2, y2 or dx, dy, dw, dh.
template <class D, bool kAligned>
struct alignas(!kAligned ? sizeof(D) : sizeof(D) < 4 ? 4 * sizeof(D) : 16) Four {
  D value[4];
};

template <class T, class D, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    decode_boxes_kernel(const Four<T, kAligned>* anchors, const Four<D, kAligned>* deltas, const T* max_shape,
                        int64_t total, int64_t per_image, int64_t classes, DeltaCoder<T> coder, Four<T, true>* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= total) return;
  const int64_t row = classes == 1 ? i : i / classes;
  const Four<D, kAligned> d = deltas[i];
  const Four<T, kAligned> a = anchors[row];
  const T numbers[4] = {static_cast<T>(d.value[0]), static_cast<T>(d.value[1]), static_cast<T>(d.value[2]),
                        static_cast<T>(d.value[3])};
  const T* hw = max_shape == nullptr ? nullptr : max_shape + row / per_image * 2;
  const Box<T> box = decode_one(Box<T>{a.value[0], a.value[1], a.value[2], a.value[3]}, numbers, hw, coder);
  out[i] = {box.x1, box.y1, box.x2, box.y2};
}

template <class T, class D, bool kAligned>
void launch(const Tensor& anchors, const Tensor& deltas, const T* max_shape, int64_t total, const DeltaCoder<T>& coder,
            Tensor& out) {
  const int64_t per_image = anchors.size(1), classes = deltas.size(2) / 4;
  decode_boxes_kernel<T, D, kAligned><<<(total + kThreads - 1) / kThreads, kThreads, 0, current_stream(out)>>>(
      reinterpret_cast<const Four<T, kAligned>*>(anchors.const_data_ptr<T>()),
      reinterpret_cast<const Four<D, kAligned>*>(deltas.const_data_ptr<D>()), max_shape, total, per_image, classes,
      coder, reinterpret_cast<Four<T, true>*>(out.mutable_data_ptr<T>()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class T, class D>
Tensor run(const Tensor& anchors, const Tensor& deltas, const std::optional<Tensor>& max_shape, ScalarType dtype,
           ScalarType delta_dtype, const DeltaCoder<T>& coder) {
  const int64_t batch = anchors.size(0), n = anchors.size(1), columns = deltas.size(2);
  const int64_t total = batch * n * (columns / 4);
  Tensor out = empty_like_device(anchors, {batch, n, columns}, dtype);
  if (total == 0) return out;
  const Tensor a = contiguous_as(anchors, dtype), d = contiguous_as(deltas, delta_dtype);
  std::optional<Tensor> shape;
  if (max_shape) shape = contiguous_as(*max_shape, dtype);
  const T* hw = shape ? shape->template const_data_ptr<T>() : nullptr;
  const auto misplaced = reinterpret_cast<uintptr_t>(a.template const_data_ptr<T>()) |
                         reinterpret_cast<uintptr_t>(d.template const_data_ptr<D>());
  if (misplaced % 16 == 0) {
    launch<T, D, true>(a, d, hw, total, coder, out);
  } else {
    launch<T, D, false>(a, d, hw, total, coder, out);
  }
  return out;
}

Tensor decode_boxes(const Tensor& anchors, const Tensor& deltas, std::optional<Tensor> max_shape,
                    std::vector<double> means, std::vector<double> stds, double wh_ratio_clip, bool symmetric_clip) {
  const torch::stable::accelerator::DeviceGuard guard(anchors.get_device_index());
  check_decode_boxes(anchors, deltas, max_shape);
  const ScalarType dtype = coordinate_type(anchors), own = deltas.scalar_type();
  // Deltas of the other width become what the boxes are.
  const ScalarType delta_dtype = dtype == ScalarType::Double || own == ScalarType::Double ? dtype : own;
  Tensor out;
  dispatch_features(delta_dtype, [&](auto t, auto d) {
    using T = decltype(t);
    out = run<T, decltype(d)>(anchors, deltas, max_shape, dtype, delta_dtype,
                              make_coder<T>(means, stds, wh_ratio_clip, symmetric_clip));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrcnn, CUDA, m) { m.impl("decode_boxes", TORCH_BOX(&decode_boxes)); }

}  // namespace fastrcnn
