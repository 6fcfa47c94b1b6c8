// What every kernel file needs: the stable tensor type, argument checks, dtype dispatch, host/device and SIMD markers.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#define HOST_DEVICE __host__ __device__ __forceinline__
#if !defined(STABLE_TORCH_ERROR_CODE_CHECK)  // its name before torch 2.12
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif
#else
#define HOST_DEVICE inline __attribute__((always_inline))
#endif

// One body, three instruction sets, chosen when the library loads: the build stays portable within its architecture.
// Mark the plain function that holds the loop, not its caller: a lambda would not inherit the target. ThreadSanitizer gets
// one: it instruments the function that chooses, too, which runs before the sanitizer's own symbols are bound.
#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__) && defined(__GNUC__) && __GNUC__ >= 12 && \
    !defined(__CUDACC__) && !defined(__SANITIZE_THREAD__)
#define SIMD_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SIMD_CLONES
#endif

namespace fastrcnn {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A wrong argument is a ValueError in Python, in the words of the check and without its place in the sources.
template <class... Parts>
[[noreturn]] inline void refuse(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}
#define CHECK_ARGUMENT(condition, ...)                 \
  do {                                                 \
    if (!(condition)) ::fastrcnn::refuse(__VA_ARGS__); \
  } while (false)

// Each check prints the expected shape from its own text: CHECK_SHAPE(boxes, n, 4).
template <class... Dims>
inline void check_shape(const Tensor& t, const char* name, const char* expected, Dims... dims) {
  const int64_t want[] = {static_cast<int64_t>(dims)...};
  bool ok = t.dim() == static_cast<int64_t>(sizeof...(dims));
  for (int64_t i = 0; ok && i < t.dim(); ++i) ok = t.size(i) == want[i];
  CHECK_ARGUMENT(ok, name, " must have shape [", expected, "]");
}
#define CHECK_SHAPE(t, ...) ::fastrcnn::check_shape(t, #t, #__VA_ARGS__, __VA_ARGS__)

// Box and score arithmetic runs in double for double tensors and in float for every other dtype.
inline ScalarType coordinate_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// `n` as the int that kernels count in.
inline int as_int(const char* name, int64_t n) {
  CHECK_ARGUMENT(n == static_cast<int>(n), name, " must fit 32 bits, got ", n);
  return static_cast<int>(n);
}

inline Tensor contiguous_as(const Tensor& t, ScalarType dtype) {
  return torch::stable::contiguous(t.scalar_type() == dtype ? t : torch::stable::to(t, dtype));
}

inline Tensor empty_like_device(const Tensor& like, std::vector<int64_t> shape, ScalarType dtype,
                                std::optional<MemoryFormat> format = std::nullopt) {
  return torch::stable::empty(shape, dtype, std::nullopt, like.device(), std::nullopt, format);
}

// run(T(), F()) for arithmetic in T on features of F.
template <class Run>
void dispatch_features(ScalarType dtype, Run run) {
  if (dtype == ScalarType::Double) return run(double(), double());
  if (dtype == ScalarType::Float) return run(float(), float());
  if (dtype == ScalarType::BFloat16) return run(float(), BFloat16());
  CHECK_ARGUMENT(dtype == ScalarType::Half, "input must be float64, float32, float16 or bfloat16");
  run(float(), Half());
}

#if defined(__CUDACC__)
inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}
#endif

}  // namespace fastrcnn
