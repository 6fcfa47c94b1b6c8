// Deformable convolution. Channels lie innermost, so the threads of a warp read neighbouring channels of one point.
// The input's gradient has no atomic additions: the contributions of all points are sorted by the pixel they go to, and
// each pixel adds up its own in that fixed order.
#include "deform_conv2d.h"
#include "sort.cuh"

#include <torch/csrc/stable/accelerator.h>

namespace fastrcnn {
namespace {

constexpr int kThreads = 256, kWarp = 32;
constexpr int64_t kColumnBytes = 256 << 20;

inline int blocks(int64_t threads) { return static_cast<int>((threads + kThreads - 1) / kThreads); }

template <class F, int V>
struct alignas(sizeof(F) * V) Pack {
  F value[V];
};

// One thread: V neighbouring channels of one tap. `packs` = channels / V; a pack never crosses a group.
template <class T, class F, int V>
__global__ void im2col_kernel(DeformShape s, const F* input, const T* offset, const T* mask, int64_t first,
                              int64_t count, F* columns) {
  const int64_t packs = s.channels / V, i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count * s.taps() * packs) return;
  const int64_t c = i % packs * V, r = i / packs / s.taps();
  const int k = static_cast<int>(i / packs % s.taps());
  const int64_t d = c / s.offset_group_channels();
  const Corners<T> corners = deform_corners(s, offset, first + r, d, k);
  const T scale = deform_scale(s, mask, first + r, d, k);
  const F* image = input + (first + r) / s.positions() * s.pixels() * s.channels + c;
  T sum[V] = {};
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const T w = deform_weight(corners, n, scale);
    if (w == T(0)) continue;
    const Pack<F, V> p = *reinterpret_cast<const Pack<F, V>*>(image + corners.pixel[n] * s.channels);
#pragma unroll
    for (int v = 0; v < V; ++v) sum[v] += w * static_cast<T>(p.value[v]);
  }
  Pack<F, V> out;
#pragma unroll
  for (int v = 0; v < V; ++v) out.value[v] = static_cast<F>(sum[v]);
  *reinterpret_cast<Pack<F, V>*>(columns + s.column(r, k, c, count)) = out;
}

template <class T>
__device__ T warp_sum(T value) {
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

// One warp: the gradients of one point (row, offset group, tap).
template <class T, class F>
__global__ void points_kernel(DeformShape s, const F* input, const T* offset, const T* mask, const F* columns,
                              int64_t first, int64_t count, T* grad_offset, T* grad_mask) {
  const int64_t point = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  if (point >= count * s.offset_groups * s.taps()) return;  // the same for the whole warp
  const int k = static_cast<int>(point % s.taps()), lane = threadIdx.x % kWarp;
  const int64_t d = point / s.taps() % s.offset_groups, r = point / s.taps() / s.offset_groups;
  const Corners<T> corners = deform_corners(s, offset, first + r, d, k);
  const F* image = input + (first + r) / s.positions() * s.pixels() * s.channels;
  const int64_t part = s.offset_group_channels();
  T dot[4] = {};
  for (int64_t c = d * part + lane; c < (d + 1) * part; c += kWarp) {
    const T g = static_cast<T>(columns[s.column(r, k, c, count)]);
    for (int n = 0; n < 4; ++n)
      if (corners.inside[n]) dot[n] += g * static_cast<T>(image[corners.pixel[n] * s.channels + c]);
  }
  for (int n = 0; n < 4; ++n) dot[n] = warp_sum(dot[n]);
  if (lane == 0)
    deform_point_gradients(s, corners, dot, deform_scale(s, mask, first + r, d, k), first + r, d, k, grad_offset,
                           grad_mask);
}

// Four contributions a point: the bucket (image - first image, offset group, pixel) each goes to, and its weight.
// Those that do not count go to the bucket behind the last.
template <class T>
__global__ void contributions_kernel(DeformShape s, const T* offset, const T* mask, int64_t first, int64_t count,
                                     int64_t first_image, int num_buckets, int* bucket, T* weight) {
  const int64_t point = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (point >= count * s.offset_groups * s.taps()) return;
  const int k = static_cast<int>(point % s.taps());
  const int64_t d = point / s.taps() % s.offset_groups, r = first + point / s.taps() / s.offset_groups;
  const Corners<T> corners = deform_corners(s, offset, r, d, k);
  const T scale = deform_scale(s, mask, r, d, k);
  const int64_t map = ((r / s.positions() - first_image) * s.offset_groups + d) * s.pixels();
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const T w = deform_weight(corners, n, scale);
    bucket[point * 4 + n] = w == T(0) ? num_buckets : static_cast<int>(map + corners.pixel[n]);
    weight[point * 4 + n] = w;
  }
}

