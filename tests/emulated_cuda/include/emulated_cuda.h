// CUDA C++ on the CPU, as much of it as the kernels of csrc/cuda use. Not modelled: speed, registers, and memory order, of
// which ThreadSanitizer knows (sanitize.sh).
#pragma once

#include "../device.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>

// CUDA's have overloads for float; those of <cmath> are in std alone, and a float would count as a double.
using std::fabs, std::fma;
inline float fmin(float a, float b) { return a < b || b != b ? a : b; }  // not libm's: most of an emulated NMS's time
inline float fmax(float a, float b) { return a > b || b != b ? a : b; }

// From here on the sources believe that nvcc compiles them.
#define __CUDACC__ 1
#define __host__
#define __device__
#define __global__
#define __shared__ static thread_local
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

#define EMULATED_VECTOR(T, name, alignment)                                       \
  struct alignas(alignment) name##2 {T x, y; };                                   \
  struct name##3 {T x, y, z; };                                                   \
  struct alignas(2 * alignment) name##4 {T x, y, z, w; };                         \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                      \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }              \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATED_VECTOR(int, int, 8)
EMULATED_VECTOR(unsigned, uint, 8)
EMULATED_VECTOR(float, float, 8)
#undef EMULATED_VECTOR

using cudaStream_t = void*;
using cudaError_t = int;
enum cudaMemcpyKind { cudaMemcpyDeviceToHost };
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  memset(p, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) { return cudaSuccess; }

#define threadIdx (::emulated::here.self->index)
#define blockIdx (::emulated::here.index)
#define blockDim (::emulated::here.block)
#define gridDim (::emulated::here.grid)

inline void __syncthreads() { emulated::sync_block(false); }
inline int __syncthreads_count(int p) { return emulated::sync_block(p != 0); }
inline int __syncthreads_or(int p) { return emulated::sync_block(p != 0) != 0; }
inline void __nanosleep(unsigned) { emulated::sleep(); }

namespace emulated {

inline int lane() { return here.self->linear % kWarp; }
// What the lanes of a mask give each other.
template <class T>
struct Given {
  static_assert(sizeof(T) <= sizeof(LaneValue) && std::is_trivially_copyable_v<T>);
  const LaneValue* values;
  Given(unsigned mask, T value) {
    LaneValue mine{};
    memcpy(&mine, &value, sizeof(T));
    values = sync_warp(mask, mine, false);  // a shuffle or vote orders no other memory
  }
  T operator[](int lane) const {
    T value;
    memcpy(&value, &values[lane], sizeof(T));
    return value;
  }
};
template <class T>
T pick(unsigned mask, T value, int source) {
  if (!(mask >> source & 1)) fail("a shuffle that reads a lane outside its mask");
  return Given<T>(mask, value)[source];
}
template <class T, class F>
T reduce(unsigned mask, T value, F f) {
  const Given<T> all(mask, value);
  T result = value;
  for (int i = 0; i < kWarp; ++i)
    if (mask >> i & 1) result = f(result, all[i]);
  return result;
}

}  // namespace emulated

#include "emulated_mma.h"

inline void __syncwarp(unsigned mask = 0xffffffffu) { emulated::sync_warp(mask, {}, true); }
inline unsigned __ballot_sync(unsigned mask, int p) {
  return emulated::reduce(mask, unsigned{p != 0} << emulated::lane(), [](unsigned a, unsigned b) { return a | b; });
}
inline int __any_sync(unsigned mask, int p) { return __ballot_sync(mask, p) != 0; }
template <class T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32) {
  return emulated::pick(mask, v, (emulated::lane() & ~(width - 1)) | (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int other, int width = 32) {
  const int lane = emulated::lane(), source = lane ^ other;
  return emulated::pick(mask, v, (source | (width - 1)) == (lane | (width - 1)) ? source : lane);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, int delta, int width = 32) {
  const int lane = emulated::lane();
  return emulated::pick(mask, v, (lane & (width - 1)) >= delta ? lane - delta : lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, int delta, int width = 32) {
  const int lane = emulated::lane();
  return emulated::pick(mask, v, (lane & (width - 1)) + delta < width ? lane + delta : lane);
}
template <class T>
T __reduce_max_sync(unsigned mask, T v) { return emulated::reduce(mask, v, [](T a, T b) { return a < b ? b : a; }); }

template <class T>
T __ldg(const T* p) { return *p; }
template <class T>
void __stcs(T* p, T v) { *p = v; }

template <class T, class F>
T emulated_atomic(T* p, F f) {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  static_assert(sizeof(T) == sizeof(Bits));
  Bits* const bits = reinterpret_cast<Bits*>(p);
  Bits old = __atomic_load_n(bits, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(bits, &old, std::bit_cast<Bits>(f(std::bit_cast<T>(old))), false, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED)) {}
  return std::bit_cast<T>(old);
}
template <class T, class U>
T atomicAdd(T* p, U v) { return emulated_atomic(p, [&](T old) { return static_cast<T>(old + v); }); }
template <class T, class U>
T atomicMax(T* p, U v) { return emulated_atomic(p, [&](T old) { return old < static_cast<T>(v) ? static_cast<T>(v) : old; }); }
template <class T, class U>
T atomicOr(T* p, U v) { return emulated_atomic(p, [&](T old) { return static_cast<T>(old | v); }); }

inline int __popc(unsigned v) { return std::popcount(v); }
inline int __clz(int v) { return std::countl_zero(static_cast<unsigned>(v)); }
inline int __ffs(int v) { return v == 0 ? 0 : std::countr_zero(static_cast<unsigned>(v)) + 1; }
inline unsigned __vmaxu2(unsigned a, unsigned b) {
  return std::max(a >> 16, b >> 16) << 16 | std::max(a & 0xffffu, b & 0xffffu);
}
inline unsigned __float_as_uint(float v) { return std::bit_cast<unsigned>(v); }
inline float __uint_as_float(unsigned v) { return std::bit_cast<float>(v); }
inline long long __double_as_longlong(double v) { return std::bit_cast<long long>(v); }
inline double __longlong_as_double(long long v) { return std::bit_cast<double>(v); }
using std::max;
using std::min;
