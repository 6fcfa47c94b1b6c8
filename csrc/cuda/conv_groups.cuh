// Convolution in many narrow groups (ResNeXt). A block keeps the part of the map that an 8 x 16 tile of outputs sees in
// shared memory, once for all positions of the kernel, and the weight of 128 bytes of channels spread out: an output's row
// spans kSpan neighbouring input channels, of which those outside its group weigh zero. What the tensor cores multiply in
// vain costs less than memory does; a span of the whole group's neighbours alone is multiplied, not the block's channels.
#pragma once

#include "conv_tile.cuh"

namespace fastrcnn {

constexpr int kTileH = 8, kTileW = 16;
template <class F>
using GroupTile = Tile<F, kTileH * kTileW, kRowDepth<F>, 4, 1, 1>;

struct Patch {
  int height, width;             // of the map under a tile, in pixels
  int tiles_h, tiles_w;          // of an image
  int64_t tiles;                 // of the batch
  int weight_pitch;              // chunks of a row of the spread weight: odd, so that eight rows meet every bank once
  int weight_bytes, all_bytes;
};

template <class F>
Patch make_patch(const Conv& p, int64_t images, int span) {
  Patch patch{};
  patch.height = (kTileH - 1) * p.stride_h + (p.kernel_h - 1) * p.dilation_h + 1;
  patch.width = (kTileW - 1) * p.stride_w + (p.kernel_w - 1) * p.dilation_w + 1;
  patch.tiles_h = (p.out_height + kTileH - 1) / kTileH;
  patch.tiles_w = (p.out_width + kTileW - 1) / kTileW;
  patch.tiles = images * patch.tiles_h * patch.tiles_w;
  patch.weight_pitch = p.kernel_h * p.kernel_w * span / kPack<F> | 1;
  const int64_t weight_bytes = int64_t{kRowDepth<F>} * patch.weight_pitch * kChunkBytes;
  const int64_t patch_bytes = int64_t{patch.height} * patch.width * kRowBytes;
  patch.weight_bytes = as_int("weight", (weight_bytes + 127) / 128 * 128);
  patch.all_bytes = as_int("input", patch.weight_bytes + std::max<int64_t>(patch_bytes, GroupTile<F>::kEpilogueBytes));
  return patch;
}

// Rows: the outputs of the block's channels from `channel` on. A group is a whole number of the block's channels.
template <class F, int kSpan>
__device__ __forceinline__ void spread_weight(const Conv& p, const Patch& patch, unsigned char* memory, int channel) {
  constexpr int kThreads = GroupTile<F>::kThreads;
  for (int i = threadIdx.x; i < patch.weight_bytes / kChunkBytes; i += kThreads)
    reinterpret_cast<int4*>(memory)[i] = int4{};
  __syncthreads();
  const int rows = min(kRowDepth<F>, p.outputs - channel), width = p.group_channels;
  const F* const from = static_cast<const F*>(p.weight) + static_cast<int64_t>(channel) * p.depth;
  F* const to = reinterpret_cast<F*>(memory);
  for (int i = threadIdx.x; i < rows * p.depth; i += kThreads) {
    const int row = i / p.depth, position = i % p.depth / width, k = i % p.depth % width;
    to[row * patch.weight_pitch * kPack<F> + position * kSpan + row / width * width % kSpan + k] = from[i];
  }
}

// The map from (y, x) on, 128 bytes of channels from `channel` on, zeros beyond its edges.
template <class F>
__device__ __forceinline__ void load_patch(const Conv& p, const Patch& patch, unsigned char* memory, int channel,
                                           int64_t image, int y, int x) {
  const int chunk = threadIdx.x % kRowChunks, first = channel + chunk * kPack<F>;
  constexpr int kStep = GroupTile<F>::kThreads / kRowChunks;
  int py = threadIdx.x / kRowChunks / patch.width, px = threadIdx.x / kRowChunks % patch.width;
  for (int i = threadIdx.x / kRowChunks; i < patch.height * patch.width; i += kStep) {
    const bool inside = first < p.channels && static_cast<unsigned>(y + py) < static_cast<unsigned>(p.height) &&
                        static_cast<unsigned>(x + px) < static_cast<unsigned>(p.width);
    const int64_t offset = ((image * p.height + y + py) * p.width + x + px) * p.channels + first;
    copy_async(memory + chunk_offset(i, chunk), static_cast<const F*>(p.input) + offset, !inside);
    for (px += kStep; px >= patch.width; px -= patch.width) ++py;
  }
}

// A warp makes two rows of 16 pixels, all of the block's channels.
template <class F, int kSpan>
__device__ __forceinline__ void multiply_patch(const Conv& p, const Patch& patch, const unsigned char* weight,
                                               const unsigned char* memory, typename GroupTile<F>::Sums& sums) {
  using T = GroupTile<F>;
  constexpr int kSpanSteps = kSpan / kStepDepth<F>;
  static_assert(kSpan % 16 == 0 && kRowDepth<F> % kSpan == 0);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned char* column =
      weight + (row_of_b(lane) * patch.weight_pitch + chunk_of_b(lane)) * kChunkBytes;
  for (int r = 0; r < p.kernel_h; ++r)
    for (int s = 0; s < p.kernel_w; ++s, column += kSpan * sizeof(F)) {
      int pixel[T::kFragmentsM];
#pragma unroll
      for (int m = 0; m < T::kFragmentsM; ++m)
        pixel[m] = ((warp * T::kFragmentsM + m) * p.stride_h + r * p.dilation_h) * patch.width +
                   row_of_a(lane) * p.stride_w + s * p.dilation_w;
#pragma unroll
      for (int step = 0; step < kRowDepth<F> / kStepDepth<F>; ++step) {
        Operand<F, 4> a[T::kFragmentsM];
#pragma unroll
        for (int m = 0; m < T::kFragmentsM; ++m)
          load_a(a[m], memory + chunk_offset(pixel[m], 2 * step + chunk_of_a(lane)));
        const int first = step / kSpanSteps * kSpan, chunk = step % kSpanSteps * 2;  // a span has as many outputs
#pragma unroll
        for (int n = first; n < first + kSpan; n += 16) {
          Operand<F, 2> b[2];
          load_b(b[0], b[1], column + (n * patch.weight_pitch + chunk) * kChunkBytes);
#pragma unroll
          for (int i = 0; i < 2 * T::kFragmentsM; ++i) sums[i / 2][n / 8 + i % 2].add_product(a[i / 2], b[i % 2]);
        }
      }
    }
}

// One sum, number by number.
template <class F, int kSpan>
__attribute__((noinline)) __device__ float plain_sum(const Conv& p, const Patch& patch, const unsigned char* weight,
                                                     const unsigned char* memory, int y, int x, int output) {
  const int width = p.group_channels, channel = output / width * width;
  const F* const row = reinterpret_cast<const F*>(weight) + output * patch.weight_pitch * kPack<F> + channel % kSpan;
  float sum = 0.f;
  for (int r = 0; r < p.kernel_h; ++r)
    for (int s = 0; s < p.kernel_w; ++s)
      for (int k = channel; k < channel + width; ++k) {
        const int pixel = (y * p.stride_h + r * p.dilation_h) * patch.width + x * p.stride_w + s * p.dilation_w;
        const F* const chunk = reinterpret_cast<const F*>(memory + chunk_offset(pixel, k / kPack<F>));
        sum += static_cast<float>(chunk[k % kPack<F>]) *
               static_cast<float>(row[(r * p.kernel_w + s) * kSpan + k - channel]);
      }
  return sum;
}

// Infinity and NaN times the zeros outside their group are NaN: where a sum is not finite, the block's are made anew.
template <class F, int kSpan>
__device__ __forceinline__ void mend_sums(const Conv& p, const Patch& patch, const unsigned char* weight,
                                          const unsigned char* memory, typename GroupTile<F>::Sums& sums) {
  using T = GroupTile<F>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float probe = 0.f;
#pragma unroll
  for (int i = 0; i < T::kFragmentsM * T::kFragmentsN * 4; ++i)
    probe += sums[i / 4 / T::kFragmentsN][i / 4 % T::kFragmentsN].total(i % 4) * 0.f;
  if (!__syncthreads_or(probe != 0.f)) return;
#pragma unroll
  for (int i = 0; i < T::kFragmentsM * T::kFragmentsN * 4; ++i) {
    const int m = i / 4 / T::kFragmentsN, n = i / 4 % T::kFragmentsN;
    sums[m][n].set(i % 4, plain_sum<F, kSpan>(p, patch, weight, memory, warp * T::kFragmentsM + m,
                                              i % 4 / 2 * 8 + lane / 4, n * 8 + lane % 4 * 2 + i % 2));
  }
}

// Grid: (blocks that share the tiles, 128 bytes of channels).
template <class F, int kSpan>
__global__ void __launch_bounds__(GroupTile<F>::kThreads)
groups_kernel(const __grid_constant__ Conv p, const __grid_constant__ Patch patch) {
  if constexpr (kHasMma) {
    extern __shared__ __align__(128) unsigned char memory[];
    unsigned char* const map = memory + patch.weight_bytes;
    const int channel = blockIdx.y * kRowDepth<F>;
    spread_weight<F, kSpan>(p, patch, memory, channel);
    for (int64_t tile = blockIdx.x; tile < patch.tiles; tile += gridDim.x) {
      const int64_t line = tile / patch.tiles_w, image = line / patch.tiles_h;
      const int y = static_cast<int>(line - image * patch.tiles_h) * kTileH;
      const int x = static_cast<int>(tile - line * patch.tiles_w) * kTileW;
      load_patch<F>(p, patch, map, channel, image, y * p.stride_h - p.padding_h, x * p.stride_w - p.padding_w);
      commit_copies();
      wait_for_copies<0>();
      __syncthreads();
      typename GroupTile<F>::Sums sums = {};
      multiply_patch<F, kSpan>(p, patch, memory, map, sums);
      mend_sums<F, kSpan>(p, patch, memory, map, sums);
      const auto place = [&](int row) -> Place {
        const int out_y = y + row / kTileW, out_x = x + row % kTileW;
        if (out_y >= p.out_height || out_x >= p.out_width) return {-1, 0};
        return place_of(p, image, out_y, out_x);
      };
      store_tile<F, GroupTile<F>>(p, sums, map, channel, p.outputs, place);
    }
  }
}

}  // namespace fastrcnn
