// The best scores above a threshold, of every image at once and without a word to the host. They are counted; lists that
// one sort takes are sorted whole, of longer ones a radix select leaves what can have a place, and that is sorted.
#include "radix_select.cuh"
#include "sort.cuh"

#include <torch/csrc/stable/accelerator.h>

#include <type_traits>

namespace fastrcnn {
namespace {

constexpr int kThreads = 256, kPerThread = 16, kCountChunk = kThreads * kPerThread;

template <class T, class F>
__global__ void __launch_bounds__(kThreads)
    count_kernel(const F* scores, int n, int blocks, T threshold, int* numbers) {
  const int image = blockIdx.x / blocks;
  const int64_t first = static_cast<int64_t>(blockIdx.x % blocks) * kCountChunk + threadIdx.x;
  const F* own = scores + static_cast<int64_t>(image) * n;
  int above = 0;
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    const int64_t i = first + k * kThreads;
    above += i < n && static_cast<T>(own[i]) > threshold;
  }
  const int all = block_sums<kThreads>(above).all;
  if (threadIdx.x == 0 && all > 0) atomicAdd(&numbers[image], all);
}

// What is no candidate's, and the numbers as they are given out.
template <class T>
__global__ void __launch_bounds__(kThreads) fill_kernel(int64_t batch, int64_t most, const int* numbers, T* values,
                                                        int64_t* indices, int64_t* counts, int64_t* found) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < batch * most) values[i] = T(0), indices[i] = -1;
  if (i < batch) found[i] = numbers[i], counts[i] = numbers[i] < most ? numbers[i] : most;
}

template <class T, class F>
struct ByScore {  // ascending, and so complemented: the best come first, what is no number last
  const F* scores;
  int64_t n;
  __device__ Key<T> operator()(int image, int i) const {
    return ~rank_key(static_cast<T>(scores[image * n + i]), false);
  }
};
struct BySelected {  // a key and the index behind it
  const uint64_t* selected;
  int64_t n;
  __device__ uint64_t operator()(int image, int i) const { return selected[image * n + i]; }
};
template <class T, class F>
struct Write {
  const F* scores;
  const uint64_t* selected;  // null: i is the index
  int64_t n, selects, most;
  const int* numbers;
  T* values;
  int64_t* indices;
  __device__ void operator()(int image, int place, int i) const {
    if (place >= most || place >= numbers[image]) return;
    const uint32_t at = selected == nullptr ? static_cast<uint32_t>(i) : static_cast<uint32_t>(selected[image * selects + i]);
    values[image * most + place] = static_cast<T>(scores[image * n + at]);
    indices[image * most + place] = at;
  }
};

template <class F>
Plan<float, F> one_level(const F* scores, int n, int count) {
  Plan<float, F> plan{};
  plan.shape.levels = 1, plan.shape.size[0] = n, plan.shape.count[0] = plan.shape.row[1] = count;
  plan.shape.chunk[1] = (n - 1) / kChunk + 1;
  Level<float, F>& l = plan.level[0];
  l.logits = scores, l.anchors = l.height = 1, l.width = n, l.lb = l.lh = n, l.la = l.lw = 1;
  return plan;
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;
template <class T, class F>
Outputs run(const Tensor& scores, double threshold, int64_t most) {
  const int64_t batch = scores.size(0);
  const int n = as_int("scores: a size", scores.size(1));
  const ScalarType dtype = coordinate_type(scores);
  Tensor values = empty_like_device(scores, {batch, most}, dtype);
  Tensor indices = empty_like_device(scores, {batch, most}, ScalarType::Long);
  Tensor counts = empty_like_device(scores, {batch}, ScalarType::Long);
  Tensor found = empty_like_device(scores, {batch}, ScalarType::Long);
  if (batch == 0) return {values, indices, counts, found};
  const cudaStream_t stream = current_stream(scores);
  Tensor numbers = empty_like_device(scores, {batch}, ScalarType::Int);
  int* number = numbers.mutable_data_ptr<int>();
  const F* data = scores.const_data_ptr<F>();
  STD_CUDA_CHECK(cudaMemsetAsync(number, 0, batch * sizeof(int), stream));
  const int64_t blocks = (int64_t{n} + kCountChunk - 1) / kCountChunk, fills = (batch * std::max(most, int64_t{1}) - 1) / kThreads + 1;
  CHECK_ARGUMENT(batch * blocks < int64_t{1} << 31 && fills < int64_t{1} << 31, "scores: too many for one call");
  if (n > 0) {
    count_kernel<T, F><<<static_cast<int>(batch * blocks), kThreads, 0, stream>>>(
        data, n, static_cast<int>(blocks), static_cast<T>(threshold), number);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  Write<T, F> write{data, nullptr, n, 0, most, number, values.mutable_data_ptr<T>(), indices.mutable_data_ptr<int64_t>()};
  fill_kernel<T><<<static_cast<int>(fills), kThreads, 0, stream>>>(batch, most, number, write.values, write.indices,
                                                                   counts.mutable_data_ptr<int64_t>(),
                                                                   found.mutable_data_ptr<int64_t>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (n == 0 || most == 0) return {values, indices, counts, found};
  if constexpr (std::is_same_v<T, float>) {
    if (n > kSortAtMost && most < n) {
      Tensor selected = empty_like_device(scores, {batch, most}, ScalarType::Long);
      select(one_level(data, n, static_cast<int>(most)), batch, false, selected, stream);
      write.selected = reinterpret_cast<const uint64_t*>(selected.const_data_ptr<int64_t>()), write.selects = most;
      sort_lists(batch, static_cast<int>(most), scores, BySelected{write.selected, most}, write);
      return {values, indices, counts, found};
    }
  }
  sort_lists(batch, n, scores, ByScore<T, F>{data, n}, write);
  return {values, indices, counts, found};
}

Outputs select_candidates(const Tensor& scores, double threshold, int64_t max_candidates) {
  const torch::stable::accelerator::DeviceGuard guard(scores.get_device_index());
  CHECK_ARGUMENT(scores.dim() == 2, "scores must have shape [B, N]");
  CHECK_ARGUMENT(max_candidates >= 0, "max_candidates must not be negative");
  const Tensor s = torch::stable::contiguous(scores);
  Outputs out;
  dispatch_features(s.scalar_type(), [&](auto t, auto f) { out = run<decltype(t), decltype(f)>(s, threshold, max_candidates); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrcnn, CUDA, m) { m.impl("select_candidates", TORCH_BOX(&select_candidates)); }

}  // namespace fastrcnn
