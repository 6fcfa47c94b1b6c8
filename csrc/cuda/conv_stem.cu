// A ResNet's stem in one pass: max(relu(7x7 convolution of stride 2 + bias)) over 3x3 windows of stride 2. A cell of 2 x 2
// pixels of 3 channels is one pixel of 12 channels, of which the kernel sees 4x4: the convolution is one of stride 1 whose
// positions are each a step of the tensor cores, 16 numbers deep. Cells are put together on the way to shared memory, and
// of the convolution only the maxima leave it.
#include "conv_launch.cuh"
#include "conv_tile.cuh"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

namespace fastrcnn {
namespace {

// A block makes kPooled x kPooled maxima of kOutputs channels from kSide x kSide pixels of the convolution, two rows of which
// are a warp's; the last row and column are made for nothing.
constexpr int kPooled = 7, kSide = 16, kPixels = kSide * kSide, kOutputs = 64, kThreads = 256;
constexpr int kChannels = 3, kKernel = 7, kPositions = 4, kCellBytes = 32, kCellNumbers = 16, kCellWords = kChannels;
// Cells of a row lie kPitch apart; which of its two chunks comes first changes every 4 cells, whatever the row, so that
// eight neighbours meet every bank once.
constexpr int kCells = kSide + kPositions - 1, kPitch = 24, kPatchBytes = kCells * kPitch * kCellBytes;
constexpr int kWeightPitch = kPositions * kPositions * 2 + 1;  // chunks of an output's row: odd
constexpr int kWeightBytes = kOutputs * kWeightPitch * kChunkBytes, kStagedBytes = kPixels * kRowBytes;
constexpr int kShared = kWeightBytes + 2 * kPatchBytes + kStagedBytes;
constexpr int kEnoughBlocks = 264;
static_assert(kSide == 2 * kPooled + 2 && kRowBytes == kOutputs * 2 && kShared < 99 << 10);

struct Stem {
  const void *input, *weight, *bias;  // [B, H, W, 3], [O, 7, 7, 3], [O] float32 or in the input's dtype, or null
  void* out;                          // [B, H'', W'', O]
  int height, width, conv_height, conv_width, out_height, out_width, outputs;
  int tiles_h, tiles_w;  // of an image
  int tiles;             // of the batch
  bool wide_bias, packed_output;
};

// Where a tile lies, of which image, in pixels of the output.
struct Corner {
  int image, y, x;
};
__device__ __forceinline__ Corner corner_of(const Stem& p, int tile) {
  const int line = tile / p.tiles_w, image = line / p.tiles_h;
  return {image, (line - image * p.tiles_h) * kPooled, (tile - line * p.tiles_w) * kPooled};
}

// Whether pixel (y, x) of a tile's convolution is one of the map's.
__device__ __forceinline__ bool on_map(const Stem& p, const Corner& corner, int y, int x) {
  return static_cast<unsigned>(2 * corner.y - 1 + y) < static_cast<unsigned>(p.conv_height) &&
         static_cast<unsigned>(2 * corner.x - 1 + x) < static_cast<unsigned>(p.conv_width);
}

__device__ __forceinline__ int cell_offset(int row, int column, int byte) {
  return (row * kPitch + column) * kCellBytes + (byte ^ (column / 4 % 2 * kChunkBytes));
}

// A thread's number of the kernel, of each output of the block: cell (a, b) of the kernel has its rows 2 a - 1 and 2 a,
// the first of all is none, and its columns likewise.
template <class F>
__device__ __forceinline__ void spread_weight(const Stem& p, unsigned char* memory, int channel) {
  static_assert(kThreads == kPositions * kPositions * kCellNumbers);
  const int position = threadIdx.x / kCellNumbers, k = threadIdx.x % kCellNumbers;
  const int i = position / kPositions * 2 + k / (2 * kChannels) - 1;
  const int j = position % kPositions * 2 + k / kChannels % 2 - 1;
  const bool inside = k < 4 * kChannels && i >= 0 && j >= 0;
  const F* from = static_cast<const F*>(p.weight);
  from += ((int64_t{channel} * kKernel + i) * kKernel + j) * kChannels + k % kChannels;
  F* to = reinterpret_cast<F*>(memory) + threadIdx.x;
  for (int o = 0; o < kOutputs; ++o, from += kKernel * kKernel * kChannels, to += kWeightPitch * kPack<F>)
    *to = inside && channel + o < p.outputs ? *from : F(0);
}

// The cells that a tile sees: a row of a cell is 6 numbers, 3 words, which lie side by side in the map, as its cells do. A
// warp loads every eighth row of pixels.
template <class F>
__device__ __forceinline__ void load_patch(const Stem& p, unsigned char* patch, const Corner& corner) {
  constexpr int kWords = kCells * kCellWords, kWarps = kThreads / 32;
  static_assert(kWarps % 2 == 0);
  const int y = 4 * corner.y - 6, x = 4 * corner.x - 6, first = threadIdx.x / 32;
  const int64_t line = int64_t{corner.image} * p.height + y + first;
  const F* const row = static_cast<const F*>(p.input) + (line * p.width + x) * kChannels;
  for (int word = threadIdx.x % 32; word < kWords; word += 32) {
    const int cell = word / kCellWords, byte = (first % 2 * kCellWords + word % kCellWords) * 4;
    const bool column = static_cast<unsigned>(x + 2 * cell) < static_cast<unsigned>(p.width);
    const F* from = row + 2 * word;
    unsigned char* to = patch + cell_offset(first / 2, cell, byte);
#pragma unroll 1
    for (int i = y + first; i < y + 2 * kCells; i += kWarps) {
      copy_word_async(to, from, !(column && static_cast<unsigned>(i) < static_cast<unsigned>(p.height)));
      from += int64_t{kWarps} * kChannels * p.width, to += kWarps / 2 * kPitch * kCellBytes;
    }
  }
}

template <class F>
using StemTile = Tile<F, kPixels, kOutputs, 8, 1, 1>;

// A warp's two rows of pixels: fragment m is row 2 warp + m.
template <class F>
__device__ __forceinline__ void multiply_cells(const unsigned char* weight, const unsigned char* patch,
                                               typename StemTile<F>::Sums& sums) {
  using T = StemTile<F>;
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * T::kFragmentsM;
  const unsigned char* column = weight + (row_of_b(lane) * kWeightPitch + chunk_of_b(lane)) * kChunkBytes;
  const unsigned char* cells = patch + row * kPitch * kCellBytes;
#pragma unroll 1
  for (int a = 0; a < kPositions; ++a, cells += kPitch * kCellBytes) {
#pragma unroll
    for (int b = 0; b < kPositions; ++b, column += kCellBytes) {
      Operand<F, 4> left[T::kFragmentsM];
#pragma unroll
      for (int m = 0; m < T::kFragmentsM; ++m)
        load_a(left[m], cells + cell_offset(m, row_of_a(lane) + b, chunk_of_a(lane) * kChunkBytes));
#pragma unroll
      for (int n = 0; n < T::kFragmentsN; n += 2) {
        Operand<F, 2> right[2];
        load_b(right[0], right[1], column + n * 8 * kWeightPitch * kChunkBytes);
#pragma unroll
        for (int i = 0; i < 2 * T::kFragmentsM; ++i) sums[i / 2][n + i % 2].add_product(left[i / 2], right[i % 2]);
      }
    }
  }
}

template <class F>
__device__ __forceinline__ unsigned bits_of(float value) {
  const F rounded = static_cast<F>(value <= 0.f ? 0.f : value);  // NaN stays, and zeros have no sign
  unsigned short bits;
  memcpy(&bits, &rounded, sizeof(bits));
  return bits;
}

// relu(sums + bias) in the map's dtype, a row of 128 bytes a pixel; zero, which no maximum sees, beyond the map.
template <class F>
__device__ __forceinline__ void stage(const Stem& p, const typename StemTile<F>::Sums& sums, const float* bias,
                                      unsigned char* staged, const Corner& corner) {
  using T = StemTile<F>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int m = 0; m < T::kFragmentsM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int y = warp * T::kFragmentsM + m, x = half * 8 + lane / 4;
      const bool inside = on_map(p, corner, y, x);
#pragma unroll
      for (int n = 0; n < T::kFragmentsN; ++n) {
        const float2 b = *reinterpret_cast<const float2*>(bias + n * 8 + lane % 4 * 2);
        const unsigned low = bits_of<F>(sums[m][n].total(2 * half) + b.x);
        const unsigned high = bits_of<F>(sums[m][n].total(2 * half + 1) + b.y);
        *reinterpret_cast<unsigned*>(staged + chunk_offset(y * kSide + x, n) + lane % 4 * 4) =
            inside ? high << 16 | low : 0u;
      }
    }
}

// One maximum, number by number: infinity and NaN times the zeros that fill the kernel's first cells are NaN.
template <class F>
__attribute__((noinline)) __device__ unsigned plain_maximum(const Stem& p, const unsigned char* weight, float bias,
                                                            const unsigned char* patch, const Corner& corner, int y,
                                                            int x) {
  unsigned best = 0;
  for (int k = 0; k < 9; ++k) {
    const int row = 2 * y + k / 3, column = 2 * x + k % 3;
    if (!on_map(p, corner, row, column)) continue;
    float sum = 0.f;
    for (int i = 1; i <= kKernel; ++i)
      for (int j = 1; j <= kKernel; ++j)
        for (int c = 0; c < kChannels; ++c) {
          const int number = (i % 2 * 2 + j % 2) * kChannels + c;
          const auto* w = reinterpret_cast<const F*>(weight) + (i / 2 * kPositions + j / 2) * kCellNumbers + number;
          const int offset = cell_offset(row + i / 2, column + j / 2, number * static_cast<int>(sizeof(F)));
          sum += static_cast<float>(*w) * static_cast<float>(*reinterpret_cast<const F*>(patch + offset));
        }
    best = max(best, bits_of<F>(sum + bias));
  }
  return best;
}

// Numbers without a sign are in the order of their bits, and a NaN is above them all.
template <class F>
__device__ __forceinline__ void store_maxima(const Stem& p, const unsigned char* weight, const float* bias,
                                             const unsigned char* patch, const unsigned char* staged, int channel,
                                             const Corner& corner) {
  constexpr unsigned kInfinities = std::is_same_v<F, BFloat16> ? 0x7f807f80u : 0x7c007c00u;
  for (int i = threadIdx.x; i < kPooled * kPooled * kRowChunks; i += kThreads) {
    const int chunk = i % kRowChunks, y = i / kRowChunks / kPooled, x = i / kRowChunks % kPooled;
    const int first = channel + chunk * kPack<F>;
    if (corner.y + y >= p.out_height || corner.x + x >= p.out_width || first >= p.outputs) continue;
    uint4 best = {};
#pragma unroll
    for (int k = 0; k < 9; ++k) {
      const int pixel = (2 * y + k / 3) * kSide + 2 * x + k % 3;
      const uint4 one = *reinterpret_cast<const uint4*>(staged + chunk_offset(pixel, chunk));
      best.x = __vmaxu2(best.x, one.x), best.y = __vmaxu2(best.y, one.y);
      best.z = __vmaxu2(best.z, one.z), best.w = __vmaxu2(best.w, one.w);
    }
    const unsigned greatest = __vmaxu2(__vmaxu2(best.x, best.y), __vmaxu2(best.z, best.w));
    if (__vmaxu2(greatest, kInfinities) != kInfinities) {
      unsigned short all[kPack<F>];
      for (int v = 0; v < kPack<F>; ++v) {
        const int output = chunk * kPack<F> + v;
        all[v] = plain_maximum<F>(p, weight + output * kWeightPitch * kChunkBytes, bias[output], patch, corner, y, x);
      }
      memcpy(&best, all, sizeof(best));
    }
    const int64_t pixel = (int64_t{corner.image} * p.out_height + corner.y + y) * p.out_width + corner.x + x;
    F* const to = static_cast<F*>(p.out) + pixel * p.outputs + first;
    if (p.packed_output) {
      *reinterpret_cast<uint4*>(to) = best;
    } else {
      memcpy(to, &best, min(p.outputs - first, kPack<F>) * sizeof(F));
    }
  }
}

// Of two blocks' shared memory, which Hopper has.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kAtOnce = 1;
#else
constexpr int kAtOnce = 2;
#endif

// Grid: (blocks that share the tiles, kOutputs channels).
template <class F>
__global__ void __launch_bounds__(kThreads, kAtOnce) stem_kernel(const __grid_constant__ Stem p) {
  if constexpr (kHasMma) {
    extern __shared__ __align__(128) unsigned char memory[];
    alignas(16) __shared__ float bias[kOutputs];
    unsigned char *now = memory + kWeightBytes, *next = now + kPatchBytes, *const staged = next + kPatchBytes;
    const int channel = blockIdx.y * kOutputs;
    spread_weight<F>(p, memory, channel);
    for (int i = threadIdx.x; i < kOutputs; i += kThreads) {
      const bool some = p.bias != nullptr && channel + i < p.outputs;
      const auto* wide = static_cast<const float*>(p.bias) + channel + i;
      bias[i] = !some ? 0.f : p.wide_bias ? *wide : static_cast<float>(static_cast<const F*>(p.bias)[channel + i]);
    }
    for (int i = threadIdx.x; i < 2 * kPatchBytes / 16; i += kThreads) reinterpret_cast<uint4*>(now)[i] = uint4{};
    __syncthreads();  // zeros before the copies: what a cell has beyond 12 numbers stays zero
    load_patch<F>(p, now, corner_of(p, blockIdx.x));
    commit_copies();
#pragma unroll 1
    for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
      wait_for_copies<0>();
      __syncthreads();  // the patch is there for all, and nobody reads the one before or its staged sums
      const int after = tile + static_cast<int>(gridDim.x);
      if (after < p.tiles) load_patch<F>(p, next, corner_of(p, after));
      commit_copies();
      const Corner corner = corner_of(p, tile);
      typename StemTile<F>::Sums sums = {};
      multiply_cells<F>(memory, now, sums);
      stage<F>(p, sums, bias, staged, corner);
      __syncthreads();
      store_maxima<F>(p, memory, bias, now, staged, channel, corner);
      unsigned char* const other = now;
      now = next, next = other;
    }
  }
}

