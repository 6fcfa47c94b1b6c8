// Box regression deltas -> boxes (Girshick et al., R-CNN, 2014, appendix C), clipped to each image's own size.
#include "decode_boxes.h"
#include "threads.h"

#include <algorithm>

namespace fastrcnn {
namespace {

constexpr int64_t kLanes = 64;  // boxes whose coordinates lie side by side while they are computed

// n <= kLanes boxes. anchor_step: 1, or 0 where all are of one anchor.
template <bool CLIPPED, class T>
HOST_DEVICE void decode_lanes(const Box<T>* anchors, int64_t anchor_step, const T* deltas, const T* hw, int64_t n,
                              const DeltaCoder<T>& coder, Box<T>* out) {
  T x1[kLanes], y1[kLanes], x2[kLanes], y2[kLanes], dx[kLanes], dy[kLanes], dw[kLanes], dh[kLanes];
  for (int64_t k = 0; k < n; ++k) {
    const Box<T>& anchor = anchors[k * anchor_step];
    x1[k] = anchor.x1, y1[k] = anchor.y1, x2[k] = anchor.x2, y2[k] = anchor.y2;
    dx[k] = deltas[k * 4], dy[k] = deltas[k * 4 + 1], dw[k] = deltas[k * 4 + 2], dh[k] = deltas[k * 4 + 3];
  }
  const T height = CLIPPED ? hw[0] : T(0), width = CLIPPED ? hw[1] : T(0);
  const DeltaCoder<T> c = coder;
#pragma GCC ivdep  // omp simd keeps GCC 12 from it
  for (int64_t k = 0; k < n; ++k) {
    Box<T> box = decode(Box<T>{x1[k], y1[k], x2[k], y2[k]}, dx[k], dy[k], dw[k], dh[k], c);
    if (CLIPPED) box = clip(box, height, width);
    x1[k] = box.x1, y1[k] = box.y1, x2[k] = box.x2, y2[k] = box.y2;
  }
  for (int64_t k = 0; k < n; ++k) out[k] = {x1[k], y1[k], x2[k], y2[k]};
}

// A thread's share of the anchors. SIMD lanes run along memory: over the classes of an anchor, or over the anchors.
template <class T>
HOST_DEVICE void decode_range_body(const Box<T>* anchors, const T* deltas, const T* max_shape, int64_t first,
                                   int64_t last, int64_t per_image, int64_t classes, const DeltaCoder<T>& coder,
                                   Box<T>* out) {
  const int64_t step = classes == 1 ? 1 : 0;
  while (first < last) {
    const int64_t image = first / per_image, end = std::min(last, classes == 1 ? (image + 1) * per_image : first + 1);
    const T* hw = max_shape == nullptr ? nullptr : max_shape + image * 2;
    for (int64_t c = 0, count = (end - first) * classes; c < count; c += kLanes) {
      const int64_t n = std::min(kLanes, count - c), i = first * classes + c;
      const Box<T>* anchor = anchors + first + c * step;
      if (hw == nullptr)
        decode_lanes<false>(anchor, step, deltas + i * 4, hw, n, coder, out + i);
      else
        decode_lanes<true>(anchor, step, deltas + i * 4, hw, n, coder, out + i);
    }
    first = end;
  }
}

SIMD_CLONES void decode_range(const Box<float>* anchors, const float* deltas, const float* max_shape, int64_t first,
                              int64_t last, int64_t per_image, int64_t classes, const DeltaCoder<float>& coder,
                              Box<float>* out) {
  decode_range_body<float>(anchors, deltas, max_shape, first, last, per_image, classes, coder, out);
}
void decode_range(const Box<double>* anchors, const double* deltas, const double* max_shape, int64_t first,
                  int64_t last, int64_t per_image, int64_t classes, const DeltaCoder<double>& coder,
                  Box<double>* out) {
  decode_range_body<double>(anchors, deltas, max_shape, first, last, per_image, classes, coder, out);
}

template <class T>
Tensor run(const Tensor& anchors, const Tensor& deltas, const std::optional<Tensor>& max_shape, ScalarType dtype,
           const DeltaCoder<T>& coder) {
  const int64_t batch = anchors.size(0), n = anchors.size(1), classes = deltas.size(2) / 4;
  const Tensor a = contiguous_as(anchors, dtype), d = contiguous_as(deltas, dtype);
  std::optional<Tensor> shape;
  if (max_shape) shape = contiguous_as(*max_shape, dtype);
  Tensor out = empty_like_device(anchors, {batch, n, classes * 4}, dtype);
  const auto* a_ptr = reinterpret_cast<const Box<T>*>(a.template const_data_ptr<T>());
  auto* out_ptr = reinterpret_cast<Box<T>*>(out.template mutable_data_ptr<T>());
  const T* d_ptr = d.template const_data_ptr<T>();
  const T* s_ptr = shape ? shape->template const_data_ptr<T>() : nullptr;
  const int64_t step = 4096 / (classes > 0 ? classes : 1) + 1;
  share(batch * n, step, threads_for(batch * n * classes, 1 << 18), [&](int64_t first, int64_t last, int64_t) {
    decode_range(a_ptr, d_ptr, s_ptr, first, last, n, classes, coder, out_ptr);
  });
  return out;
}

Tensor decode_boxes(const Tensor& anchors, const Tensor& deltas, std::optional<Tensor> max_shape,
                    std::vector<double> means, std::vector<double> stds, double wh_ratio_clip, bool symmetric_clip) {
  check_decode_boxes(anchors, deltas, max_shape);
  const ScalarType dtype = coordinate_type(anchors);
  return dtype == ScalarType::Double
             ? run<double>(anchors, deltas, max_shape, dtype, make_coder<double>(means, stds, wh_ratio_clip, symmetric_clip))
             : run<float>(anchors, deltas, max_shape, dtype, make_coder<float>(means, stds, wh_ratio_clip, symmetric_clip));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrcnn, CPU, m) { m.impl("decode_boxes", TORCH_BOX(&decode_boxes)); }

}  // namespace fastrcnn
