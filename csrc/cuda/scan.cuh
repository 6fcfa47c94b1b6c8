// A sum over the threads of a block, and over those before each.
#pragma once

#include <cuda_runtime.h>

namespace fastrcnn {

struct Sums {
  int before, all;  // of the threads before this one, of the block
};
// `before` of the threads before this one in its warp, `up_to` with its own. All threads of the block call it.
template <int kThreads>
__device__ __forceinline__ Sums across_warps(int before, int up_to) {
  __shared__ int warp_sum[kThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (lane == 31) warp_sum[warp] = up_to;
  __syncthreads();
  Sums s{before, 0};
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) {
    if (w < warp) s.before += warp_sum[w];
    s.all += warp_sum[w];
  }
  __syncthreads();  // warp_sum is free again
  return s;
}

template <int kThreads>
__device__ __forceinline__ Sums block_sums(int value) {
  const int lane = threadIdx.x % 32;
  int sum = value;
  for (int d = 1; d < 32; d *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, sum, d);
    if (lane >= d) sum += other;
  }
  return across_warps<kThreads>(sum - value, sum);
}

// The same of values of 0 and 1: a thread's place among those that vote, and how many do.
template <int kThreads>
__device__ __forceinline__ Sums block_votes(bool vote) {
  const unsigned votes = __ballot_sync(0xffffffffu, vote);
  const int before = __popc(votes & ((1u << threadIdx.x % 32) - 1));
  return across_warps<kThreads>(before, before + vote);
}

}  // namespace fastrcnn
