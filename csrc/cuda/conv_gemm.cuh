// Convolution as a product of matrices that nobody writes down: pixels of the output x (kernel position, input channel) x
// output channels. A block makes one tile; its slices, 128 bytes deep, come through a ring of stages in shared memory that
// cp.async fills while the tensor cores work on the oldest.
#pragma once

#include "conv_tile.cuh"

namespace fastrcnn {

// Where the kernel's first position lies for a pixel of the output; element `input` may lie outside the map.
struct alignas(16) Row {
  int64_t input;
  int y, x;
};

__device__ __forceinline__ Row row_of_pixel(const Conv& p, int64_t pixel, int group) {
  if (pixel >= p.pixels) return {0, -(1 << 30), 0};  // above every map: it reads zeros
  const int64_t line = pixel / p.out_width, image = line / p.out_height;
  const int y = static_cast<int>(line - image * p.out_height) * p.stride_h - p.padding_h;
  const int x = static_cast<int>(pixel - line * p.out_width) * p.stride_w - p.padding_w;
  return {((image * p.height + y) * p.width + x) * p.channels + static_cast<int64_t>(group) * p.group_channels, y, x};
}

// The kernel's position and the channel that a depth stands for.
struct Depth {
  int channel, column, row;
  __device__ __forceinline__ void advance(const Conv& p, int by) {
    for (channel += by; channel >= p.group_channels; channel -= p.group_channels) {
      if (++column == p.kernel_w) column = 0, ++row;
    }
  }
};

__device__ __forceinline__ bool is_inside(const Conv& p, const Row& row, const Depth& at, int64_t& offset) {
  const int dy = at.row * p.dilation_h, dx = at.column * p.dilation_w;
  offset = row.input + (static_cast<int64_t>(dy) * p.width + dx) * p.channels + at.channel;
  return at.row < p.kernel_h && static_cast<unsigned>(row.y + dy) < static_cast<unsigned>(p.height) &&
         static_cast<unsigned>(row.x + dx) < static_cast<unsigned>(p.width);
}

// One chunk of the input where groups are no whole chunks: number by number.
template <class F>
__device__ __forceinline__ void gather_chunk(const Conv& p, void* to, const Row& row, Depth at) {
  F values[kPack<F>];
  for (int v = 0; v < kPack<F>; ++v, at.advance(p, 1)) {
    int64_t offset;
    values[v] = is_inside(p, row, at, offset) ? static_cast<const F*>(p.input)[offset] : F(0);
  }
  memcpy(to, values, kChunkBytes);
}

// This thread's chunks of one slice: of the pixels' rows, then of the weight's.
template <class F, class T, bool kPacked>
__device__ __forceinline__ void load_slice(const Conv& p, unsigned char* stage, const Row* rows, const Depth& at,
                                           int depth, const F* weight, int columns) {
  const int chunk = threadIdx.x % kRowChunks;
  constexpr int kStep = T::kThreads / kRowChunks;
#pragma unroll
  for (int i = 0; i < T::kM / kStep; ++i) {
    const int row = threadIdx.x / kRowChunks + i * kStep;
    void* const to = stage + chunk_offset(row, chunk);
    if constexpr (kPacked) {
      int64_t offset;
      const bool inside = is_inside(p, rows[row], at, offset);
      copy_async<kChunkBytes>(to, static_cast<const F*>(p.input) + (inside ? offset : 0), !inside);
    } else {
      gather_chunk<F>(p, to, rows[row], at);
    }
  }
#pragma unroll
  for (int i = 0; i < T::kN / kStep; ++i) {
    const int column = threadIdx.x / kRowChunks + i * kStep;
    void* const to = stage + T::kM * kRowBytes + chunk_offset(column, chunk);
    const F* const from = weight + static_cast<int64_t>(column) * p.depth + depth;
    if constexpr (kPacked) {
      const bool inside = column < columns && depth < p.depth;
      copy_async<kChunkBytes>(to, inside ? from : weight, !inside);
    } else {
      F values[kPack<F>];
      for (int v = 0; v < kPack<F>; ++v) values[v] = column < columns && depth + v < p.depth ? from[v] : F(0);
      memcpy(to, values, kChunkBytes);
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
    unsigned a[T::kFragmentsM][4], b[T::kFragmentsN][2];
#pragma unroll
    for (int m = 0; m < T::kFragmentsM; ++m)
      load_matrices(a[m], stage + chunk_offset(row + 16 * m, 2 * step + chunk_of_a(lane)));
#pragma unroll
    for (int n = 0; n < T::kFragmentsN; n += 2)
      load_columns(b[n], b[n + 1], stage + T::kM * kRowBytes + chunk_offset(column + 8 * n, 2 * step + chunk_of_b(lane)));
    multiply_step<F>(sums, a, b);
  }
}

// Grid: (tiles of pixels x tiles of the group's outputs, the latter varying faster; groups).
template <class F, class T, bool kPacked>
__global__ void __launch_bounds__(T::kThreads) gemm_kernel(const __grid_constant__ Conv p) {
  if constexpr (kHasMma) {
    extern __shared__ __align__(128) unsigned char memory[];
    __shared__ Row rows[T::kM];
    const int64_t first = static_cast<int64_t>(blockIdx.x / p.column_tiles) * T::kM;
    const int column = blockIdx.x % p.column_tiles * T::kN, group = blockIdx.y;
    for (int row = threadIdx.x; row < T::kM; row += T::kThreads) rows[row] = row_of_pixel(p, first + row, group);
    __syncthreads();

    const int first_output = group * p.group_outputs + column;
    const F* const weight = static_cast<const F*>(p.weight) + static_cast<int64_t>(first_output) * p.depth;
    const int columns = p.group_outputs - column, slices = (p.depth + kRowDepth<F> - 1) / kRowDepth<F>;
    Depth at{0, 0, 0};
    int depth = threadIdx.x % kRowChunks * kPack<F>, loaded = 0;
    at.advance(p, depth);
    const auto load_next = [&] {
      if (loaded < slices) {
        load_slice<F, T, kPacked>(p, memory + loaded % T::kStages * T::kStageBytes, rows, at, depth, weight, columns);
        depth += kRowDepth<F>;
        at.advance(p, kRowDepth<F>);
      }
      ++loaded;
      commit_copies();  // of nothing, too: the wait counts groups
    };
    for (int i = 0; i < T::kStages - 1; ++i) load_next();
    typename T::Sums sums = {};
#pragma unroll 1
    for (int slice = 0; slice < slices; ++slice) {
      wait_for_copies<T::kStages - 2>();
      __syncthreads();  // the slice is there for all, and nobody reads the one before, whose place load_next takes
      load_next();
      multiply_slice<F, T>(sums, memory + slice % T::kStages * T::kStageBytes);
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
