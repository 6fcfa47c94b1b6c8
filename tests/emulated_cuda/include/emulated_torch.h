// torch's own C++ API as the sources of csrc/cuda use it, without a CUDA device: before the names that they are to find.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "emulated_cuda.h"

#undef STD_CUDA_CHECK
#undef STD_CUDA_KERNEL_LAUNCH_CHECK
#define STD_CUDA_CHECK(expression) STD_TORCH_CHECK((expression) == cudaSuccess, #expression)
#define STD_CUDA_KERNEL_LAUNCH_CHECK() ((void)0)
#define aoti_torch_get_current_cuda_stream emulated_current_stream
inline AOTITorchError emulated_current_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}
namespace torch::stable::accelerator {
struct EmulatedDeviceGuard {
  template <class Index>
  explicit EmulatedDeviceGuard(Index) {}
};
}  // namespace torch::stable::accelerator
#define DeviceGuard EmulatedDeviceGuard
