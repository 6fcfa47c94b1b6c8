// What the convolution's CUDA kernels share: the call as a kernel argument, how tiles lie in shared memory, the product of a
// warp's fragments, and the epilogue. Input [B, H, W, C], weight [O, kh, kw, C / groups] and output [B, H', W', O] are
// channels-last; a tile is kM pixels of the output times kN of its channels.
#pragma once

#include "mma.cuh"

#include <cfloat>
#include <cstring>

namespace fastrcnn {

struct Conv {
  const void *input, *weight, *residual;  // residual: null, or of the output's or half its height and width
  const void* bias;                       // [O], float32 or in the input's dtype, or null
  void* out;
  int64_t pixels;  // B H' W'
  int height, width, channels, group_channels;
  int out_height, out_width, group_outputs, outputs, groups;
  int kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  int depth;              // kernel_h kernel_w group_channels
  int column_tiles;       // of a group's outputs
  int residual_h, residual_w;  // 0 where the residual lies as the output does
  bool relu, wide_bias;
  bool packed_input, packed_output;  // 16 bytes never leave a group's channels, and lie on 16 bytes
};

// A tile's rows have 128 bytes, and the chunk of 16 bytes that is c-th in memory lies at c ^ (row % 8): ldmatrix, which
// reads a chunk of eight rows, and the copies, which write a row's eight chunks, then meet every bank once.
constexpr int kRowBytes = 128, kChunkBytes = 16, kRowChunks = kRowBytes / kChunkBytes;
HOST_DEVICE int chunk_offset(int row, int chunk) {
  return row * kRowBytes + (chunk ^ (row % kRowChunks)) * kChunkBytes;
}
template <class F>
constexpr int kPack = kChunkBytes / sizeof(F);
template <class F>
constexpr int kRowDepth = kRowBytes / sizeof(F);

// float32 is three products of TF32 ("3xTF32"): x = high + low but for its last bit, and low low is too small to count.
template <class F>
constexpr bool kSplit = std::is_same_v<F, float>;
template <class F, int W>
struct Operand {
  unsigned high[W], low[kSplit<F> ? W : 1];

  __device__ __forceinline__ void split() {
    if constexpr (kSplit<F>) {
#pragma unroll
      for (int i = 0; i < W; ++i) {
        const float x = __uint_as_float(high[i]);
        high[i] = round_to_tf32(x);
        low[i] = __float_as_uint(x - __uint_as_float(high[i]));
      }
    }
  }
};
// The card cuts its sums instead of rounding them: a step's high product is added outside (Ootomo and Yokota 2022).
template <class F>
struct Sum {
  float high[4], low[kSplit<F> ? 4 : 1];

  __device__ __forceinline__ void add_product(const Operand<F, 4>& a, const Operand<F, 2>& b) {
    if constexpr (kSplit<F>) {
      float step[4] = {};
      multiply_add<F>(low, a.low, b.high);
      multiply_add<F>(low, a.high, b.low);
      multiply_add<F>(step, a.high, b.high);
#pragma unroll
      for (int i = 0; i < 4; ++i) high[i] += step[i];
    } else {
      multiply_add<F>(high, a.high, b.high);
    }
  }
  // Infinity has no low part; what it and NaN give is in the high one.
  __device__ __forceinline__ float total(int i) const {
    if constexpr (kSplit<F>) return high[i] + (fabs(low[i]) <= FLT_MAX ? low[i] : 0.f);
    return high[i];
  }
  __device__ __forceinline__ void set(int i, float sum) {
    high[i] = sum;
    if constexpr (kSplit<F>) low[i] = 0.f;
  }
};

template <class F, int M, int N, int WarpsM, int WarpsN, int Stages>
struct Tile {
  static constexpr int kM = M, kN = N, kWarpsN = WarpsN, kStages = Stages, kThreads = 32 * WarpsM * WarpsN;
  static constexpr int kWarpM = M / WarpsM, kWarpN = N / WarpsN, kFragmentsM = kWarpM / 16, kFragmentsN = kWarpN / 8;
  static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0);
  // Sums on their way to memory: rows of kPitch floats. Half precision leaves in packs of 8, whose first and second halves
  // lie apart, so that neighbouring packs' halves are neighbours; rows and halves are off by 8 and 4 banks for the fragments.
  static constexpr int kPitch = N + 8, kHalf = kPack<F> == 8 ? N / 2 + 4 : 4;
  HOST_DEVICE static int staged(int row, int column) {
    const int in_row = kPack<F> == 8 ? column / 4 % 2 * kHalf + column / 8 * 4 + column % 4 : column;
    return row * kPitch + in_row;
  }
  static constexpr int kStagedBytes = M * kPitch * 4, kEpilogueBytes = kStagedBytes + M * 16;
  static constexpr int kStageBytes = (M + N) * kRowBytes;
  using Sums = Sum<F>[kFragmentsM][kFragmentsN];
};

