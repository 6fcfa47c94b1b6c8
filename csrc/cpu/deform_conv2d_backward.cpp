// Gradients of deformable convolution. Deterministic: for the input, threads share the channels and every gradient is
// summed in row order; for offsets and masks each point has one owner.
#include "deform_conv2d.h"

#include <numeric>

namespace fastrcnn {
namespace {

// dot[n] += sum over channels of column[c] * corner n [c]
template <class T, class F>
HOST_DEVICE void dot_corners(const F* image, const int* pixel, int64_t stride, const F* column, int64_t channels,
                             T* dot) {
  const F *p0 = image + pixel[0] * stride, *p1 = image + pixel[1] * stride;
  const F *p2 = image + pixel[2] * stride, *p3 = image + pixel[3] * stride;
  T d0 = T(0), d1 = T(0), d2 = T(0), d3 = T(0);
#pragma omp simd reduction(+ : d0, d1, d2, d3)
  for (int64_t c = 0; c < channels; ++c) {
    const T g = static_cast<T>(column[c]);
    d0 += g * static_cast<T>(p0[c]);
    d1 += g * static_cast<T>(p1[c]);
    d2 += g * static_cast<T>(p2[c]);
    d3 += g * static_cast<T>(p3[c]);
  }
  dot[0] += d0, dot[1] += d1, dot[2] += d2, dot[3] += d3;
}

// Rows [begin, end) of the `count` that start at row `first`: gradients of their offsets and masks.
template <class T, class F>
HOST_DEVICE void points_body(const DeformShape& s, const F* input, const T* offset, const T* mask, const F* columns,
                             int64_t first, int64_t begin, int64_t end, int64_t count, T* grad_offset, T* grad_mask) {
  const int part = s.offset_group_channels, run = std::gcd(part, s.group_channels);
  for (int64_t r = begin; r < end; ++r) {
    const DeformRow row = s.row(first + r);
    const F* image = input + row.image * s.pixels * s.channels;
    for (int d = 0; d < s.offset_groups; ++d) {
      for (int k = 0; k < s.taps; ++k) {
        const Corners<T> corners = deform_corners(s, offset, row, d, k);
        if (!(corners.inside[0] || corners.inside[1] || corners.inside[2] || corners.inside[3])) continue;
        T dot[4] = {};
        for (int c = d * part; c < (d + 1) * part; c += run)
          dot_corners(image + c, corners.pixel, s.channels, columns + s.column(r, k, c, count), run, dot);
        const T scale = deform_scale(s, mask, row, d, k);
        deform_point_gradients(s, corners, dot, scale, row, d, k, grad_offset, grad_mask);
      }
    }
  }
}

// Channels [c0, c1) of the input's gradient, from all rows.
template <class T, class F>
HOST_DEVICE void scatter_body(const DeformShape& s, const T* offset, const T* mask, const F* columns, int64_t first,
                              int64_t count, int64_t c0, int64_t c1, T* grad_input) {
  const int part = s.offset_group_channels, run = std::gcd(part, s.group_channels);
  for (int64_t r = 0; r < count; ++r) {
    const DeformRow row = s.row(first + r);
    T* image = grad_input + row.image * s.pixels * s.channels;
    for (int64_t d = c0 / part; d * part < c1; ++d) {
      for (int k = 0; k < s.taps; ++k) {
        const Taps<T> taps = deform_taps(s, offset, mask, row, d, k);
        const int64_t last = std::min(c1, (d + 1) * part);
        int64_t next = 0;
        for (int64_t c = std::max(c0, d * part); c < last; c = next) {
          next = std::min(last, (c / run + 1) * run);
          const F* g = columns + s.column(r, k, c, count);
          for (int n = 0; n < taps.count; ++n) {
            T* at = image + taps.pixel[n] * s.channels + c;
            const T w = taps.weight[n];
#pragma omp simd
            for (int64_t i = 0; i < next - c; ++i) at[i] += w * static_cast<T>(g[i]);
          }
        }
      }
    }
  }
}

// target_clones does not reach into templates: one set of loops for each arithmetic type and feature type.
#define DEFINE_LOOPS(CLONES, T, F)                                                                                    \
  CLONES void points(const DeformShape& s, const F* input, const T* offset, const T* mask, const F* columns,          \
                     int64_t first, int64_t begin, int64_t end, int64_t count, T* grad_offset, T* grad_mask) {        \
    points_body<T, F>(s, input, offset, mask, columns, first, begin, end, count, grad_offset, grad_mask);             \
  }                                                                                                                   \
  CLONES void scatter(const DeformShape& s, const T* offset, const T* mask, const F* columns, int64_t first,          \
                      int64_t count, int64_t c0, int64_t c1, T* grad_input) {                                         \
    scatter_body<T, F>(s, offset, mask, columns, first, count, c0, c1, grad_input);                                   \
  }
#define NO_CLONES
DEFINE_LOOPS(SIMD_CLONES, float, float)
DEFINE_LOOPS(SIMD_CLONES, float, BFloat16)
DEFINE_LOOPS(SIMD_CLONES, float, Half)
DEFINE_LOOPS(NO_CLONES, double, double)
#undef DEFINE_LOOPS

template <class T, class F>
void col2im(const DeformConv& p, int64_t first, int64_t count, const Tensor& columns, Tensor& grad_input,
            Tensor& grad_offset, Tensor& grad_mask) {
  const DeformShape& s = p.shape;
  const F *input = p.input.const_data_ptr<F>(), *g = columns.const_data_ptr<F>();
  const T* offset = p.offset.const_data_ptr<T>();
  const T* mask = p.mask ? p.mask->const_data_ptr<T>() : nullptr;
  T *to_input = grad_input.mutable_data_ptr<T>(), *to_offset = grad_offset.mutable_data_ptr<T>();
  T* to_mask = p.mask ? grad_mask.mutable_data_ptr<T>() : nullptr;
  torch::stable::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
    points(s, input, offset, mask, g, first, begin, end, count, to_offset, to_mask);
  });
  const int64_t share = std::max<int64_t>(16, (s.channels / torch::stable::get_num_threads() + 15) / 16 * 16);
  torch::stable::parallel_for(0, (s.channels + share - 1) / share, 1, [&](int64_t begin, int64_t end) {
    scatter(s, offset, mask, g, first, count, begin * share, std::min(s.channels, end * share), to_input);
  });
}

