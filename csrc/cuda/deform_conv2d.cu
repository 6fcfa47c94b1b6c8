// Deformable convolution. Channels lie innermost, so the threads of a warp read neighbouring channels of one point.
// The input's gradient has no atomic additions: the contributions of all points are sorted by the pixel they go to, and
// each pixel adds up its own in that fixed order.
#include "deform_conv2d.h"
#include "sort.cuh"

#include <torch/csrc/stable/accelerator.h>

#include <type_traits>

namespace fastrcnn {
namespace {

constexpr int kThreads = 256, kWarp = 32, kWarps = kThreads / kWarp;
constexpr int64_t kColumnBytes = 256 << 20;
// What sorting passes through memory for one contribution (its bucket, weight and place, before and after), and how much
// of that one pass may take: with few channels there are far more contributions than columns.
constexpr int64_t kContributionBytes = 32, kSortedBytes = 1 << 30;

// Blocks for `items`, of which each takes `per_block`.
inline unsigned blocks(int64_t items, int per_block) {
  CHECK_ARGUMENT(items < int64_t{1} << 31, "weight: kh * kw * C is too large for one pass");
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

template <class F, int V>
struct alignas(sizeof(F) * V) Pack {
  F value[V];
};

// The rows of one pass: how many, and where the first stands.
struct Rows {
  unsigned count, position;
  int64_t image;
};

Rows make_rows(const DeformShape& s, int64_t first, int64_t count) {
  const DeformRow row = s.row(first);
  return {static_cast<unsigned>(count), static_cast<unsigned>(row.position), row.image};
}

// Point i of a pass: offset group d of tap k in row r, d counting fastest. All its channels share the four corners.
struct Point {
  int r, k, d;
  DeformRow row;
};

__device__ __forceinline__ Point point_of(const DeformShape& s, const Rows& rows, unsigned i) {
  const unsigned tap = i / s.offset_groups, r = tap / s.taps;
  const unsigned at = rows.position + r, image = at / s.positions, position = at - image * s.positions;
  const unsigned y = position / s.out_w, x = position - y * s.out_w;
  return {static_cast<int>(r), static_cast<int>(tap - r * s.taps), static_cast<int>(i - tap * s.offset_groups),
          {rows.image + image, static_cast<int>(position), static_cast<int>(y), static_cast<int>(x)}};
}

__device__ __forceinline__ unsigned num_points(const DeformShape& s, const Rows& rows) {
  return rows.count * s.taps * s.offset_groups;
}

// 1 << lane_bits threads: one point, V neighbouring channels each at a time. A pack never crosses a group.
template <class T, class F, int V>
__global__ void __launch_bounds__(kThreads)
im2col_kernel(DeformShape s, Rows rows, const F* input, const T* offset, const T* mask, int lane_bits, F* columns) {
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  if (i >> lane_bits >= num_points(s, rows)) return;
  const Point p = point_of(s, rows, i >> lane_bits);
  const Corners<T> corners = deform_corners(s, offset, p.row, p.d, p.k);
  const T scale = deform_scale(s, mask, p.row, p.d, p.k);
  const int channels = static_cast<int>(s.channels), lanes = 1 << lane_bits, part = s.offset_group_channels;
  input += p.row.image * s.pixels * s.channels;
  T weight[4];
#pragma unroll
  for (int n = 0; n < 4; ++n) weight[n] = deform_weight(corners, n, scale);
#pragma unroll 1
  for (int c = p.d * part + static_cast<int>(i & (lanes - 1)) * V; c < (p.d + 1) * part; c += lanes * V) {
    Pack<F, V> pixel[4];
#pragma unroll
    for (int n = 0; n < 4; ++n)
      if (weight[n] != T(0))
        pixel[n] = *reinterpret_cast<const Pack<F, V>*>(input + c + static_cast<int64_t>(corners.pixel[n]) * channels);
    T sum[V] = {};
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      if (weight[n] == T(0)) continue;
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] += weight[n] * static_cast<T>(pixel[n].value[v]);
    }
    Pack<F, V> out;
#pragma unroll
    for (int v = 0; v < V; ++v) out.value[v] = static_cast<F>(sum[v]);
    *reinterpret_cast<Pack<F, V>*>(columns + s.column(p.r, p.k, c, static_cast<int>(rows.count))) = out;
  }
}

template <class T>
__device__ T warp_sum(T value) {
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

// One warp: the gradients of one point.
template <class T, class F>
__global__ void __launch_bounds__(kThreads)
points_kernel(DeformShape s, Rows rows, const F* input, const T* offset, const T* mask, const F* columns,
              T* grad_offset, T* grad_mask) {
  const unsigned point = blockIdx.x * kWarps + threadIdx.x / kWarp;
  if (point >= num_points(s, rows)) return;  // the same for the whole warp
  const Point p = point_of(s, rows, point);
  const int lane = threadIdx.x % kWarp, channels = static_cast<int>(s.channels), part = s.offset_group_channels;
  const Corners<T> corners = deform_corners(s, offset, p.row, p.d, p.k);
  input += p.row.image * s.pixels * s.channels;
  const F* corner[4];
#pragma unroll
  for (int n = 0; n < 4; ++n) corner[n] = input + static_cast<int64_t>(corners.pixel[n]) * channels;
  T dot[4] = {};
  for (int c = p.d * part + lane; c < (p.d + 1) * part; c += kWarp) {
    const T g = static_cast<T>(columns[s.column(p.r, p.k, c, static_cast<int>(rows.count))]);
#pragma unroll
    for (int n = 0; n < 4; ++n)
      if (corners.inside[n]) dot[n] += g * static_cast<T>(corner[n][c]);
  }
#pragma unroll
  for (int n = 0; n < 4; ++n) dot[n] = warp_sum(dot[n]);
  if (lane == 0)
    deform_point_gradients(s, corners, dot, deform_scale(s, mask, p.row, p.d, p.k), p.row, p.d, p.k, grad_offset,
                           grad_mask);
}

// Four contributions a point: the bucket (image - first image, offset group, pixel) each goes to, and its weight.
// Those that do not count go to the bucket behind the last.
template <class T>
__global__ void __launch_bounds__(kThreads)
contributions_kernel(DeformShape s, Rows rows, const T* offset, const T* mask, int num_buckets, int* bucket,
                     T* weight) {
  const unsigned point = blockIdx.x * kThreads + threadIdx.x;
  if (point >= num_points(s, rows)) return;
  const Point p = point_of(s, rows, point);
  const Corners<T> corners = deform_corners(s, offset, p.row, p.d, p.k);
  const T scale = deform_scale(s, mask, p.row, p.d, p.k);
  const int map = (static_cast<int>(p.row.image - rows.image) * s.offset_groups + p.d) * s.pixels;
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const T w = deform_weight(corners, n, scale);
    bucket[point * 4 + n] = w == T(0) ? num_buckets : map + corners.pixel[n];
    weight[point * 4 + n] = w;
  }
}

// The first place from `low` on in the sorted `values` that holds `wanted` or more.
__device__ __forceinline__ int lower_bound(const int* values, int low, int size, int wanted) {
  for (int high = size; low < high;) {
    const int middle = low + (high - low) / 2;
    if (values[middle] < wanted) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// One warp: one bucket, a lane V neighbouring channels of its offset group at a time. `order` numbers the contributions.
template <class T, class F, int V>
__global__ void __launch_bounds__(kThreads)
gather_kernel(DeformShape s, Rows rows, const int* sorted, const int64_t* order, const T* weight, const F* columns,
              int num_buckets, T* grad_input) {
  const unsigned warp = blockIdx.x * kWarps + threadIdx.x / kWarp;
  if (warp >= static_cast<unsigned>(num_buckets)) return;
  const int bucket = static_cast<int>(warp), lane = threadIdx.x % kWarp;
  const int contributions = static_cast<int>(num_points(s, rows) * 4);
  const int begin = lower_bound(sorted, 0, contributions, bucket);
  const int end = lower_bound(sorted, begin, contributions, bucket + 1);
  const int map = bucket / s.pixels, pixel = bucket - map * s.pixels, image = map / s.offset_groups;
  const int part = s.offset_group_channels, d = map - image * s.offset_groups;
  grad_input += ((rows.image + image) * s.pixels + pixel) * s.channels;
  for (int c = d * part + lane * V; c < (d + 1) * part; c += kWarp * V) {
    Pack<T, V>* to = reinterpret_cast<Pack<T, V>*>(grad_input + c);
    Pack<T, V> sum = *to;  // what earlier rows added
    for (int e = begin; e < end; ++e) {
      const unsigned from = static_cast<unsigned>(order[e]), tap = from / 4 / s.offset_groups, r = tap / s.taps;
      const int at = s.column(static_cast<int>(r), static_cast<int>(tap - r * s.taps), c, static_cast<int>(rows.count));
      const Pack<F, V> value = *reinterpret_cast<const Pack<F, V>*>(columns + at);
      const T w = weight[from];
#pragma unroll
      for (int v = 0; v < V; ++v) sum.value[v] += w * static_cast<T>(value.value[v]);
    }
    *to = sum;
  }
}

template <class T>
const T* mask_of(const DeformConv& p) {
  return p.mask ? p.mask->const_data_ptr<T>() : nullptr;
}

// run(V) for packs of V channels: 16 bytes, or one where those would cross a group.
template <class F, class Run>
void with_packs(const DeformShape& s, bool aligned, Run run) {
  constexpr int V = 16 / sizeof(F);
  if (aligned && s.group_channels % V == 0 && s.offset_group_channels % V == 0)
    return run(std::integral_constant<int, V>());
  run(std::integral_constant<int, 1>());
}

template <class T, class F>
void im2col(const DeformConv& p, int64_t first, int64_t count, Tensor& columns) {
  const DeformShape& s = p.shape;
  const F* input = p.input.const_data_ptr<F>();
  // A slice of a channels-last tensor need not lie on 16 bytes.
  with_packs<F>(s, reinterpret_cast<uintptr_t>(input) % 16 == 0, [&](auto v) {
    constexpr int V = decltype(v)::value;
    int lane_bits = 0;
    while (lane_bits < 5 && (V << lane_bits) < s.offset_group_channels) ++lane_bits;
    const int64_t threads = count * s.taps * s.offset_groups << lane_bits;
    im2col_kernel<T, F, V><<<blocks(threads, kThreads), kThreads, 0, current_stream(columns)>>>(
        s, make_rows(s, first, count), input, p.offset.const_data_ptr<T>(), mask_of<T>(p), lane_bits,
        columns.mutable_data_ptr<F>());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

template <class T, class F>
void col2im(const DeformConv& p, int64_t first, int64_t count, const Tensor& columns, Tensor& grad_input,
            Tensor& grad_offset, Tensor& grad_mask) {
  const DeformShape& s = p.shape;
  const Rows rows = make_rows(s, first, count);
  const T *offset = p.offset.const_data_ptr<T>(), *mask = mask_of<T>(p);
  const F* g = columns.const_data_ptr<F>();
  const cudaStream_t stream = current_stream(columns);
  const int64_t points = count * s.taps * s.offset_groups;
  points_kernel<T, F><<<blocks(points, kWarps), kThreads, 0, stream>>>(
      s, rows, p.input.const_data_ptr<F>(), offset, mask, g, grad_offset.mutable_data_ptr<T>(),
      p.mask ? grad_mask.mutable_data_ptr<T>() : nullptr);
  STD_CUDA_KERNEL_LAUNCH_CHECK();

  const int64_t images = s.row(first + count - 1).image - rows.image + 1;
  const int64_t num_buckets = images * s.offset_groups * s.pixels;
  CHECK_ARGUMENT(num_buckets < (int64_t{1} << 31), "input: too many pixels for one pass");
  if (num_buckets == 0) return;
  Tensor bucket = empty_like_device(columns, {points * 4}, ScalarType::Int);
  Tensor weight = empty_like_device(columns, {points * 4}, p.acc);
  contributions_kernel<T><<<blocks(points * 4, kThreads * 4), kThreads, 0, stream>>>(
      s, rows, offset, mask, static_cast<int>(num_buckets), bucket.mutable_data_ptr<int>(),
      weight.mutable_data_ptr<T>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  const auto [sorted, order] = stable_sort(bucket);
  with_packs<F>(s, reinterpret_cast<uintptr_t>(g) % 16 == 0, [&, &sorted = sorted, &order = order](auto v) {
    constexpr int V = decltype(v)::value;
    gather_kernel<T, F, V><<<blocks(num_buckets, kWarps), kThreads, 0, stream>>>(
        s, rows, sorted.template const_data_ptr<int>(), order.template const_data_ptr<int64_t>(),
        weight.const_data_ptr<T>(), g, static_cast<int>(num_buckets), grad_input.mutable_data_ptr<T>());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

int64_t forward_step(const DeformConv& p) {
  return rows_at_once(p, kColumnBytes, p.dtype == ScalarType::Double ? 8 : p.dtype == ScalarType::Float ? 4 : 2);
}

int64_t backward_step(const DeformConv& p) {
  const int64_t row = 4 * kContributionBytes * p.shape.taps * p.shape.offset_groups;
  return std::min(forward_step(p), std::max<int64_t>(kSortedBytes / row, 1));
}

Tensor deform_conv2d(const Tensor& input, const Tensor& offset, const Tensor& weight, std::optional<Tensor> mask,
                     std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation) {
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const DeformConv p =
      make_deform_conv(input, offset, weight, mask, stride, padding, dilation, input.scalar_type());
  return deform_forward(p, input, forward_step(p), [&](int64_t first, int64_t count, Tensor& columns) {
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
  return deform_backward(p, grad, input, offset, weight, mask, backward_step(p), columns_of, scatter);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrcnn, CUDA, m) {
  m.impl("deform_conv2d", TORCH_BOX(&deform_conv2d));
  m.impl("deform_conv2d_backward", TORCH_BOX(&deform_conv2d_backward));
}

}  // namespace fastrcnn
