// Stable ascending sort of a batch of lists, as the kernels that rank boxes need it: the keys, of 32 or 64 bits, come
// from a functor and each element's place goes to another, so that neither keys nor permutations pass through memory
// twice.
//
// torch.sort takes 29 us for 1,000 keys on an H100 and 60 us for 10,000, most of it launches. Lists of up to kSortAtMost
// are therefore sorted here in two launches (one up to kSortChunk): every block sorts a chunk in shared memory, then every
// element finds its place by a binary search in the other chunks. Longer lists go to torch's radix sort.
#pragma once

#include "common.h"

#include <torch/csrc/stable/macros.h>

#include <array>
#include <type_traits>

namespace fastrcnn {

constexpr int kSortChunk = 1024, kSortAtMost = 16 * kSortChunk, kSortThreads = 256;

// A key and the element's index, so that no two of a list are equal. Both fit one word where the key has 32 bits.
template <class Key>
struct Sortable {
  uint64_t high;
  uint32_t low;
  __device__ static Sortable of(uint64_t key, uint32_t index) { return {key, index}; }
  __device__ uint32_t index() const { return low; }
  __device__ bool before(const Sortable& o) const {
    return high < o.high | (high == o.high & low < o.low);  // without a branch
  }
  __device__ void take(bool wanted, const Sortable& o) { high = wanted ? o.high : high, low = wanted ? o.low : low; }
  __device__ Sortable of_lane(int stride) const {
    return {__shfl_xor_sync(0xffffffffu, static_cast<unsigned long long>(high), stride),
            __shfl_xor_sync(0xffffffffu, low, stride)};
  }
};
template <>
struct Sortable<uint32_t> {
  uint64_t word;
  __device__ static Sortable of(uint32_t key, uint32_t index) { return {static_cast<uint64_t>(key) << 32 | index}; }
  __device__ uint32_t index() const { return static_cast<uint32_t>(word); }
  __device__ bool before(const Sortable& o) const { return word < o.word; }
  __device__ void take(bool wanted, const Sortable& o) { word = wanted ? o.word : word; }
  __device__ Sortable of_lane(int stride) const {
    return {__shfl_xor_sync(0xffffffffu, static_cast<unsigned long long>(word), stride)};
  }
};
template <class MakeKey>
using SortKey = std::invoke_result_t<MakeKey, int, int>;

// One thread an element, bitonic: strides inside a warp by shuffles, wider ones through either half of shared memory in
// turn, so that one barrier a step is enough.
template <class S>
__device__ S sorted_in_block(S mine, S (&shared)[2][kSortChunk]) {
  const int i = threadIdx.x;
  int half = 0;
  for (int size = 2; size <= kSortChunk; size *= 2) {
    for (int stride = size / 2; stride > 0; stride /= 2) {
      S other;
      if (stride < 32) {
        other = mine.of_lane(stride);
      } else {
        shared[half][i] = mine;
        __syncthreads();
        other = shared[half][i ^ stride];
        half ^= 1;
      }
      const bool wants_smaller = ((i & size) == 0) == ((i & stride) == 0);
      mine.take(wants_smaller == other.before(mine), other);
    }
  }
  return mine;
}

// key(list, i) -> uint32_t or uint64_t; emit(list, place, i) is called once for every element. Lists whose number in
// `done` is not 0 are left alone.
template <class MakeKey, class Emit>
__global__ void __launch_bounds__(kSortChunk)
    sort_chunks_kernel(int n, int chunks, MakeKey key, Emit emit, Sortable<SortKey<MakeKey>>* sorted, const int* done) {
  using S = Sortable<SortKey<MakeKey>>;
  __shared__ S shared[2][kSortChunk];
  const int list = blockIdx.x / chunks, begin = blockIdx.x % chunks * kSortChunk, i = begin + threadIdx.x;
  if (done != nullptr && done[list] != 0) return;
  S mine = S::of(~SortKey<MakeKey>{0}, ~uint32_t{0});
  if (i < n) mine = S::of(key(list, i), static_cast<uint32_t>(i));
  mine = sorted_in_block(mine, shared);
  if (chunks > 1) {
    sorted[(static_cast<int64_t>(list) * chunks * kSortChunk) + i] = mine;
  } else if (i < n) {
    emit(list, i, static_cast<int>(mine.index()));
  }
}

// An element's place is its place in its own chunk plus, for each other chunk, how many of that chunk come before it. The
// other chunks pass through shared memory, each loaded while the one before it is searched.
template <class S, class Emit>
__global__ void __launch_bounds__(kSortThreads)
    merge_chunks_kernel(int chunks, const S* sorted, Emit emit, const int* done) {
  constexpr int kOwn = kSortChunk / kSortThreads;
  __shared__ S chunk[kSortChunk];
  const int blocks = chunks * kOwn, list = blockIdx.x / blocks, i = threadIdx.x;
  if (done != nullptr && done[list] != 0) return;
  const int at = blockIdx.x % blocks * kSortThreads + i, own = at / kSortChunk;  // `own` is the same for the whole block
  const S* lists = sorted + static_cast<int64_t>(list) * chunks * kSortChunk;
  const S mine = lists[at];
  S ahead[kOwn];
  const auto load = [&](int c) {
#pragma unroll
    for (int k = 0; k < kOwn; ++k) ahead[k] = lists[c * kSortChunk + k * kSortThreads + i];
  };
  int place = at % kSortChunk;
  load((own + 1) % chunks);
  for (int c = 1; c < chunks; ++c) {
    __syncthreads();  // the chunk before has been searched
#pragma unroll
    for (int k = 0; k < kOwn; ++k) chunk[k * kSortThreads + i] = ahead[k];
    __syncthreads();
    if (c + 1 < chunks) load((own + c + 1) % chunks);
    int found = 0;
    for (int step = kSortChunk / 2; step > 0; step /= 2)
      if (chunk[found + step - 1].before(mine)) found += step;
    place += found + chunk[found].before(mine);
  }
  if (mine.index() != ~uint32_t{0}) emit(list, place, static_cast<int>(mine.index()));  // not the last chunk's filling
}

// Signed, since torch sorts no unsigned integers.
template <class MakeKey>
using TorchKey = std::make_signed_t<SortKey<MakeKey>>;

template <class MakeKey>
__global__ void __launch_bounds__(kSortThreads) keys_kernel(int64_t total, int n, MakeKey key, TorchKey<MakeKey>* keys) {
  using Key = SortKey<MakeKey>;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kSortThreads + threadIdx.x;
  if (i < total)
    keys[i] = static_cast<TorchKey<MakeKey>>(key(static_cast<int>(i / n), static_cast<int>(i % n)) ^ ~(~Key{0} >> 1));
}
template <class Emit>
__global__ void __launch_bounds__(kSortThreads) emit_kernel(int64_t total, int n, const int64_t* order, Emit emit) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kSortThreads + threadIdx.x;
  if (i < total) emit(static_cast<int>(i / n), static_cast<int>(i % n), static_cast<int>(order[i]));
}

