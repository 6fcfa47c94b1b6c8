// CUDA on the CPU, enough to run the kernels of csrc/cuda as they stand: every thread of a block is a fiber, blocks run one
// after another in the order of their index. Barriers and warp operations wait for exactly the threads that CUDA would
// wait for, so a barrier that not all threads reach ends in an error instead of a hang. EMULATED_CUDA_ORDER=reverse runs
// the threads of a block from the last to the first: a missing barrier that one order hides, the other shows.
// Not modelled: concurrent blocks, memory order, speed, registers.
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

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

// From here on the sources believe that nvcc compiles them.
#define __CUDACC__ 1
#define __host__
#define __device__
#define __global__
#define __shared__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

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

namespace emulated {

constexpr int kWarp = 32, kStack = 128 << 10, kShared = 227 << 10;

// Puts the callee-saved registers on this stack, leaves its pointer in *save and goes on where `load` was left.
#if !defined(__x86_64__)
#error "the emulator switches stacks with x86-64 instructions"
#endif
constexpr int kSavedRegisters = 6;
__attribute__((naked, noinline)) static void switch_stack(void** save, void* load) {
  asm("push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
      "mov %rsp, (%rdi)\n mov %rsi, %rsp\n"
      "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret");
}

struct Barrier {
  unsigned arrived = 0;
  uint64_t generation = 0;
  int count[2] = {}, any[2] = {};  // of __syncthreads_count and _or, for either parity
};
struct WarpSlot {  // one for each mask that a warp has used
  unsigned mask;
  Barrier barrier;
  alignas(16) unsigned char value[2][kWarp][16];
};
struct Fiber {
  void* stack_pointer;
  dim3 index;
  unsigned linear = 0;
  bool done = false;
  const Barrier* waits_for = nullptr;
  uint64_t generation = 0;
};
struct Block {
  dim3 grid, block, index;
  std::vector<Fiber> fibers;
  std::vector<std::deque<WarpSlot>> warps;
  Barrier barrier;
  unsigned live = 0;
  size_t shared = 0;
  void* scheduler;
  Fiber* self = nullptr;
  const std::function<void()>* body = nullptr;
};
inline Block& block() {
  static Block b;
  return b;
}
inline void* dynamic_shared() {
  alignas(128) static unsigned char memory[kShared];
  return memory;
}
inline char* stack(unsigned i) {
  struct alignas(16) Stack {
    char bytes[kStack];
  };
  static std::deque<Stack> stacks;
  while (stacks.size() <= i) stacks.emplace_back();
  return stacks[i].bytes;
}

[[noreturn]] inline void fail(const char* what) {
  const Block& b = block();
  fprintf(stderr, "emulated CUDA, block (%u, %u, %u), thread %u: %s\n", b.index.x, b.index.y, b.index.z,
          b.self ? b.self->linear : 0, what);
  abort();
}

inline void release(Barrier& b) {
  b.arrived = 0;
  ++b.generation;
  const uint64_t next = b.generation & 1;  // whoever read its last votes has arrived here since
  b.count[next] = 0, b.any[next] = 0;
}
inline void wait(Barrier& b, unsigned expected) {
  Block& block_ = block();
  if (++b.arrived == expected) return release(b);
  block_.self->waits_for = &b;
  block_.self->generation = b.generation;
  switch_stack(&block_.self->stack_pointer, block_.scheduler);
}

inline void fiber_main() {
  Block& b = block();
  (*b.body)();
  b.self->done = true;
  --b.live;
  if (b.live > 0 && b.barrier.arrived == b.live) release(b.barrier);  // threads that have ended count as arrived
  switch_stack(&b.self->stack_pointer, b.scheduler);
}

inline void run_block(Block& b) {
  const unsigned threads = b.block.x * b.block.y * b.block.z;
  static const bool reverse = getenv("EMULATED_CUDA_ORDER") && !strcmp(getenv("EMULATED_CUDA_ORDER"), "reverse");
  b.fibers.resize(threads);
  b.warps.assign((threads + kWarp - 1) / kWarp, {});
  b.barrier = {};
  b.live = threads;
  memset(dynamic_shared(), 0xa5, b.shared);  // shared memory starts undefined
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& f = b.fibers[i];
    f.linear = i;
    f.index = dim3(i % b.block.x, i / b.block.x % b.block.y, i / b.block.x / b.block.y);
    f.done = false;
    f.waits_for = nullptr;
    void** top = reinterpret_cast<void**>(stack(i) + kStack - 16);
    *--top = nullptr;                                // where fiber_main would return to: it never does
    *--top = reinterpret_cast<void*>(&fiber_main);  // where switch_stack returns to
    f.stack_pointer = top - kSavedRegisters;
  }
  while (b.live > 0) {
    bool progress = false;
    for (unsigned k = 0; k < threads; ++k) {
      Fiber& f = b.fibers[reverse ? threads - 1 - k : k];
      if (f.done || (f.waits_for && f.waits_for->generation == f.generation)) continue;
      f.waits_for = nullptr;
      b.self = &f;
      switch_stack(&b.scheduler, f.stack_pointer);
      progress = true;
    }
    if (!progress) fail("deadlock: some threads wait at a barrier or warp operation that the others never reach");
  }
}

