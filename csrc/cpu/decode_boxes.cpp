// Box regression deltas -> boxes (Girshick et al., R-CNN, 2014, appendix C), clipped to each image's own size.
#include "decode_boxes.h"
#include "threads.h"

#include <algorithm>

namespace fastrcnn {
namespace {

// A thread's share of the anchors. SIMD lanes run along memory: over the classes of an anchor, or over the anchors.
template <class T>
HOST_DEVICE void decode_range_body(const Box<T>* anchors, const T* deltas, const T* max_shape, int64_t first,
                                   int64_t last, int64_t per_image, int64_t classes, const DeltaCoder<T>& coder,
                                   Box<T>* out) {
  while (first < last) {
    const int64_t image = first / per_image, end = std::min(last, (image + 1) * per_image);
    const T* hw = max_shape == nullptr ? nullptr : max_shape + image * 2;
    if (classes == 1) {
#pragma omp simd
      for (int64_t i = first; i < end; ++i) out[i] = decode_one(anchors[i], deltas + i * 4, hw, coder);
    } else {
      for (int64_t i = first; i < end; ++i) {
        const Box<T> anchor = anchors[i];
#pragma omp simd
        for (int64_t c = i * classes; c < (i + 1) * classes; ++c)
          out[c] = decode_one(anchor, deltas + c * 4, hw, coder);
      }
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
