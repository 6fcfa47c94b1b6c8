// Soft-NMS, one block a group: the boxes are sorted by group, and each block that finds the beginning of one goes through
// its rounds alone. A round depends on the one before, so its latency is what bounds the time: boxes and scores stay in
// shared memory where they fit, and a round has one barrier, behind which every warp finds the next best for itself.
#include "soft_nms.h"
#include "sort.cuh"

#include <torch/csrc/stable/accelerator.h>

#include <algorithm>

namespace fastrcnn {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32, kMostBlocks = 1024;
constexpr int64_t kCopyBytes = 40 << 10;  // of shared memory, with which two blocks fit on every multiprocessor

template <class T>
struct Problem {
  int n;
  SoftRules<T> rules;
  const Box<T>* boxes;    // [N]
  const T* scores;        // [N]
  const int64_t* groups;  // [N] or null
  int* members;           // [N] place by group -> row
  int64_t* sorted_group;  // [N]
  AlignedBox<T>* box;        // [N] by place
  T* score;               // [N] by place
  // What was taken, group by group: the r-th of the group that begins at place s stands at s + r, what remains is -1.
  int* taken;      // [N] rows
  T* taken_score;  // [N]
  int* count;      // of all that was taken
};

template <class T>
struct ByGroup {
  Problem<T> p;
  __device__ uint64_t operator()(int, int i) const {
    return p.groups == nullptr ? 0 : static_cast<uint64_t>(p.groups[i]) ^ uint64_t{1} << 63;
  }
};
template <class T>
struct PlaceByGroup {
  Problem<T> p;
  __device__ void operator()(int, int place, int i) const {
    const T score = p.scores[i];
    p.members[place] = i;
    p.sorted_group[place] = p.groups == nullptr ? 0 : p.groups[i];
    p.box[place] = {p.boxes[i]};
    p.score[place] = score == score ? score : -std::numeric_limits<T>::infinity();  // a NaN score never wins
    p.taken[place] = -1;
  }
};

template <class T>
struct Best {
  T score;
  int at;
  __device__ void meet(T other, int other_at) {  // equal scores go to the lower index
    if (other > score || (other == score && other_at < at)) score = other, at = other_at;
  }
  __device__ void meet_lanes() {
    for (int step = 16; step > 0; step /= 2) {
      const T other = __shfl_xor_sync(~0u, score, step);
      meet(other, __shfl_xor_sync(~0u, at, step));
    }
  }
};

// The rounds of one group of `n` boxes, which begins at place `begin`. Inlined for each of the memories that box and score
// lie in, so that both know theirs. Returns how many were taken.
template <class T>
__device__ __forceinline__ int take_all(const Problem<T>& p, int begin, int n, const AlignedBox<T>* box, T* score,
                                        Best<T> (&of_warp)[2][kWarps]) {
  const T minus_inf = -std::numeric_limits<T>::infinity();
  const int i = threadIdx.x, lane = i % 32, warp = i / 32;
  // Each thread has its own elements, and the first round's barrier comes before anybody reads another's.
  Best<T> best{minus_inf, n};
  for (int k = i; k < n; k += kThreads) best.meet(score[k], k);
  for (int parity = 0, rank = 0;; parity ^= 1, ++rank) {
    best.meet_lanes();
    if (lane == 0) of_warp[parity][warp] = best;
    __syncthreads();
    best = of_warp[parity][lane % kWarps];
    best.meet_lanes();
    if (best.score == minus_inf) return rank;  // the same for the whole block
    const Box<T> taken = box[best.at];
    const T taken_area = area(taken), taken_score = best.score;
    const int at = best.at;
    if (i == 0) {
      p.taken[begin + rank] = p.members[begin + at];
      p.taken_score[begin + rank] = taken_score;
    }
    best = {minus_inf, n};
    for (int k = i; k < n; k += kThreads) {
      const T left = k == at || score[k] == minus_inf
                         ? minus_inf
                         : decayed(score[k], taken, taken_area, box[k], area(box[k]), p.rules);
      score[k] = left;
      best.meet(left, k);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) soft_nms_kernel(Problem<T> p, int fits) {
  extern __shared__ __align__(16) double copies[];  // `fits` boxes, then as many scores
  __shared__ Best<T> of_warp[2][kWarps];
  const int i = threadIdx.x;
  for (int begin = blockIdx.x; begin < p.n; begin += gridDim.x) {
    const int64_t group = p.sorted_group[begin];
    if (begin > 0 && p.sorted_group[begin - 1] == group) continue;  // the same for the whole block
    int n = 0;
    for (int found = kThreads; found == kThreads; n += found)
      found = __syncthreads_count(begin + n + i < p.n && p.sorted_group[begin + n + i] == group);
    int taken;
    if (n <= fits) {
      auto* box = reinterpret_cast<AlignedBox<T>*>(copies);
      T* score = reinterpret_cast<T*>(box + fits);
      for (int k = i; k < n; k += kThreads) box[k] = p.box[begin + k], score[k] = p.score[begin + k];
      taken = take_all(p, begin, n, box, score, of_warp);
    } else {
      taken = take_all(p, begin, n, p.box + begin, p.score + begin, of_warp);
    }
    if (i == 0) atomicAdd(p.count, taken);
    __syncthreads();  // before the next group's boxes replace these
  }
}

template <class T>
struct ByTakenScore {
  Problem<T> p;
  using Key = decltype(sortable(T()));
  __device__ Key operator()(int, int i) const {
    if (p.taken[i] < 0) return ~Key{0};
    return p.groups == nullptr ? 0 : ~sortable(p.taken_score[i] + T(0));  // one group stands in its final order
  }
};
template <class T>
struct Write {
  Problem<T> p;
  T* dets;
  int64_t* indices;
  __device__ void operator()(int, int place, int i) const {
    const int row = p.taken[i];
    if (row < 0) return;
    const Box<T> b = p.boxes[row];
    T* det = dets + static_cast<int64_t>(place) * 5;
    det[0] = b.x1, det[1] = b.y1, det[2] = b.x2, det[3] = b.y2, det[4] = p.taken_score[i];
    indices[place] = row;
  }
};

template <class T>
int run(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& groups, SoftRules<T> rules,
        Tensor& dets, Tensor& indices) {
  const int n = static_cast<int>(boxes.size(0));
  if (n == 0) return 0;
  const cudaStream_t stream = current_stream(boxes);
  const auto buffer = [&](int64_t numbers, ScalarType dtype) { return empty_like_device(boxes, {numbers}, dtype); };
  Tensor members = buffer(n, ScalarType::Int), taken = buffer(n, ScalarType::Int), count = buffer(1, ScalarType::Int);
  Tensor sorted_group = buffer(n, ScalarType::Long), box = buffer(int64_t{4} * n, boxes.scalar_type());
  Tensor score = buffer(n, boxes.scalar_type()), taken_score = buffer(n, boxes.scalar_type());
  const Problem<T> p{n, rules, reinterpret_cast<const Box<T>*>(boxes.const_data_ptr<T>()), scores.const_data_ptr<T>(),
                     groups ? groups->const_data_ptr<int64_t>() : nullptr, members.mutable_data_ptr<int>(),
                     sorted_group.mutable_data_ptr<int64_t>(), reinterpret_cast<AlignedBox<T>*>(box.mutable_data_ptr<T>()),
                     score.mutable_data_ptr<T>(), taken.mutable_data_ptr<int>(), taken_score.mutable_data_ptr<T>(),
                     count.mutable_data_ptr<int>()};
  STD_CUDA_CHECK(cudaMemsetAsync(p.count, 0, sizeof(int), stream));
  sort_lists(1, n, boxes, ByGroup<T>{p}, PlaceByGroup<T>{p});
  constexpr int64_t kElement = sizeof(AlignedBox<T>) + sizeof(T);
  const int fits = static_cast<int>(std::min<int64_t>(n, kCopyBytes / kElement));
  const int blocks = groups ? std::min(n, kMostBlocks) : 1;
  soft_nms_kernel<T><<<blocks, kThreads, fits * kElement, stream>>>(p, fits);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  sort_lists(1, n, boxes, ByTakenScore<T>{p}, Write<T>{p, dets.mutable_data_ptr<T>(), indices.mutable_data_ptr<int64_t>()});
  int found = 0;  // the answer's size: the host has to wait for it
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_item_int32(count.get(), &found));  // through pinned memory
  return found;
}

std::tuple<Tensor, Tensor> any(const Tensor& boxes, const Tensor& scores, std::optional<Tensor> groups,
                               double iou_threshold, double sigma, double min_score, const std::string& method,
                               int64_t max_output) {
  const torch::stable::accelerator::DeviceGuard guard(boxes.get_device_index());
  const int64_t n = boxes.size(0);
  CHECK_ARGUMENT(n < int64_t{1} << 31, "boxes: more than 2^31 rows");
  return soft_nms_in(boxes, scores, groups, iou_threshold, sigma, min_score, method,
                     [&](const Tensor& b, const Tensor& s, const std::optional<Tensor>& g, auto rules) {
                       Tensor dets = empty_like_device(b, {n, 5}, b.scalar_type());
                       Tensor indices = empty_like_device(b, {n}, ScalarType::Long);
                       const int64_t k = std::min<int64_t>(run(b, s, g, rules, dets, indices), max_output);
                       return std::tuple(torch::stable::narrow(dets, 0, 0, k), torch::stable::narrow(indices, 0, 0, k));
                     });
}

std::tuple<Tensor, Tensor> soft_nms(const Tensor& boxes, const Tensor& scores, double iou_threshold, double sigma,
                                    double min_score, std::string method) {
  return any(boxes, scores, std::nullopt, iou_threshold, sigma, min_score, method, boxes.size(0));
}

std::tuple<Tensor, Tensor> batched_soft_nms(const Tensor& boxes, const Tensor& scores, const Tensor& idxs,
                                            double iou_threshold, double sigma, double min_score, std::string method,
                                            std::optional<int64_t> max_output) {
  return any(boxes, scores, idxs, iou_threshold, sigma, min_score, method, max_output.value_or(boxes.size(0)));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrcnn, CUDA, m) {
  m.impl("soft_nms", TORCH_BOX(&soft_nms));
  m.impl("batched_soft_nms", TORCH_BOX(&batched_soft_nms));
}

}  // namespace fastrcnn