// torch.sort(values, stable=True): (sorted, order)
inline std::array<Tensor, 2> stable_sort(const Tensor& values) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  StableIValue stack[4] = {from(values), from(std::optional<bool>(true)), from(int64_t{-1}), from(false)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack, TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

// Sorts `lists` lists of n > 0 elements on the device and stream of `like`. done: see sort_chunks_kernel; only for lists of
// up to kSortAtMost.
template <class MakeKey, class Emit>
void sort_lists(int64_t lists, int n, const Tensor& like, MakeKey key, Emit emit, const int* done = nullptr) {
  using S = Sortable<SortKey<MakeKey>>;
  const cudaStream_t stream = current_stream(like);
  const int64_t total = lists * n;
  if (n > kSortAtMost) {
    const int blocks = static_cast<int>((total + kSortThreads - 1) / kSortThreads);
    constexpr bool kShort = sizeof(TorchKey<MakeKey>) == 4;
    Tensor keys = empty_like_device(like, {lists, n}, kShort ? ScalarType::Int : ScalarType::Long);
    keys_kernel<MakeKey>
        <<<blocks, kSortThreads, 0, stream>>>(total, n, key, keys.mutable_data_ptr<TorchKey<MakeKey>>());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    const auto [sorted, order] = stable_sort(keys);
    emit_kernel<Emit><<<blocks, kSortThreads, 0, stream>>>(total, n, order.const_data_ptr<int64_t>(), emit);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    return;
  }
  const int chunks = (n + kSortChunk - 1) / kSortChunk;
  const int64_t words = chunks > 1 ? lists * chunks * kSortChunk * static_cast<int64_t>(sizeof(S) / 8) : 0;
  Tensor scratch = empty_like_device(like, {words}, ScalarType::Long);
  auto* sorted = reinterpret_cast<S*>(scratch.mutable_data_ptr<int64_t>());
  sort_chunks_kernel<MakeKey, Emit>
      <<<static_cast<int>(lists * chunks), kSortChunk, 0, stream>>>(n, chunks, key, emit, sorted, done);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (chunks == 1) return;
  const int blocks = static_cast<int>(lists * chunks * (kSortChunk / kSortThreads));
  merge_chunks_kernel<S, Emit><<<blocks, kSortThreads, 0, stream>>>(chunks, sorted, emit, done);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace fastrcnn
