// Deformable RoI pooling and its gradients. Forward: one thread an output element, in the order of memory. Backward: one
// block a bin, its threads over the channels, so that a bin's offset gradient is one reduction inside the block; the
// gradient in the maps is added with atomics (fastrcnn/ops/deform_roi_pool.py raises torch's determinism alert).
#include "deform_roi_pool_math.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>
#include <limits>

namespace fastrcnn {
namespace {

constexpr int kWarp = 32;
constexpr int kForwardThreads = 256;
constexpr int kElements = 8;  // outputs of one RoI for each forward thread
constexpr int kBackwardThreads = 128;
constexpr int kBackwardWarps = kBackwardThreads / kWarp;
static_assert(kBackwardThreads % kWarp == 0 && kBackwardWarps <= kWarp, "one warp reduces the sums of all warps");

// A bin's two grids and what it needs of the RoI.
template <class T>
struct Bin {
  RoiGrid<T> y, x;
  int ph, pw;
  T reach_y, reach_x, mean;  // mean = 1 / samples
};

enum class Image { inside, padding, beyond };

template <class T>
__device__ __forceinline__ Image image_of(const T* roi, const DeformPool& p) {
  if (!(roi[0] >= T(0))) return Image::padding;
  return roi[0] < static_cast<T>(p.batch) ? Image::inside : Image::beyond;
}

// roi: (image, x1, y1, x2, y2); offset: the RoI's [2, bins] or null.
template <class T>
__device__ __forceinline__ Bin<T> make_bin(const T* roi, const T* offset, int b, const DeformPool& p) {
  const T scale = static_cast<T>(p.spatial_scale), gamma = static_cast<T>(p.gamma);
  const DeformAxis<T> x = deform_axis(roi[1], roi[3], scale, gamma, p.pooled_w, p.sampling_ratio);
  const DeformAxis<T> y = deform_axis(roi[2], roi[4], scale, gamma, p.pooled_h, p.sampling_ratio);
  const T samples = static_cast<T>(x.grid.samples) * static_cast<T>(y.grid.samples);
  const int bins = p.pooled_h * p.pooled_w;
  return {offset ? moved(y, offset[bins + b]) : y.grid, offset ? moved(x, offset[b]) : x.grid, b / p.pooled_w,
          b % p.pooled_w, y.reach, x.reach, samples > T(0) ? T(1) / samples : T(0)};
}

// What has weight 0 does not count, be it NaN.
template <class T>
__device__ __forceinline__ T times(T weight, T value) {
  return weight != T(0) ? weight * value : T(0);
}

template <class T, class F>
__global__ void __launch_bounds__(kForwardThreads)
forward_kernel(const F* input, const T* rois, const T* offset, DeformPool p, F* out) {
  const int bins = p.pooled_h * p.pooled_w, channels = static_cast<int>(p.channels), total = bins * channels;
  const int64_t k = blockIdx.x, plane = static_cast<int64_t>(p.height) * p.width;
  const int pixel = p.channels_last ? channels : 1, line = pixel * p.width;  // strides in elements
  const T* roi = rois + k * 5;
  const Image where = image_of(roi, p);
  F* dst = out + k * total;
  for (int64_t e = static_cast<int64_t>(blockIdx.y) * kForwardThreads + threadIdx.x; e < total;
       e += static_cast<int64_t>(gridDim.y) * kForwardThreads) {
    if (where != Image::inside) {
      dst[e] = static_cast<F>(where == Image::padding ? T(0) : std::numeric_limits<T>::quiet_NaN());
      continue;
    }
    const int i = static_cast<int>(e);
    const int b = p.channels_last ? i / channels : i % bins, c = p.channels_last ? i % channels : i / bins;
    const Bin<T> bin = make_bin(roi, offset == nullptr ? nullptr : offset + k * 2 * bins, b, p);
    const F* map = input + static_cast<int64_t>(roi[0]) * channels * plane + (p.channels_last ? c : c * plane);
    T sum = T(0);
    for (int iy = 0; iy < bin.y.samples && bin.x.samples > 0; ++iy) {
      const Tap<T> ty = axis_tap(bin.y, bin.ph, iy, p.height);
      if (ty.w_low == T(0) && ty.w_high == T(0)) continue;
      const F *low = map + ty.low * line, *high = map + ty.high * line;
      for (int ix = 0; ix < bin.x.samples; ++ix) {
        const Tap<T> tx = axis_tap(bin.x, bin.pw, ix, p.width);
        if (tx.w_low == T(0) && tx.w_high == T(0)) continue;
        const int left = tx.low * pixel, right = tx.high * pixel;
        sum += times(ty.w_low, times(tx.w_low, static_cast<T>(low[left])) + times(tx.w_high, static_cast<T>(low[right]))) +
               times(ty.w_high, times(tx.w_low, static_cast<T>(high[left])) + times(tx.w_high, static_cast<T>(high[right])));
      }
    }
    dst[e] = static_cast<F>(sum * bin.mean);
  }
}

// A weight of 0 is a pixel outside, or exactly on a sample's other neighbour: nothing to add.
template <class T>
__device__ __forceinline__ void add(T* at, T weight, T value) {
  if (weight != T(0)) atomicAdd(at, weight * value);
}

// The sum over the block, in thread 0. All threads of the block take part.
template <class T>
__device__ __forceinline__ T block_sum(T value, T* shared) {
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_down_sync(0xffffffffu, value, step);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = value;
  __syncthreads();
  T sum = T(0);
  if (threadIdx.x == 0)
    for (int w = 0; w < kBackwardWarps; ++w) sum += shared[w];
  return sum;
}

// grad_offset [K, 2, bins] is written where `offset` is given.
template <class T, class F>
__global__ void __launch_bounds__(kBackwardThreads)
backward_kernel(const F* grad, const F* input, const T* rois, const T* offset, DeformPool p, T* grad_input,
                T* grad_offset) {
  const int bins = p.pooled_h * p.pooled_w, channels = static_cast<int>(p.channels);
  const int64_t k = blockIdx.x / bins, plane = static_cast<int64_t>(p.height) * p.width;
  const int b = static_cast<int>(blockIdx.x % bins);
  const int pixel = p.channels_last ? channels : 1, line = pixel * p.width;
  const T* roi = rois + k * 5;
  T sum_y = T(0), sum_x = T(0);
  const bool inside = image_of(roi, p) == Image::inside;
  if (inside) {
    const Bin<T> bin = make_bin(roi, offset == nullptr ? nullptr : offset + k * 2 * bins, b, p);
    const int64_t image = static_cast<int64_t>(roi[0]) * channels * plane;
    const F* g = grad + k * bins * channels + (p.channels_last ? static_cast<int64_t>(b) * channels : b);
    for (int c = threadIdx.x; c < channels; c += kBackwardThreads) {
      const int64_t at = image + (p.channels_last ? c : c * plane);
      const F* map = input + at;
      T* into = grad_input + at;
      const T from = static_cast<T>(g[p.channels_last ? c : static_cast<int64_t>(c) * bins]) * bin.mean;
      T by_y = T(0), by_x = T(0);
      for (int iy = 0; iy < bin.y.samples && bin.x.samples > 0; ++iy) {
        const Tap<T> ty = axis_tap(bin.y, bin.ph, iy, p.height);
        if (ty.w_low == T(0) && ty.w_high == T(0)) continue;
        const T slope_y = axis_slope(bin.y, bin.ph, iy, p.height);
        // A neighbour without weight and slope is not read.
        const int low = ty.low * line, high = (ty.w_high != T(0) || slope_y != T(0) ? ty.high : ty.low) * line;
        for (int ix = 0; ix < bin.x.samples; ++ix) {
          const Tap<T> tx = axis_tap(bin.x, bin.pw, ix, p.width);
          if (tx.w_low == T(0) && tx.w_high == T(0)) continue;
          const T slope_x = axis_slope(bin.x, bin.pw, ix, p.width);
          const int left = tx.low * pixel, right = (tx.w_high != T(0) || slope_x != T(0) ? tx.high : tx.low) * pixel;
          add(into + low + left, ty.w_low * tx.w_low, from);
          add(into + low + right, ty.w_low * tx.w_high, from);
          add(into + high + left, ty.w_high * tx.w_low, from);
          add(into + high + right, ty.w_high * tx.w_high, from);
          if (offset == nullptr) continue;
          const T ll = static_cast<T>(map[low + left]), lr = static_cast<T>(map[low + right]);
          const T hl = static_cast<T>(map[high + left]), hr = static_cast<T>(map[high + right]);
          by_y += slope_y * (tx.w_low * (hl - ll) + tx.w_high * (hr - lr));
          by_x += slope_x * (ty.w_low * (lr - ll) + ty.w_high * (hr - hl));
        }
      }
      sum_y += by_y * from * bin.reach_y;
      sum_x += by_x * from * bin.reach_x;
    }
  }
  if (offset == nullptr) return;  // the same for all threads of the block
  __shared__ T shared[2][kBackwardWarps];
  sum_x = block_sum(sum_x, shared[0]);
  sum_y = block_sum(sum_y, shared[1]);
  if (threadIdx.x == 0) {
    grad_offset[(k * 2 + 0) * bins + b] = sum_x;
    grad_offset[(k * 2 + 1) * bins + b] = sum_y;
  }
}

Tensor deform_roi_pool(const Tensor& input, const Tensor& rois, std::optional<Tensor> offset, int64_t pooled_h,
                       int64_t pooled_w, double spatial_scale, int64_t sampling_ratio, double gamma) {
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const DeformPool p = make_deform_pool(input, rois, offset, pooled_h, pooled_w, spatial_scale, sampling_ratio, gamma);
  const ScalarType dtype = input.scalar_type(), acc = coordinate_type(input);
  Tensor out = empty_like_device(input, {p.num_rois, p.channels, pooled_h, pooled_w}, dtype, deform_format(p));
  const int64_t total = p.channels * pooled_h * pooled_w;
  if (p.num_rois == 0 || total == 0) return out;
  const Tensor x = dense(input, p, dtype), r = contiguous_as(rois, acc);
  std::optional<Tensor> o;
  if (offset) o = contiguous_as(*offset, acc);
  constexpr int64_t kChunk = kForwardThreads * kElements;
  const dim3 grid(static_cast<unsigned>(p.num_rois),
                  static_cast<unsigned>(std::min<int64_t>((total + kChunk - 1) / kChunk, 65535)));
  dispatch_features(dtype, [&](auto t, auto f) {
    using T = decltype(t);
    using F = decltype(f);
    forward_kernel<T, F><<<grid, kForwardThreads, 0, current_stream(input)>>>(
        x.template const_data_ptr<F>(), r.template const_data_ptr<T>(), o ? o->template const_data_ptr<T>() : nullptr, p,
        out.template mutable_data_ptr<F>());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

std::tuple<Tensor, Tensor> deform_roi_pool_backward(const Tensor& grad, const Tensor& input, const Tensor& rois,
                                                    std::optional<Tensor> offset, double spatial_scale,
                                                    int64_t sampling_ratio, double gamma) {
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const int64_t pooled_h = grad.size(2), pooled_w = grad.size(3), bins = pooled_h * pooled_w;
  const DeformPool p = make_deform_pool(input, rois, offset, pooled_h, pooled_w, spatial_scale, sampling_ratio, gamma);
  CHECK_SHAPE(grad, p.num_rois, p.channels, pooled_h, pooled_w);
  CHECK_ARGUMENT(p.num_rois * bins < int64_t{1} << 31, "rois: more than 2^31 bins");
  const ScalarType dtype = input.scalar_type(), acc = coordinate_type(input);
  Tensor grad_input = empty_like_device(input, {p.batch, p.channels, p.height, p.width}, acc, deform_format(p));
  torch::stable::zero_(grad_input);
  std::vector<int64_t> offset_shape = {0};
  if (offset) offset_shape = {p.num_rois, 2, pooled_h, pooled_w};
  Tensor grad_offset = empty_like_device(input, offset_shape, acc);
  if (p.num_rois > 0) {
    const Tensor x = dense(input, p, dtype), g = dense(grad, p, dtype), r = contiguous_as(rois, acc);
    std::optional<Tensor> o;
    if (offset) o = contiguous_as(*offset, acc);
    const unsigned blocks = static_cast<unsigned>(p.num_rois * bins);
    dispatch_features(dtype, [&](auto t, auto f) {
      using T = decltype(t);
      using F = decltype(f);
      backward_kernel<T, F><<<blocks, kBackwardThreads, 0, current_stream(input)>>>(
          g.template const_data_ptr<F>(), x.template const_data_ptr<F>(), r.template const_data_ptr<T>(),
          o ? o->template const_data_ptr<T>() : nullptr, p, grad_input.template mutable_data_ptr<T>(),
          grad_offset.template mutable_data_ptr<T>());
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  }
  const ScalarType offset_dtype = offset ? offset->scalar_type() : dtype;
  if (acc != dtype) grad_input = torch::stable::to(grad_input, dtype);
  if (acc != offset_dtype) grad_offset = torch::stable::to(grad_offset, offset_dtype);
  return {grad_input, grad_offset};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrcnn, CUDA, m) {
  m.impl("deform_roi_pool", TORCH_BOX(&deform_roi_pool));
  m.impl("deform_roi_pool_backward", TORCH_BOX(&deform_roi_pool_backward));
}

}  // namespace fastrcnn
