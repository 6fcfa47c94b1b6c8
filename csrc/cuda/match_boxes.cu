// Max-IoU assignment without the boxes x ground-truth matrix: two kernels, a thread a box. The work that limits them is the
// test of the pairs, of which few overlap, and neighbouring anchors lie near each other. So a warp tests the hull of its 32
// boxes against 32 ground-truth boxes at a time, a lane each, and only those that meet it are gone through one by one.
// Boxes in any other order give the same result, with more pairs to go through.
#include "match_boxes.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <limits>

namespace fastrcnn {
namespace {

constexpr int kThreads = 256, kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// An IoU is never negative or NaN: its bits order as it does, and an integer maximum does not depend on the order.
__device__ unsigned to_bits(float iou) { return __float_as_uint(iou); }
__device__ unsigned long long to_bits(double iou) { return __double_as_longlong(iou); }
__device__ float from_bits(unsigned bits) { return __uint_as_float(bits); }
__device__ double from_bits(unsigned long long bits) { return __longlong_as_double(bits); }
template <class T>
using Bits = decltype(to_bits(T()));

template <class B>
__device__ B warp_max(B v) {
  for (int d = kWarp / 2; d > 0; d /= 2) v = max(v, __shfl_xor_sync(kAllLanes, v, d));
  return v;
}
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
__device__ unsigned warp_max(unsigned v) { return __reduce_max_sync(kAllLanes, v); }
#endif

template <class T>
__device__ Box<T> nothing() {
  constexpr T inf = std::numeric_limits<T>::infinity();
  return {inf, inf, -inf, -inf};
}

// Four comparisons instead of an IoU: false only where the IoU is 0, since an intersection > 0 needs all four, and a box
// with a NaN coordinate meets nothing.
template <class T>
__device__ bool may_meet(const Box<T>& a, const Box<T>& b) {
  return a.x1 < b.x2 && b.x1 < a.x2 && a.y1 < b.y2 && b.y1 < a.y2;
}

// The smallest box around those of the warp's lanes, none of which may be NaN: what misses it, misses them all.
template <class T>
__device__ Box<T> warp_hull(Box<T> b) {
  for (int d = kWarp / 2; d > 0; d /= 2) {
    b.x1 = min(b.x1, __shfl_xor_sync(kAllLanes, b.x1, d)), b.y1 = min(b.y1, __shfl_xor_sync(kAllLanes, b.y1, d));
    b.x2 = max(b.x2, __shfl_xor_sync(kAllLanes, b.x2, d)), b.y2 = max(b.y2, __shfl_xor_sync(kAllLanes, b.y2, d));
  }
  return b;
}

// Each box's best ground truth and what that makes of it; gt_best [B, M], where not null: the best IoU of each ground-truth
// box, zero before, gathered in shared memory first so that a block adds at most one atomic for each.
template <class T>
__global__ void best_gt_kernel(MatchBatch<T> batch, unsigned blocks_per_image, Bits<T>* gt_best) {
  alignas(16) __shared__ Box<T> gts[kThreads];
  __shared__ Bits<T> best_of[kThreads];
  const int64_t index = blockIdx.x / blocks_per_image;
  const int64_t i = static_cast<int64_t>(blockIdx.x % blocks_per_image) * kThreads + threadIdx.x;
  const MatchImage<T> image = batch.image(index);
  const int num_gts = static_cast<int>(image.num_gts), lane = threadIdx.x % kWarp;
  const T eps = batch.rules.iou_eps;
  Box<T> box = nothing<T>();
  if (i < image.n) box = image.boxes[i];
  const T box_area = area(box);
  bool ignored = false;
#pragma unroll 1  // most images have none
  for (int64_t r = 0; r < image.num_regions; ++r)
    ignored |= in_region(image.regions[r], box, box_area, batch.rules.ignore_iof_thr);
  if (ignored || !may_meet(box, box)) box = nothing<T>();  // without area, or NaN: every IoU is 0
  const Box<T> hull = warp_hull(box);
  T best = T(0);
  int arg = 0;
  for (int first = 0; first < num_gts; first += kThreads) {
    const int mine = first + threadIdx.x, size = min(kThreads, num_gts - first);
    if (mine < num_gts) gts[threadIdx.x] = image.gts[mine], best_of[threadIdx.x] = 0;
    __syncthreads();
    for (int k = 0; k < size; k += kWarp) {
      unsigned near = __ballot_sync(kAllLanes, k + lane < size && may_meet(hull, gts[k + lane]));
      for (; near != 0; near &= near - 1) {
        const int g = k + __ffs(near) - 1;
        const Box<T> gt = gts[g];
        const bool meets = may_meet(gt, box);
        if (!__any_sync(kAllLanes, meets)) continue;
        const T iou = meets ? matching_iou(gt, area(gt), box, box_area, eps) : T(0);
        if (iou > best) best = iou, arg = first + g;
        if (gt_best == nullptr) continue;
        const Bits<T> top = warp_max(to_bits(iou));
        if (lane == 0) atomicMax(&best_of[g], top);
      }
    }
    __syncthreads();
    if (gt_best != nullptr && mine < num_gts && best_of[threadIdx.x] > 0)
      atomicMax(gt_best + index * batch.m + mine, best_of[threadIdx.x]);
  }
  if (i >= image.n) return;
  if (ignored) best = T(-1);
  image.matches[i] = num_gts > 0 ? match_by_best(best, arg, batch.rules) : -1;
  image.max_iou[i] = best;
}

// Boxes that attain a ground-truth box's best IoU. A warp leaves at once where its highest IoU is below the best of every
// ground-truth box that counts; the others compute IoUs again, with the same bits.
template <class T>
__global__ void low_quality_kernel(MatchBatch<T> batch, unsigned blocks_per_image, const Bits<T>* gt_best) {
  const int64_t index = blockIdx.x / blocks_per_image;
  const int64_t i = static_cast<int64_t>(blockIdx.x % blocks_per_image) * kThreads + threadIdx.x;
  const MatchImage<T> image = batch.image(index);
  const int num_gts = static_cast<int>(image.num_gts), lane = threadIdx.x % kWarp;
  const T eps = batch.rules.iou_eps, best = i < image.n ? image.max_iou[i] : T(-1);
  const T top = from_bits(warp_max(to_bits(max_(best, T(0)))));
  gt_best += index * batch.m;
  const auto in_reach = [&](int g) {
    const T goal = g < num_gts ? from_bits(gt_best[g]) : T(-1);
    return goal >= T(0) && goal >= batch.rules.min_pos_iou && goal <= top;
  };
  bool any = false;
  for (int g = lane; g < num_gts; g += kWarp) any |= in_reach(g);
  if (!__any_sync(kAllLanes, any)) return;

  Box<T> box = nothing<T>();
  if (best >= T(0)) box = image.boxes[i];
  const T box_area = area(box);
  const Box<T> hull = warp_hull(best > T(0) ? box : nothing<T>());
  int64_t match = -1;
  for (int first = 0; first < num_gts; first += kWarp) {
    const int mine = first + lane;
    // A ground-truth box whose best is 0 is attained by every box that does not lie in an ignore region.
    const bool wanted = in_reach(mine) && (gt_best[mine] == 0 || may_meet(hull, image.gts[mine]));
    for (unsigned left = __ballot_sync(kAllLanes, wanted); left != 0; left &= left - 1) {
      const int g = first + __ffs(left) - 1;
      const Box<T> gt = image.gts[g];
      if (matching_iou(gt, area(gt), box, box_area, eps) == from_bits(gt_best[g])) match = g;  // the last one stays
    }
  }
  if (match < 0 || best < T(0)) return;
  if (!batch.rules.low_quality_last_gt) {
    if (image.matches[i] >= 0) return;  // it has its own best already
    const auto is_best = [&](int g) {
      return matching_iou(image.gts[g], area(image.gts[g]), box, box_area, eps) == best;
    };
    for (match = 0; match < num_gts - 1 && !is_best(match); ++match) {}
  }
  image.matches[i] = match;
}

template <class T>
void launch(const MatchBatch<T>& batch, int64_t images, const Tensor& boxes) {
  if (images * batch.n == 0) return;
  const cudaStream_t stream = current_stream(boxes);
  const int64_t blocks_per_image = (batch.n + kThreads - 1) / kThreads, blocks = blocks_per_image * images;
  CHECK_ARGUMENT(blocks <= std::numeric_limits<int>::max(), "too many boxes");
  Tensor memory = boxes;
  Bits<T>* gt_best = nullptr;
  if (batch.rules.match_low_quality && batch.m > 0) {
    const int64_t bytes = images * batch.m * sizeof(Bits<T>);
    memory = empty_like_device(boxes, {bytes}, ScalarType::Byte);
    gt_best = static_cast<Bits<T>*>(memory.mutable_data_ptr());
    STD_CUDA_CHECK(cudaMemsetAsync(gt_best, 0, bytes, stream));
  }
  best_gt_kernel<T><<<blocks, kThreads, 0, stream>>>(batch, blocks_per_image, gt_best);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (gt_best == nullptr) return;
  low_quality_kernel<T><<<blocks, kThreads, 0, stream>>>(batch, blocks_per_image, gt_best);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor> match_boxes(const Tensor& boxes, const Tensor& gt_boxes, const Tensor& gt_counts,
                                       std::optional<Tensor> ignore_boxes, std::optional<Tensor> ignore_counts,
                                       double pos_iou_thr, double neg_iou_thr, double min_pos_iou,
                                       bool match_low_quality, bool low_quality_last_gt, double ignore_iof_thr,
                                       double iou_eps) {
  const torch::stable::accelerator::DeviceGuard guard(boxes.get_device_index());
  const MatchRules<double> rules{pos_iou_thr, neg_iou_thr,       min_pos_iou,        ignore_iof_thr,
                                 iou_eps,     match_low_quality, low_quality_last_gt};
  return match_batch(boxes, gt_boxes, gt_counts, ignore_boxes, ignore_counts, rules,
                     [&](const auto& all, int64_t images) { launch(all, images, boxes); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrcnn, CUDA, m) { m.impl("match_boxes", TORCH_BOX(&match_boxes)); }

}  // namespace fastrcnn
