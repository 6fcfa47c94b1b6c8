// Deformable convolution: threads gather the columns of some rows, channels innermost, and torch multiplies them.
#include "deform_conv2d.h"

#include <numeric>

namespace fastrcnn {
namespace {

// out[c] = sum over the taps of weight * pixel[c]
template <class T, class F>
HOST_DEVICE void blend(const F* image, const Taps<T>& t, int64_t stride, int64_t channels, F* out) {
  const F* p[4];
  for (int n = 0; n < 4; ++n) p[n] = image + t.pixel[n] * stride;
  const T *w = t.weight;
  if (t.count == 4) {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c)
      out[c] = static_cast<F>((w[0] * static_cast<T>(p[0][c]) + w[1] * static_cast<T>(p[1][c])) +
                              (w[2] * static_cast<T>(p[2][c]) + w[3] * static_cast<T>(p[3][c])));
  } else if (t.count == 2) {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c)
      out[c] = static_cast<F>(w[0] * static_cast<T>(p[0][c]) + w[1] * static_cast<T>(p[1][c]));
  } else if (t.count == 1) {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) out[c] = static_cast<F>(w[0] * static_cast<T>(p[0][c]));
  } else {  // 3: two weights of which the product with the third rounds to 0
    for (int64_t c = 0; c < channels; ++c) {
      T sum = T(0);
      for (int n = 0; n < t.count; ++n) sum += w[n] * static_cast<T>(p[n][c]);
      out[c] = static_cast<F>(sum);
    }
  }
}

// Rows [begin, end) of the `count` that start at row `first`.
template <class T, class F>
HOST_DEVICE void im2col_body(const DeformShape& s, const F* input, const T* offset, const T* mask, int64_t first,
                             int64_t begin, int64_t end, int64_t count, F* columns) {
  const int part = s.offset_group_channels, run = std::gcd(part, s.group_channels);
  for (int64_t r = begin; r < end; ++r) {
    const DeformRow row = s.row(first + r);
    const F* image = input + row.image * s.pixels * s.channels;
    for (int d = 0; d < s.offset_groups; ++d) {
      for (int k = 0; k < s.taps; ++k) {
        const Taps<T> taps = deform_taps(s, offset, mask, row, d, k);
        for (int c = d * part; c < (d + 1) * part; c += run)
          blend(image + c, taps, s.channels, run, columns + s.column(r, k, c, count));
      }
    }
  }
}

// target_clones does not reach into templates: one loop for each arithmetic type and feature type.
#define DEFINE_LOOP(CLONES, T, F)                                                                                     \
  CLONES void im2col_rows(const DeformShape& s, const F* input, const T* offset, const T* mask, int64_t first,        \
                          int64_t begin, int64_t end, int64_t count, F* columns) {                                    \
    im2col_body<T, F>(s, input, offset, mask, first, begin, end, count, columns);                                     \
  }
#define NO_CLONES
DEFINE_LOOP(SIMD_CLONES, float, float)
DEFINE_LOOP(SIMD_CLONES, float, BFloat16)
DEFINE_LOOP(SIMD_CLONES, float, Half)
DEFINE_LOOP(NO_CLONES, double, double)
#undef DEFINE_LOOP

template <class T, class F>
void im2col(const DeformConv& p, int64_t first, int64_t count, Tensor& columns) {
  const F* input = p.input.const_data_ptr<F>();
  const T* offset = p.offset.const_data_ptr<T>();
  const T* mask = p.mask ? p.mask->const_data_ptr<T>() : nullptr;
  F* out = columns.mutable_data_ptr<F>();
  torch::stable::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
    im2col_rows(p.shape, input, offset, mask, first, begin, end, count, out);
  });
}

// Whether oneDNN multiplies in this dtype; without that torch's product is many times slower than in float32.
bool multiplies(const char* question) {
  StableIValue answer[1] = {};
  if (torch_call_dispatcher(question, "", answer, TORCH_ABI_VERSION) != AOTI_TORCH_SUCCESS) return false;
  return torch::stable::detail::to<bool>(answer[0]);
}

Tensor deform_conv2d(const Tensor& input, const Tensor& offset, const Tensor& weight, std::optional<Tensor> mask,
                     std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation) {
  const ScalarType dtype = deform_cpu_dtype(input.scalar_type());
  const DeformConv p = make_deform_conv(input, offset, weight, mask, stride, padding, dilation, dtype);
  return deform_forward(p, input, rows_at_once(p, kCpuColumnBytes, dtype == ScalarType::Double ? 8 : 4),
                        [&](int64_t first, int64_t count, Tensor& columns) {
                          deform_im2col_cpu(p, first, count, columns);
                        });
}

}  // namespace

ScalarType deform_cpu_dtype(ScalarType input) {
  if (input == ScalarType::Double || input == ScalarType::Float) return input;
  CHECK_ARGUMENT(input == ScalarType::BFloat16 || input == ScalarType::Half,
                 "input must be float64, float32, float16 or bfloat16");
  static const bool bfloat16 = multiplies("mkldnn::_is_mkldnn_bf16_supported");
  static const bool half = multiplies("mkldnn::_is_mkldnn_fp16_supported");
  return (input == ScalarType::Half ? half : bfloat16) ? input : ScalarType::Float;
}

void deform_im2col_cpu(const DeformConv& p, int64_t first, int64_t count, Tensor& columns) {
  dispatch_features(p.dtype, [&](auto t, auto f) { im2col<decltype(t), decltype(f)>(p, first, count, columns); });
}

STABLE_TORCH_LIBRARY_IMPL(fastrcnn, CPU, m) { m.impl("deform_conv2d", TORCH_BOX(&deform_conv2d)); }

}  // namespace fastrcnn
