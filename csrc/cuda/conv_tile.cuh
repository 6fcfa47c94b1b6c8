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
  const float* bias;                      // [O] or null
  void* out;
  int64_t pixels;  // B H' W'
  int height, width, channels, group_channels;
  int out_height, out_width, group_outputs, outputs, groups;
  int kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  int depth;              // kernel_h kernel_w group_channels
  int column_tiles;       // of a group's outputs
  int residual_h, residual_w;  // 0 where the residual lies as the output does
  bool relu;
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

template <int M, int N, int WarpsM, int WarpsN, int Stages>
struct Tile {
  static constexpr int kM = M, kN = N, kWarpsN = WarpsN, kStages = Stages, kThreads = 32 * WarpsM * WarpsN;
  static constexpr int kWarpM = M / WarpsM, kWarpN = N / WarpsN, kFragmentsM = kWarpM / 16, kFragmentsN = kWarpN / 8;
  static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0);
  static constexpr int kPitch = N + 8;  // floats of a staged row: a fragment's rows then lie in different banks
  static constexpr int kStagedBytes = M * kPitch * 4, kEpilogueBytes = kStagedBytes + M * 16;
  static constexpr int kStageBytes = (M + N) * kRowBytes;
  using Sums = float[kFragmentsM][kFragmentsN][4];
};

// x as the sum of two TF32, but for the last bits of a float.
__device__ __forceinline__ void split_tf32(unsigned bits, unsigned& high, unsigned& low) {
  const float x = __uint_as_float(bits);
  float rounded = round_to_tf32(x);
  if (fabs(rounded) > FLT_MAX) rounded = __uint_as_float(bits & 0xffffe000u);  // up to infinity from below it
  high = __float_as_uint(rounded);
  low = __float_as_uint(round_to_tf32(x - rounded));
}

// sums += a b. float32 is three products of TF32 halves ("3xTF32"); the card cuts its sums instead of rounding them, so a
// step's is added outside (Ootomo and Yokota 2022). Infinity and NaN are left to the product of the high halves.
template <class F, int M, int N>
__device__ __forceinline__ void multiply_step(float (&sums)[M][N][4], const unsigned (&a)[M][4],
                                              const unsigned (&b)[N][2]) {
  if constexpr (!std::is_same_v<F, float>) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int n = 0; n < N; ++n) multiply_add<F>(sums[m][n], a[m], b[n]);
  } else {
    unsigned a_high[M][4], a_low[M][4], b_high[N][2], b_low[N][2];
#pragma unroll
    for (int i = 0; i < M * 4; ++i) split_tf32(a[i / 4][i % 4], a_high[i / 4][i % 4], a_low[i / 4][i % 4]);
#pragma unroll
    for (int i = 0; i < N * 2; ++i) split_tf32(b[i / 2][i % 2], b_high[i / 2][i % 2], b_low[i / 2][i % 2]);
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int n = 0; n < N; ++n) {
        float step[4] = {};
        multiply_add<float>(step, a_low[m], b_high[n]);
        multiply_add<float>(step, a_high[m], b_low[n]);
#pragma unroll
        for (int i = 0; i < 4; ++i) step[i] = fabs(step[i]) <= FLT_MAX ? step[i] : 0.f;
        multiply_add<float>(step, a_high[m], b_high[n]);
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[m][n][i] += step[i];
      }
  }
}

// Sixteen rows of a tile from chunk `chunk` on, one step deep, as multiply_add takes them for a; `row` is the first.
__device__ __forceinline__ int row_of_a(int lane) { return lane % 16; }
__device__ __forceinline__ int chunk_of_a(int lane) { return lane / 16; }
// Sixteen columns, as it takes them for two b.
__device__ __forceinline__ int row_of_b(int lane) { return lane % 8 + lane / 16 * 8; }
__device__ __forceinline__ int chunk_of_b(int lane) { return lane / 8 % 2; }
__device__ __forceinline__ void load_columns(unsigned (&first)[2], unsigned (&second)[2], const void* row) {
  unsigned both[4];
  load_matrices(both, row);
  first[0] = both[0], first[1] = both[1], second[0] = both[2], second[1] = both[3];
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
        *reinterpret_cast<float2*>(staged + row * T::kPitch + column) =
            make_float2(sums[m][n][2 * half], sums[m][n][2 * half + 1]);
      }
  for (int row = threadIdx.x; row < T::kM; row += T::kThreads) places[row] = place(row);
  __syncthreads();

  const int column = threadIdx.x % kPacks * V, count = min(end - channel - column, V);
  float bias[V];
#pragma unroll
  for (int v = 0; v < V; ++v) bias[v] = p.bias != nullptr && v < count ? __ldg(p.bias + channel + column + v) : 0.f;
#pragma unroll 1
  for (int row = threadIdx.x / kPacks; row < T::kM && count > 0; row += T::kThreads / kPacks) {
    const Place at = places[row];
    if (at.out < 0) continue;
    const float* const sum = staged + row * T::kPitch + column;
    F* const to = static_cast<F*>(p.out) + at.out * p.outputs + channel + column;
    const F* const from = static_cast<const F*>(p.residual) + at.residual * p.outputs + channel + column;
    F values[V] = {};
    if (p.packed_output) {
      int4 raw = {};
      if (p.residual != nullptr) raw = __ldg(reinterpret_cast<const int4*>(from));
      memcpy(values, &raw, sizeof(raw));
#pragma unroll
      for (int v = 0; v < V; ++v) values[v] = static_cast<F>(finish(p, sum[v], bias[v], values[v]));
      memcpy(&raw, values, sizeof(raw));
      *reinterpret_cast<int4*>(to) = raw;
    } else {
      for (int v = 0; v < count; ++v) to[v] = static_cast<F>(finish(p, sum[v], bias[v], p.residual ? from[v] : F(0)));
    }
  }
  __syncthreads();
}

}  // namespace fastrcnn