DeformGradients deform_conv2d_backward(const Tensor& grad, const Tensor& input, const Tensor& offset,
                                       const Tensor& weight, std::optional<Tensor> mask, std::vector<int64_t> stride,
                                       std::vector<int64_t> padding, std::vector<int64_t> dilation) {
  const ScalarType dtype = deform_cpu_dtype(input.scalar_type());
  const DeformConv p = make_deform_conv(input, offset, weight, mask, stride, padding, dilation, dtype);
  const auto im2col = [&](int64_t first, int64_t count, Tensor& columns) {
    deform_im2col_cpu(p, first, count, columns);
  };
  const auto scatter = [&](int64_t first, int64_t count, const Tensor& columns, Tensor& to_input, Tensor& to_offset,
                           Tensor& to_mask) {
    dispatch_features(dtype, [&](auto t, auto f) {
      col2im<decltype(t), decltype(f)>(p, first, count, columns, to_input, to_offset, to_mask);
    });
  };
  const int64_t step = rows_at_once(p, kCpuColumnBytes, dtype == ScalarType::Double ? 8 : 4);
  return deform_backward(p, grad, input, offset, weight, mask, step, im2col, scatter);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrcnn, CPU, m) {
  m.impl("deform_conv2d_backward", TORCH_BOX(&deform_conv2d_backward));
}

}  // namespace fastrcnn
