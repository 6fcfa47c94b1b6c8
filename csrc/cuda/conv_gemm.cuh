// Convolution as a product of matrices that nobody writes down: pixels of the output x (kernel position, input channel) x
// output channels. A block makes one tile; its slices, 128 bytes deep, come through a ring of stages in shared memory that
// cp.async fills while the tensor cores work on the oldest.
#pragma once

#include "conv_tile.cuh"

namespace fastrcnn {

// The input under a pixel of the output: where the kernel's first position lies, which may be outside the map, and which of
// the kernel's rows (bit 16 and up) and columns (bit 0 and up) are inside. Of no row is the 16th.
constexpr int kMostPositions = 15;
struct alignas(16) Row {
  const void* first;
  unsigned inside;
};

__device__ __forceinline__ unsigned positions_inside(int begin, int step, int count, int size) {
  unsigned bits = 0;
  for (int i = 0; i < count; ++i, begin += step) bits |= static_cast<unsigned>(begin >= 0 && begin < size) << i;
  return bits;
}

template <class F>
__device__ __forceinline__ Row row_of_pixel(const Conv& p, int64_t pixel, int group) {
  if (pixel >= p.pixels) return {p.input, 0};
  const int64_t line = pixel / p.out_width, image = line / p.out_height;
  const int y = static_cast<int>(line - image * p.out_height) * p.stride_h - p.padding_h;
  const int x = static_cast<int>(pixel - line * p.out_width) * p.stride_w - p.padding_w;
  const int64_t offset = ((image * p.height + y) * p.width + x) * p.channels + int64_t{group} * p.group_channels;
  return {static_cast<const F*>(p.input) + offset, positions_inside(y, p.dilation_h, p.kernel_h, p.height) << 16 |
                                                       positions_inside(x, p.dilation_w, p.kernel_w, p.width)};
}

// The kernel's position and the channel that a depth stands for.
struct Depth {
  int channel, column, row;
  __device__ __forceinline__ void advance(const Conv& p, int by) {
    for (channel += by; channel >= p.group_channels; channel -= p.group_channels) {
      if (++column == p.kernel_w) column = 0, ++row;
    }
  }
  // From a row's first number.
  __device__ __forceinline__ int64_t offset(const Conv& p) const {
    return (int64_t{row} * p.dilation_h * p.width + int64_t{column} * p.dilation_w) * p.channels + channel;
  }
  // Its bits in Row::inside; beyond the depth that of a row which there is not.
  __device__ __forceinline__ unsigned bits() const { return 0x10000u << min(row, kMostPositions) | 1u << column; }
};

// One chunk of the input where groups are no whole chunks: number by number.
template <class F>
__device__ __forceinline__ void gather_chunk(const Conv& p, void* to, const Row& row, Depth at) {
  F values[kPack<F>];
#pragma unroll 1
  for (int v = 0; v < kPack<F>; ++v, at.advance(p, 1)) {
    const bool zero = (at.bits() & ~row.inside) != 0;
    values[v] = zero ? F(0) : static_cast<const F*>(row.first)[at.offset(p)];
  }
  memcpy(to, values, kChunkBytes);
}

// A thread loads the same chunk of every kRowStep-th row.
template <class T>
constexpr int kRowStep = T::kThreads / kRowChunks;

// This thread's chunks of one slice: of the pixels' rows, then of the weight's, the first of which begins at `weight`;
// there are `columns` of them.
template <class F, class T, bool kPacked>
__device__ __forceinline__ void load_slice(const Conv& p, unsigned char* stage, const Row (&rows)[T::kM / kRowStep<T>],
                                           const Depth& at, int depth, const F* weight, int columns) {
  constexpr int kStep = kRowStep<T>;
  static_assert(kStep % kRowChunks == 0);
  const int first = threadIdx.x / kRowChunks;
  unsigned char* const to = stage + chunk_offset(first, threadIdx.x % kRowChunks);
  const int64_t offset = at.offset(p);
  const unsigned bits = at.bits();
#pragma unroll
  for (int i = 0; i < T::kM / kStep; ++i) {
    unsigned char* const there = to + i * kStep * kRowBytes;
    if constexpr (kPacked) {
      copy_async(there, static_cast<const F*>(rows[i].first) + offset, (bits & ~rows[i].inside) != 0);
    } else {
      gather_chunk<F>(p, there, rows[i], at);
    }
  }
  const F* from = weight + int64_t{first} * p.depth + depth;
#pragma unroll
  for (int i = 0; i < T::kN / kStep; ++i, from += int64_t{kStep} * p.depth) {
    unsigned char* const there = to + (T::kM + i * kStep) * kRowBytes;
    const bool inside = first + i * kStep < columns;
    if constexpr (kPacked) {
      copy_async(there, from, !(inside & (depth < p.depth)));
    } else {
      F values[kPack<F>];
      for (int v = 0; v < kPack<F>; ++v) values[v] = inside && depth + v < p.depth ? from[v] : F(0);
      memcpy(there, values, kChunkBytes);
    }
  }
}

template <class F, class T>
__device__ __forceinline__ void multiply_slice(typename T::Sums& sums, const unsigned char* stage) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = warp / T::kWarpsN * T::kWarpM + row_of_a(lane);
  const int column = warp % T::kWarpsN * T::kWarpN + row_of_b(lane);
#pragma unroll
  for (int step = 0; step < kRowDepth<F> / kStepDepth<F>; ++step) {
    Operand<F, 4> a[T::kFragmentsM];
    Operand<F, 2> b[T::kFragmentsN];
#pragma unroll
    for (int m = 0; m < T::kFragmentsM; ++m)
      load_a(a[m], stage + chunk_offset(row + 16 * m, 2 * step + chunk_of_a(lane)));
#pragma unroll
    for (int n = 0; n < T::kFragmentsN; n += 2)
      load_b(b[n], b[n + 1], stage + T::kM * kRowBytes + chunk_offset(column + 8 * n, 2 * step + chunk_of_b(lane)));
#pragma unroll
    for (int m = 0; m < T::kFragmentsM; ++m)
#pragma unroll
      for (int n = 0; n < T::kFragmentsN; ++n) sums[m][n].add_product(a[m], b[n]);
  }
}