template <class Kernel>
void launch(dim3 grid, dim3 threads, size_t shared, const Kernel& kernel) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const unsigned total = threads.x * threads.y * threads.z;
  STD_TORCH_CHECK(grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.y < 65536 && grid.z < 65536, "bad grid");
  STD_TORCH_CHECK(total > 0 && total <= 1024 && threads.z <= 64, "bad block");
  STD_TORCH_CHECK(shared <= kShared, "too much shared memory");
  const std::function<void()> body = kernel;
  Block& b = block();
  b.grid = grid, b.block = threads, b.shared = shared, b.body = &body;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        b.index = dim3(x, y, z);
        run_block(b);
      }
}

inline unsigned lane() { return block().self->linear % kWarp; }
inline WarpSlot& slot(unsigned mask) {
  Block& b = block();
  if (!(mask >> lane() & 1)) fail("a warp operation whose mask leaves out the calling lane");
  auto& slots = b.warps[b.self->linear / kWarp];
  for (WarpSlot& s : slots)
    if (s.mask == mask) return s;
  slots.push_back({mask, {}, {}});
  return slots.back();
}
// Every lane of the mask gives a value and gets them all.
template <class T>
std::array<T, kWarp> gather(unsigned mask, T value) {
  static_assert(sizeof(T) <= 16);
  WarpSlot& s = slot(mask);
  const uint64_t parity = s.barrier.generation & 1;
  memcpy(s.value[parity][lane()], &value, sizeof(T));
  wait(s.barrier, std::popcount(mask));
  std::array<T, kWarp> all{};
  for (int i = 0; i < kWarp; ++i)
    if (mask >> i & 1) memcpy(&all[i], s.value[parity][i], sizeof(T));
  return all;
}
template <class T>
T pick(unsigned mask, T value, int source) {
  if (!(mask >> source & 1)) fail("a shuffle that reads a lane outside its mask");
  return gather(mask, value)[source];
}

}  // namespace emulated

#define threadIdx (::emulated::block().self->index)
#define blockIdx (::emulated::block().index)
#define blockDim (::emulated::block().block)
#define gridDim (::emulated::block().grid)

inline void __syncthreads() { emulated::wait(emulated::block().barrier, emulated::block().live); }
template <class Merge, class Read>
int emulated_vote(Merge merge, Read read) {
  auto& b = emulated::block().barrier;
  const uint64_t parity = b.generation & 1;
  merge(parity);
  emulated::wait(b, emulated::block().live);
  return read(parity);
}
inline int __syncthreads_count(int p) {
  auto& b = emulated::block().barrier;
  return emulated_vote([&](int i) { b.count[i] += p != 0; }, [&](int i) { return b.count[i]; });
}
inline int __syncthreads_or(int p) {
  auto& b = emulated::block().barrier;
  return emulated_vote([&](int i) { b.any[i] |= p != 0; }, [&](int i) { return b.any[i]; });
}

inline void __syncwarp(unsigned mask = 0xffffffffu) { emulated::gather(mask, 0); }
inline unsigned __ballot_sync(unsigned mask, int p) {
  const auto all = emulated::gather(mask, p != 0);
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) bits |= static_cast<unsigned>(all[i]) << i;
  return bits;
}
inline int __any_sync(unsigned mask, int p) { return __ballot_sync(mask, p) != 0; }
template <class T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32) {
  return emulated::pick(mask, v, (emulated::lane() & ~(width - 1)) | (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int other, int width = 32) {
  const int source = emulated::lane() ^ other;
  return emulated::pick(mask, v, (source | (width - 1)) == (static_cast<int>(emulated::lane()) | (width - 1))
                                     ? source : static_cast<int>(emulated::lane()));
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32) {
  const unsigned lane = emulated::lane();
  return emulated::pick(mask, v, (lane & (width - 1)) >= delta ? lane - delta : lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32) {
  const unsigned lane = emulated::lane();
  return emulated::pick(mask, v, (lane & (width - 1)) + delta < static_cast<unsigned>(width) ? lane + delta : lane);
}
template <class T, class F>
T emulated_reduce(unsigned mask, T v, F f) {
  const auto all = emulated::gather(mask, v);
  T result = v;
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) result = f(result, all[i]);
  return result;
}
inline unsigned __reduce_max_sync(unsigned m, unsigned v) { return emulated_reduce(m, v, [](auto a, auto b) { return a < b ? b : a; }); }
inline int __reduce_max_sync(unsigned m, int v) { return emulated_reduce(m, v, [](auto a, auto b) { return a < b ? b : a; }); }

inline void __nanosleep(unsigned) {}
template <class T>
T __ldg(const T* p) { return *p; }
template <class T>
void __stcs(T* p, T v) { *p = v; }

template <class T, class F>
T emulated_atomic(T* p, F f) {
  const T old = *p;
  *p = f(old);
  return old;
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
inline unsigned __float_as_uint(float v) { return std::bit_cast<unsigned>(v); }
inline float __uint_as_float(unsigned v) { return std::bit_cast<float>(v); }
inline long long __double_as_longlong(double v) { return std::bit_cast<long long>(v); }
inline double __longlong_as_double(long long v) { return std::bit_cast<double>(v); }
using std::max;
using std::min;