// The first place in the sorted `values` that holds `wanted` or more.
__device__ int64_t lower_bound(const int* values, int64_t size, int wanted) {
  int64_t low = 0, high = size;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (values[middle] < wanted) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// One warp: one bucket, lane by lane over the channels of its offset group. `order` numbers the contributions.
template <class T, class F>
__global__ void gather_kernel(DeformShape s, const int* sorted, const int64_t* order, const T* weight,
                              int64_t contributions, const F* columns, int64_t count, int64_t first_image,
                              int num_buckets, T* grad_input) {
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  if (warp >= num_buckets) return;
  const int bucket = static_cast<int>(warp), lane = threadIdx.x % kWarp;
  const int64_t begin = lower_bound(sorted, contributions, bucket);
  const int64_t end = lower_bound(sorted, contributions, bucket + 1);
  const int64_t map = bucket / s.pixels(), pixel = bucket % s.pixels(), d = map % s.offset_groups;
  const int64_t part = s.offset_group_channels();
  T* out = grad_input + ((first_image + map / s.offset_groups) * s.pixels() + pixel) * s.channels;
  for (int64_t c = d * part + lane; c < (d + 1) * part; c += kWarp) {
    T sum = out[c];  // what earlier rows added
    for (int64_t e = begin; e < end; ++e) {
      const int64_t point = order[e] / 4;
      const int k = static_cast<int>(point % s.taps());
      sum += weight[order[e]] * static_cast<T>(columns[s.column(point / s.taps() / s.offset_groups, k, c, count)]);
    }
    out[c] = sum;
  }
}

template <class T>
const T* mask_of(const DeformConv& p) {
  return p.mask ? p.mask->const_data_ptr<T>() : nullptr;
}

template <class T, class F, int V>
void launch_im2col(const DeformConv& p, int64_t first, int64_t count, Tensor& columns) {
  const int64_t threads = count * p.shape.taps() * (p.shape.channels / V);
  im2col_kernel<T, F, V><<<blocks(threads), kThreads, 0, current_stream(columns)>>>(
      p.shape, p.input.const_data_ptr<F>(), p.offset.const_data_ptr<T>(), mask_of<T>(p), first, count,
      columns.mutable_data_ptr<F>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class T, class F>
void im2col(const DeformConv& p, int64_t first, int64_t count, Tensor& columns) {
  constexpr int V = 16 / sizeof(F);
  const DeformShape& s = p.shape;
  // A slice of a channels-last tensor need not lie on 16 bytes.
  const bool aligned = reinterpret_cast<uintptr_t>(p.input.const_data_ptr<F>()) % 16 == 0;
  if (aligned && s.group_channels() % V == 0 && s.offset_group_channels() % V == 0) {
    launch_im2col<T, F, V>(p, first, count, columns);
  } else {
    launch_im2col<T, F, 1>(p, first, count, columns);
  }
}

template <class T, class F>
void col2im(const DeformConv& p, int64_t first, int64_t count, const Tensor& columns, Tensor& grad_input,
            Tensor& grad_offset, Tensor& grad_mask) {
  const DeformShape& s = p.shape;
  const T *offset = p.offset.const_data_ptr<T>(), *mask = mask_of<T>(p);
  const F* g = columns.const_data_ptr<F>();
  const cudaStream_t stream = current_stream(columns);
  const int64_t points = count * s.offset_groups * s.taps();
  points_kernel<T, F><<<blocks(points * kWarp), kThreads, 0, stream>>>(
      s, p.input.const_data_ptr<F>(), offset, mask, g, first, count, grad_offset.mutable_data_ptr<T>(),
      p.mask ? grad_mask.mutable_data_ptr<T>() : nullptr);
  STD_CUDA_KERNEL_LAUNCH_CHECK();

  const int64_t first_image = first / s.positions(), images = (first + count - 1) / s.positions() - first_image + 1;
  const int64_t num_buckets = images * s.offset_groups * s.pixels();
  CHECK_ARGUMENT(num_buckets < (int64_t{1} << 31), "input: too many pixels for one pass");
  if (num_buckets == 0) return;
  Tensor bucket = empty_like_device(columns, {points * 4}, ScalarType::Int);
  Tensor weight = empty_like_device(columns, {points * 4}, p.acc);
  contributions_kernel<T><<<blocks(points), kThreads, 0, stream>>>(
      s, offset, mask, first, count, first_image, static_cast<int>(num_buckets), bucket.mutable_data_ptr<int>(),
      weight.mutable_data_ptr<T>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  const auto [sorted, order] = stable_sort(bucket);
  gather_kernel<T, F><<<blocks(num_buckets * kWarp), kThreads, 0, stream>>>(
      s, sorted.const_data_ptr<int>(), order.const_data_ptr<int64_t>(), weight.const_data_ptr<T>(), points * 4, g, count,
      first_image, static_cast<int>(num_buckets), grad_input.mutable_data_ptr<T>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

int64_t step_of(const DeformConv& p) {
  return rows_at_once(p, kColumnBytes, p.dtype == ScalarType::Double ? 8 : p.dtype == ScalarType::Float ? 4 : 2);
}

Tensor deform_conv2d(const Tensor& input, const Tensor& offset, const Tensor& weight, std::optional<Tensor> mask,
                     std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation) {
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const DeformConv p =
      make_deform_conv(input, offset, weight, mask, stride, padding, dilation, input.scalar_type());
  return deform_forward(p, input, step_of(p), [&](int64_t first, int64_t count, Tensor& columns) {
    dispatch_features(p.dtype, [&](auto t, auto f) { im2col<decltype(t), decltype(f)>(p, first, count, columns); });
  });
}

DeformGradients deform_conv2d_backward(const Tensor& grad, const Tensor& input, const Tensor& offset,
                                       const Tensor& weight, std::optional<Tensor> mask, std::vector<int64_t> stride,
                                       std::vector<int64_t> padding, std::vector<int64_t> dilation) {
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const DeformConv p =
      make_deform_conv(input, offset, weight, mask, stride, padding, dilation, input.scalar_type());
  const auto columns_of = [&](int64_t first, int64_t count, Tensor& columns) {
    dispatch_features(p.dtype, [&](auto t, auto f) { im2col<decltype(t), decltype(f)>(p, first, count, columns); });
  };
  const auto scatter = [&](int64_t first, int64_t count, const Tensor& columns, Tensor& to_input, Tensor& to_offset,
                           Tensor& to_mask) {
    dispatch_features(p.dtype, [&](auto t, auto f) {
      col2im<decltype(t), decltype(f)>(p, first, count, columns, to_input, to_offset, to_mask);
    });
  };
  return deform_backward(p, grad, input, offset, weight, mask, step_of(p), columns_of, scatter);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrcnn, CUDA, m) {
  m.impl("deform_conv2d", TORCH_BOX(&deform_conv2d));
  m.impl("deform_conv2d_backward", TORCH_BOX(&deform_conv2d_backward));
}

}  // namespace fastrcnn
