// Tensor cores and the copies that feed them, one instruction a function: inline PTX of sm_80 and later under nvcc, the
// emulator's model of it (tests/emulated_cuda) elsewhere. A step of a product is 32 bytes deep: 16 numbers of half
// precision, 8 of TF32.
#pragma once

#include "common.h"

#include <type_traits>

namespace fastrcnn {

// False while nvcc compiles for a card without these instructions; kernels are then empty.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kHasMma = false;
#else
constexpr bool kHasMma = true;
#endif

template <class F>
constexpr int kStepDepth = 32 / sizeof(F);

#if defined(__NVCC__)

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define FASTRCNN_PTX(...) __trap()
#else
#define FASTRCNN_PTX(...) asm volatile(__VA_ARGS__)
#endif

__device__ __forceinline__ unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

// Four 8 x 16-byte matrices; lane l gives the address of row l % 8 of matrix l / 8 and gets, of each matrix, word l % 4 of
// row l / 4.
__device__ __forceinline__ void load_matrices(unsigned (&r)[4], const void* row) {
  FASTRCNN_PTX("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// c += a b: a 16 rows, b 8 columns, one step deep. With g = lane / 4 and t = lane % 4: a[i] is word t + 4 (i / 2) of row
// g + 8 (i % 2), b[i] word t + 4 i of column g, c[i] row g + 8 (i / 2) of column 2 t + i % 2.
template <class F>
__device__ __forceinline__ void multiply_add(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#define FASTRCNN_MMA(shape, type)                                                                                  \
  FASTRCNN_PTX("mma.sync.aligned." shape ".row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, " \
               "{%8, %9}, {%0, %1, %2, %3};"                                                                       \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                    \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (std::is_same_v<F, BFloat16>) {
    FASTRCNN_MMA("m16n8k16", "bf16");
  } else if constexpr (std::is_same_v<F, Half>) {
    FASTRCNN_MMA("m16n8k16", "f16");
  } else {
    static_assert(std::is_same_v<F, float>);
    FASTRCNN_MMA("m16n8k8", "tf32");
  }
#undef FASTRCNN_MMA
}

// The bits of the nearest TF32, ties away from zero; the low 13, which a TF32 has not, are zero.
__device__ __forceinline__ unsigned round_to_tf32(float x) {
  unsigned rounded = 0;
  FASTRCNN_PTX("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(x));
  return rounded & 0xffffe000u;
}

// 16 bytes of global memory to shared memory, or 16 zeros (`from` is then not read), at some time until the thread waits
// for the copy's group.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool zeros) {
  FASTRCNN_PTX("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(zeros ? 0 : 16)
               : "memory");
}
// 4 bytes likewise.
__device__ __forceinline__ void copy_word_async(void* to, const void* from, bool zeros) {
  FASTRCNN_PTX("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(zeros ? 0 : 4)
               : "memory");
}
// The thread's copies since the last commit are a group.
__device__ __forceinline__ void commit_copies() { FASTRCNN_PTX("cp.async.commit_group;" ::: "memory"); }
// Until all groups of this thread but the last kPending are done; what other threads copied takes a barrier as well.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  FASTRCNN_PTX("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
#undef FASTRCNN_PTX

#else

inline void load_matrices(unsigned (&r)[4], const void* row) { emulated::load_matrices(r, row); }
template <class F>
void multiply_add(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  emulated::multiply_add<F>(c, a, b);
}
inline unsigned round_to_tf32(float x) { return emulated::round_to_tf32(x); }
inline void copy_async(void* to, const void* from, bool zeros) { emulated::copy_async(to, from, 16, zeros); }
inline void copy_word_async(void* to, const void* from, bool zeros) { emulated::copy_async(to, from, 4, zeros); }
inline void commit_copies() { emulated::commit_copies(); }
template <int kPending>
void wait_for_copies() {
  emulated::wait_for_copies(kPending);
}

#endif

}  // namespace fastrcnn
