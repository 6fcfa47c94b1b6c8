// A sum over the threads of a block, and over those before each.
#pragma once

#include <cuda_runtime.h>

namespace fastrcnn {

struct Sums {
  int before, all;  // of the threads before this one, of the block
};
template <int kThreads>
__device__ Sums block_sums(int value) {
  constexpr int kWarps = kThreads / 32;
  __shared__ int warp_sum[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = value;
  for (int d = 1; d < 32; d *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, sum, d);
    if (lane >= d) sum += other;
  }
  if (lane == 31) warp_sum[warp] = sum;
  __syncthreads();
  Sums s{sum - value, 0};
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) s.before += warp_sum[w];
    s.all += warp_sum[w];
  }
  __syncthreads();  // warp_sum is free again
  return s;
}

}  // namespace fastrcnn
