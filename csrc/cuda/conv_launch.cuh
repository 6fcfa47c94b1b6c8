// What the convolutions' launchers share.
#pragma once

#include "common.h"

#include <algorithm>

namespace fastrcnn {

inline void check_channels_last(const Tensor& t, const char* name) {
  const int64_t strides[] = {t.size(1) * t.size(2) * t.size(3), 1, t.size(1) * t.size(3), t.size(1)};
  for (int i = 0; i < 4; ++i)
    CHECK_ARGUMENT(t.size(i) < 2 || t.stride(i) == strides[i], name, " must be channels-last");
}

inline bool lies_on(const void* p, int bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

template <class Kernel, class... Arguments>
void launch(Kernel kernel, dim3 grid, int threads, int shared, const Tensor& out, const Arguments&... arguments) {
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared) != cudaSuccess) {
    cudaGetLastError();  // it is told here
    refuse("tile needs ", shared, " bytes of shared memory, more than this card has");
  }
  kernel<<<grid, threads, shared, current_stream(out)>>>(arguments...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace fastrcnn