Tensor conv_stem(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias) {
  CHECK_ARGUMENT(input.dim() == 4 && weight.dim() == 4, "input and weight must have 4 dimensions");
  check_shape(weight, "weight", "O, 3, 7, 7", weight.size(0), kChannels, kKernel, kKernel);
  check_shape(input, "input", "B, 3, H, W", input.size(0), kChannels, input.size(2), input.size(3));
  CHECK_ARGUMENT(weight.scalar_type() == input.scalar_type(), "weight must have the dtype of input");
  check_channels_last(input, "input");
  check_channels_last(weight, "weight");
  CHECK_ARGUMENT(input.size(3) % 2 == 0 && lies_on(input.const_data_ptr(), 4), "input must have an even width");
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  Stem p{};
  p.input = input.const_data_ptr(), p.weight = weight.const_data_ptr();
  p.height = as_int("input", input.size(2)), p.width = as_int("input", input.size(3));
  p.conv_height = (p.height + 1) / 2, p.conv_width = p.width / 2;
  p.out_height = (p.conv_height + 1) / 2, p.out_width = (p.conv_width + 1) / 2;
  p.outputs = as_int("weight", weight.size(0));
  if (bias) {
    check_shape(*bias, "bias", "O", p.outputs);
    p.wide_bias = bias->scalar_type() == ScalarType::Float;
    CHECK_ARGUMENT(p.wide_bias || bias->scalar_type() == input.scalar_type(), "bias must be float32 or as input is");
    CHECK_ARGUMENT(bias->is_contiguous(), "bias must be contiguous");
    p.bias = bias->const_data_ptr();
  }
  Tensor out = empty_like_device(input, {input.size(0), p.outputs, p.out_height, p.out_width}, input.scalar_type(),
                                 MemoryFormat::ChannelsLast);
  if (out.numel() == 0) return out;
  p.out = out.mutable_data_ptr();
  p.tiles_h = (p.out_height + kPooled - 1) / kPooled, p.tiles_w = (p.out_width + kPooled - 1) / kPooled;
  const int64_t tiles = input.size(0) * p.tiles_h * p.tiles_w;
  const int parts = (p.outputs + kOutputs - 1) / kOutputs;
  CHECK_ARGUMENT(tiles < 1 << 30 && parts < 1 << 16, "input has too many pixels for one launch");
  p.tiles = static_cast<int>(tiles);
  const auto run = [&](auto f) {
    using F = decltype(f);
    p.packed_output = p.outputs % kPack<F> == 0;
    const int blocks = std::min(p.tiles, std::max(kEnoughBlocks / parts, 1));
    launch(stem_kernel<F>, dim3(blocks, parts), kThreads, kShared, out, p);
  };
  if (input.scalar_type() == ScalarType::BFloat16) {
    run(BFloat16());
  } else {
    CHECK_ARGUMENT(input.scalar_type() == ScalarType::Half, "input must be float16 or bfloat16");
    run(Half());
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrcnn, CUDA, m) { m.impl("_conv_stem", TORCH_BOX(&conv_stem)); }

}  // namespace fastrcnn