// Grid: (tiles of pixels x tiles of the group's outputs, the latter varying faster; groups).
template <class F, class T, bool kPacked>
__global__ void __launch_bounds__(T::kThreads) gemm_kernel(const __grid_constant__ Conv p) {
  if constexpr (kHasMma) {
    extern __shared__ __align__(128) unsigned char memory[];
    __shared__ Row all_rows[T::kM];
    const int64_t first = static_cast<int64_t>(blockIdx.x / p.column_tiles) * T::kM;
    const int column = blockIdx.x % p.column_tiles * T::kN, group = blockIdx.y;
    for (int row = threadIdx.x; row < T::kM; row += T::kThreads) all_rows[row] = row_of_pixel<F>(p, first + row, group);
    __syncthreads();
    Row rows[T::kM / kRowStep<T>];
#pragma unroll
    for (int i = 0; i < T::kM / kRowStep<T>; ++i) rows[i] = all_rows[threadIdx.x / kRowChunks + i * kRowStep<T>];

    const int first_output = group * p.group_outputs + column;
    const F* const weight = static_cast<const F*>(p.weight) + static_cast<int64_t>(first_output) * p.depth;
    const int columns = p.group_outputs - column, slices = (p.depth + kRowDepth<F> - 1) / kRowDepth<F>;
    Depth at{0, 0, 0};
    int depth = threadIdx.x % kRowChunks * kPack<F>, left = slices;
    at.advance(p, depth);
    unsigned char *next = memory, *const end = memory + T::kStages * T::kStageBytes;
    const auto load_next = [&] {
      if (left > 0) {
        load_slice<F, T, kPacked>(p, next, rows, at, depth, weight, columns);
        at.advance(p, kRowDepth<F>);
        depth += kRowDepth<F>, next += T::kStageBytes, --left;
        if (next == end) next = memory;
      }
      commit_copies();  // of nothing, too: the wait counts groups
    };
    for (int i = 0; i < T::kStages - 1; ++i) load_next();
    typename T::Sums sums = {};
    unsigned char* oldest = memory;
#pragma unroll 1
    for (int slice = 0; slice < slices; ++slice) {
      wait_for_copies<T::kStages - 2>();
      __syncthreads();  // the slice is there for all, and nobody reads the one before, whose place load_next takes
      load_next();
      multiply_slice<F, T>(sums, oldest);
      oldest += T::kStageBytes;
      if (oldest == end) oldest = memory;
    }
    const auto place = [&](int row) -> Place {
      const int64_t pixel = first + row;
      if (pixel >= p.pixels) return {-1, 0};
      if (p.residual_h == 0) return {pixel, pixel};
      const int64_t line = pixel / p.out_width, image = line / p.out_height;
      return place_of(p, image, static_cast<int>(line - image * p.out_height), static_cast<int>(pixel - line * p.out_width));
    };
    store_tile<F, T>(p, sums, memory, first_output, (group + 1) * p.group_outputs, place);
  }
}

}  // namespace fastrcnn