// The lanes' places in 16 rows of a tile as multiply_add takes them for a, and in 16 columns as it takes them for two b.
__device__ __forceinline__ int row_of_a(int lane) { return lane % 16; }
__device__ __forceinline__ int chunk_of_a(int lane) { return lane / 16; }
__device__ __forceinline__ int row_of_b(int lane) { return lane % 8 + lane / 16 * 8; }
__device__ __forceinline__ int chunk_of_b(int lane) { return lane / 8 % 2; }
template <class F>
__device__ __forceinline__ void load_a(Operand<F, 4>& a, const void* row) {
  load_matrices(a.high, row);
  a.split();
}
template <class F>
__device__ __forceinline__ void load_b(Operand<F, 2>& first, Operand<F, 2>& second, const void* row) {
  unsigned both[4];
  load_matrices(both, row);
  first.high[0] = both[0], first.high[1] = both[1], second.high[0] = both[2], second.high[1] = both[3];
  first.split(), second.split();
}

// Pixels of the output and the residual; out < 0: the row has none.
struct Place {
  int64_t out, residual;
};
__device__ __forceinline__ Place place_of(const Conv& p, int64_t image, int y, int x) {
  const int64_t pixel = (image * p.out_height + y) * p.out_width + x;
  if (p.residual_h == 0) return {pixel, pixel};
  return {pixel, (image * p.residual_h + y / 2) * p.residual_w + x / 2};
}

template <class F>
__device__ __forceinline__ float bias_of(const Conv& p, int output) {
  if (p.bias == nullptr) return 0.f;
  if (p.wide_bias) return static_cast<const float*>(p.bias)[output];
  return static_cast<float>(static_cast<const F*>(p.bias)[output]);
}
template <class F>
__device__ __forceinline__ float finish(const Conv& p, float sum, float bias, F residual) {
  const float y = sum + bias + static_cast<float>(residual);
  return p.relu && y < 0.f ? 0.f : y;  // NaN stays
}

// out = relu(sums + bias + residual) for output channels [channel, end). The sums go through shared memory, so that threads
// read and write 16 bytes beside each other; place(row) says where a row of the tile lies. Begins and ends with a barrier.
template <class F, class T, class PlaceOfRow>
__device__ __forceinline__ void store_tile(const Conv& p, const typename T::Sums& sums, unsigned char* memory,
                                           int channel, int end, PlaceOfRow place) {
  constexpr int V = kPack<F>, kPacks = T::kN / V;
  static_assert(T::kThreads % kPacks == 0);
  float* const staged = reinterpret_cast<float*>(memory);
  Place* const places = reinterpret_cast<Place*>(memory + T::kStagedBytes);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  __syncthreads();
#pragma unroll
  for (int m = 0; m < T::kFragmentsM; ++m)
#pragma unroll
    for (int n = 0; n < T::kFragmentsN; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp / T::kWarpsN * T::kWarpM + m * 16 + half * 8 + lane / 4;
        const int column = warp % T::kWarpsN * T::kWarpN + n * 8 + lane % 4 * 2;
        *reinterpret_cast<float2*>(staged + T::staged(row, column)) =
            make_float2(sums[m][n].total(2 * half), sums[m][n].total(2 * half + 1));
      }
  for (int row = threadIdx.x; row < T::kM; row += T::kThreads) places[row] = place(row);
  __syncthreads();

  const int column = threadIdx.x % kPacks * V, count = min(end - channel - column, V);
  float bias[V];
#pragma unroll
  for (int v = 0; v < V; ++v) bias[v] = v < count ? bias_of<F>(p, channel + column + v) : 0.f;
#pragma unroll 1
  for (int row = threadIdx.x / kPacks; row < T::kM && count > 0; row += T::kThreads / kPacks) {
    const Place at = places[row];
    if (at.out < 0) continue;
    const float* const sum = staged + T::staged(row, column);
    F* const to = static_cast<F*>(p.out) + at.out * p.outputs + channel + column;
    const F* const from = static_cast<const F*>(p.residual) + at.residual * p.outputs + channel + column;
    F values[V] = {};
    if (p.packed_output) {
      int4 raw = {};
      if (p.residual != nullptr) raw = __ldg(reinterpret_cast<const int4*>(from));
      memcpy(values, &raw, sizeof(raw));
#pragma unroll
      for (int v = 0; v < V; ++v) values[v] = static_cast<F>(finish(p, sum[v / 4 * T::kHalf + v % 4], bias[v], values[v]));
      memcpy(&raw, values, sizeof(raw));
      *reinterpret_cast<int4*>(to) = raw;
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (v >= count) break;
        to[v] = static_cast<F>(finish(p, sum[v / 4 * T::kHalf + v % 4], bias[v], p.residual ? from[v] : F(0)));
      }
    }
  }
  __syncthreads();
}

}  // namespace fastrcnn
