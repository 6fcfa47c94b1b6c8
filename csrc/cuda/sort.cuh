// Stable ascending sort of a batch of lists of 64-bit keys, as the kernels that rank boxes need it: the keys come from a
// functor and each element's place goes to another, so that neither keys nor permutations are passed through memory twice.
//
// torch.sort takes 29 us for 1,000 keys on an H100 and 60 us for 10,000, most of it launches. Lists of up to kSortAtMost
// are therefore sorted here in two launches (one up to kSortChunk): every block sorts a chunk in shared memory, then every
// element finds its place by a binary search in the other chunks. Longer lists go to torch's radix sort.
#pragma once

#include "common.h"

#include <torch/csrc/stable/macros.h>

#include <array>

namespace fastrcnn {

constexpr int kSortChunk = 1024, kSortAtMost = 16 * kSortChunk, kSortThreads = 256;

struct SortKey {
  uint64_t high;
  uint32_t low;  // the element's index: no two keys of a list are equal
};
HOST_DEVICE bool before(const SortKey& a, const SortKey& b) {
  return a.high < b.high || (a.high == b.high && a.low < b.low);
}

// One thread a key, bitonic: strides inside a warp by shuffles, wider ones through shared memory.
__device__ inline SortKey sorted_in_block(SortKey key, SortKey* shared) {
  const int i = threadIdx.x;
  for (int size = 2; size <= kSortChunk; size *= 2) {
    for (int stride = size / 2; stride > 0; stride /= 2) {
      SortKey other;
      if (stride < 32) {
        other.high = __shfl_xor_sync(0xffffffffu, static_cast<unsigned long long>(key.high), stride);
        other.low = __shfl_xor_sync(0xffffffffu, key.low, stride);
      } else {
        shared[i] = key;
        __syncthreads();
        other = shared[i ^ stride];
        __syncthreads();
      }
      const bool wants_smaller = ((i & size) == 0) == ((i & stride) == 0);
      if (wants_smaller == before(other, key)) key = other;
    }
  }
  return key;
}

// key(list, i) -> uint64_t; emit(list, place, i) is called once for every element.
template <class MakeKey, class Emit>
__global__ void __launch_bounds__(kSortChunk) sort_chunks_kernel(int n, int chunks, MakeKey key, Emit emit,
                                                                 SortKey* sorted) {
  __shared__ SortKey shared[kSortChunk];
  const int list = blockIdx.x / chunks, begin = blockIdx.x % chunks * kSortChunk, i = begin + threadIdx.x;
  SortKey mine{~uint64_t{0}, ~uint32_t{0}};
  if (i < n) mine = {key(list, i), static_cast<uint32_t>(i)};
  mine = sorted_in_block(mine, shared);
  if (chunks > 1) {
    sorted[(static_cast<int64_t>(list) * chunks * kSortChunk) + i] = mine;
  } else if (i < n) {
    emit(list, i, static_cast<int>(mine.low));
  }
}

// An element's place is its place in its own chunk plus, for each other chunk, how many of that chunk come before it.
template <class Emit>
__global__ void __launch_bounds__(kSortThreads) merge_chunks_kernel(int n, int chunks, const SortKey* sorted, Emit emit) {
  const int blocks = chunks * kSortChunk / kSortThreads, list = blockIdx.x / blocks;
  const int at = blockIdx.x % blocks * kSortThreads + threadIdx.x, own = at / kSortChunk;
  const SortKey* lists = sorted + static_cast<int64_t>(list) * chunks * kSortChunk;
  const SortKey mine = lists[at];
  if (mine.low == ~uint32_t{0}) return;  // filling of the last chunk
  int place = at % kSortChunk;
  for (int c = 0; c < chunks; ++c) {
    if (c == own) continue;
    const SortKey* chunk = lists + c * kSortChunk;
    int found = 0;
    for (int step = kSortChunk / 2; step > 0; step /= 2)
      if (before(chunk[found + step - 1], mine)) found += step;
    place += found + before(chunk[found], mine);
  }
  emit(list, place, static_cast<int>(mine.low));
}

template <class MakeKey>
__global__ void __launch_bounds__(kSortThreads) keys_kernel(int64_t total, int n, MakeKey key, int64_t* keys) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kSortThreads + threadIdx.x;
  if (i < total) keys[i] = static_cast<int64_t>(key(static_cast<int>(i / n), static_cast<int>(i % n)) ^ uint64_t{1} << 63);
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

// Sorts `lists` lists of n > 0 elements on the device and stream of `like`.
template <class MakeKey, class Emit>
void sort_lists(int64_t lists, int n, const Tensor& like, MakeKey key, Emit emit) {
  const cudaStream_t stream = current_stream(like);
  const int64_t total = lists * n;
  if (n > kSortAtMost) {
    const int blocks = static_cast<int>((total + kSortThreads - 1) / kSortThreads);
    Tensor keys = empty_like_device(like, {lists, n}, ScalarType::Long);
    keys_kernel<MakeKey><<<blocks, kSortThreads, 0, stream>>>(total, n, key, keys.mutable_data_ptr<int64_t>());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    const auto [sorted, order] = stable_sort(keys);
    emit_kernel<Emit><<<blocks, kSortThreads, 0, stream>>>(total, n, order.const_data_ptr<int64_t>(), emit);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    return;
  }
  const int chunks = (n + kSortChunk - 1) / kSortChunk;
  const int64_t words = chunks > 1 ? lists * chunks * kSortChunk * static_cast<int64_t>(sizeof(SortKey) / 8) : 0;
  Tensor scratch = empty_like_device(like, {words}, ScalarType::Long);
  auto* sorted = reinterpret_cast<SortKey*>(scratch.mutable_data_ptr<int64_t>());
  sort_chunks_kernel<MakeKey, Emit><<<static_cast<int>(lists * chunks), kSortChunk, 0, stream>>>(n, chunks, key, emit, sorted);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (chunks == 1) return;
  const int blocks = static_cast<int>(lists * chunks * (kSortChunk / kSortThreads));
  merge_chunks_kernel<Emit><<<blocks, kSortThreads, 0, stream>>>(n, chunks, sorted, emit);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace fastrcnn
