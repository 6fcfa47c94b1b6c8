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
  const int64_t* valid;   // how many of the N take part, or null: all
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
    const bool races = score == score && (p.valid == nullptr || i < *p.valid);  // a NaN score never wins
    p.score[place] = races ? score : -std::numeric_limits<T>::infinity();
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
struct WritePadded {
  Problem<T> p;
  int64_t most;
  T* decayed;
  int64_t* indices;
  __device__ void operator()(int, int place, int i) const {
    const int row = p.taken[i];
    if (row < 0 || place >= most) return;
    decayed[place] = p.taken_score[i];
    indices[place] = row;
  }
};
__global__ void limit_kernel(int batch, const int* counts, int64_t most, int64_t* num_kept) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i < batch) num_kept[i] = counts[i] < most ? counts[i] : most;
}

// Of p's first five, n > 0: what is taken goes to writer(p) in order, and its number to `count`, which is zero before.
template <class T, class Writer>
void run(Problem<T> p, const Tensor& like, int* count, Writer writer) {
  const int64_t n = p.n;
  const auto buffer = [&](int64_t numbers, ScalarType dtype) { return empty_like_device(like, {numbers}, dtype); };
  const ScalarType dtype = coordinate_type(like);
  Tensor members = buffer(n, ScalarType::Int), taken = buffer(n, ScalarType::Int);
  Tensor sorted_group = buffer(n, ScalarType::Long), box = buffer(4 * n, dtype);
  Tensor score = buffer(n, dtype), taken_score = buffer(n, dtype);
  p.members = members.mutable_data_ptr<int>(), p.sorted_group = sorted_group.mutable_data_ptr<int64_t>();
  p.box = reinterpret_cast<AlignedBox<T>*>(box.mutable_data_ptr<T>()), p.score = score.mutable_data_ptr<T>();
  p.taken = taken.mutable_data_ptr<int>(), p.taken_score = taken_score.mutable_data_ptr<T>(), p.count = count;
  sort_lists(1, p.n, like, ByGroup<T>{p}, PlaceByGroup<T>{p});
  constexpr int64_t kElement = sizeof(AlignedBox<T>) + sizeof(T);
  const int fits = static_cast<int>(std::min<int64_t>(n, kCopyBytes / kElement));
  const int blocks = p.groups != nullptr ? std::min(p.n, kMostBlocks) : 1;
  soft_nms_kernel<T><<<blocks, kThreads, fits * kElement, current_stream(like)>>>(p, fits);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  sort_lists(1, p.n, like, ByTakenScore<T>{p}, writer(p));
}

template <class T>
Problem<T> problem(int64_t n, const SoftRules<T>& rules, const T* boxes, const T* scores, const int64_t* groups) {
  CHECK_ARGUMENT(n < int64_t{1} << 31, "boxes: more than 2^31 rows");
  return {static_cast<int>(n), rules, reinterpret_cast<const Box<T>*>(boxes), scores, groups};
}

std::tuple<Tensor, Tensor> any(const Tensor& boxes, const Tensor& scores, std::optional<Tensor> groups,
                               double iou_threshold, double sigma, double min_score, const std::string& method,
                               int64_t max_output) {
  const torch::stable::accelerator::DeviceGuard guard(boxes.get_device_index());
  const int64_t n = boxes.size(0);
  return soft_nms_in(boxes, scores, groups, iou_threshold, sigma, min_score, method,
                     [&](const Tensor& b, const Tensor& s, const std::optional<Tensor>& g, auto rules) {
                       using T = decltype(rules.sigma);
                       Tensor dets = empty_like_device(b, {n, 5}, b.scalar_type());
                       Tensor indices = empty_like_device(b, {n}, ScalarType::Long);
                       int found = 0;
                       if (n > 0) {
                         Tensor count = empty_like_device(b, {1}, ScalarType::Int);
                         STD_CUDA_CHECK(cudaMemsetAsync(count.mutable_data_ptr<int>(), 0, sizeof(int), current_stream(b)));
                         run(problem<T>(n, rules, b.const_data_ptr<T>(), s.const_data_ptr<T>(),
                                        g ? g->const_data_ptr<int64_t>() : nullptr),
                             b, count.mutable_data_ptr<int>(), [&](const Problem<T>& p) {
                               return Write<T>{p, dets.mutable_data_ptr<T>(), indices.mutable_data_ptr<int64_t>()};
                             });
                         // The answer's size: the host has to wait for it, through pinned memory.
                         STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_item_int32(count.get(), &found));
                       }
                       const int64_t k = std::min<int64_t>(found, max_output);
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

// Image after image: a block has a group, and an image has many.
template <class T>
void run_padded(const PaddedBoxes& in, const SoftRules<T>& rules, int64_t most, T* decayed, int64_t* indices,
                int64_t* num_kept) {
  const int64_t batch = in.scores.size(0), n = in.scores.size(1);
  if (batch == 0) return;
  const cudaStream_t stream = current_stream(in.boxes);
  Tensor counts = empty_like_device(in.boxes, {batch}, ScalarType::Int);
  int* count = counts.mutable_data_ptr<int>();
  STD_CUDA_CHECK(cudaMemsetAsync(count, 0, batch * sizeof(int), stream));
  STD_CUDA_CHECK(cudaMemsetAsync(decayed, 0, batch * most * sizeof(T), stream));
  STD_CUDA_CHECK(cudaMemsetAsync(indices, 0xff, batch * most * sizeof(int64_t), stream));  // -1
  const int64_t *groups = in.group_ids(), *valid = in.count_ids();
  for (int64_t i = 0; i < batch && n > 0; ++i) {
    Problem<T> p = problem<T>(n, rules, in.boxes.const_data_ptr<T>() + i * n * 4, in.scores.const_data_ptr<T>() + i * n,
                              groups ? groups + i * n : nullptr);
    p.valid = valid ? valid + i : nullptr;
    run(p, in.boxes, count + i, [&](const Problem<T>& whole) {
      return WritePadded<T>{whole, most, decayed + i * most, indices + i * most};
    });
  }
  limit_kernel<<<static_cast<int>((batch + kThreads - 1) / kThreads), kThreads, 0, stream>>>(static_cast<int>(batch),
                                                                                             count, most, num_kept);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor, Tensor> soft_nms_padded(const Tensor& boxes, const Tensor& scores,
                                                   std::optional<Tensor> groups, double iou_threshold, double sigma,
                                                   double min_score, std::string method, int64_t max_output,
                                                   std::optional<Tensor> counts) {
  const torch::stable::accelerator::DeviceGuard guard(boxes.get_device_index());
  return soft_nms_padded_in(boxes, scores, groups, iou_threshold, sigma, min_score, method, max_output, counts,
                            [&](const PaddedBoxes& in, auto rules, auto*... out) { run_padded(in, rules, max_output, out...); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrcnn, CUDA, m) {
  m.impl("soft_nms", TORCH_BOX(&soft_nms));
  m.impl("batched_soft_nms", TORCH_BOX(&batched_soft_nms));
  m.impl("soft_nms_padded", TORCH_BOX(&soft_nms_padded));
}

}  // namespace fastrcnn
