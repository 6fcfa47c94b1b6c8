// A 3x3 convolution of stride 1 by Winograd's F(4x4, 3x3) (Lavin and Gray, 2016): tiles of 4x4 outputs, 36 products in
// place of 144. Threads take blocks of tiles; a block is transformed, multiplied and transformed back within the cache.
// The points are 0, +-1/sqrt(2), +-sqrt(2) and infinity: half the error of 0, +-1, +-2 (Alam et al., 2022).
#include "threads.h"

#include <algorithm>
#include <cstring>

// Contraction is off in this build for the comparisons of other kernels; here multiply-adds are what counts.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=fast")
#endif

namespace fastrcnn {
namespace {

constexpr float kPoint1 = 0.70710678f, kPoint2 = 1.41421356f;

struct Tile {
  int64_t image, y, x;  // of its first output
};

struct WinogradConv {
  const float *input, *weight, *bias, *residual, *zeros;
  float* output;
  int64_t height, width, channels, filters, out_h, out_w, tiles_h, tiles_w, padding_h, padding_w;
  int64_t point_stride, product_stride;  // floats from one of the 36 points to the next in a block's buffers
  bool upsample, relu;

  Tile tile(int64_t t) const {
    const int64_t row = t / tiles_w;
    return {row / tiles_h, row % tiles_h * 4, t % tiles_w * 4};
  }
  void tile_pixels(int64_t t, bool inside, const float* pixel[36]) const {
    const Tile at = tile(t);
    for (int64_t i = 0; i < 36; ++i) {
      const int64_t y = at.y - padding_h + i / 6, x = at.x - padding_w + i % 6;
      const bool in = inside && y >= 0 && y < height && x >= 0 && x < width;
      pixel[i] = in ? input + ((at.image * height + y) * width + x) * channels : zeros;
    }
  }
  int64_t output_pixel(const Tile& at, int64_t i, int64_t j) const {
    return (at.image * out_h + at.y + i) * out_w + at.x + j;
  }
  int64_t residual_pixel(const Tile& at, int64_t i, int64_t j) const {
    if (!upsample) return output_pixel(at, i, j);
    return (at.image * ((out_h + 1) / 2) + (at.y + i) / 2) * ((out_w + 1) / 2) + (at.x + j) / 2;
  }
};

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define BEGIN_TARGET(isa) _Pragma("GCC push_options") _Pragma(isa)
#define END_TARGET _Pragma("GCC pop_options")
#define CPU_HAS(feature) __builtin_cpu_supports(feature)
#else
#define BEGIN_TARGET(isa)
#define END_TARGET
#define CPU_HAS(feature) true
#endif

namespace lanes4 {
#define LANES 4
#define ROWS 6
#include "conv_winograd_lanes.h"
#undef LANES
#undef ROWS
}  // namespace lanes4

BEGIN_TARGET("GCC target(\"avx2,fma\")")
namespace lanes8 {
#define LANES 8
#define ROWS 6
#include "conv_winograd_lanes.h"
#undef LANES
#undef ROWS
}  // namespace lanes8
END_TARGET

BEGIN_TARGET("GCC target(\"avx512f,avx512bw,avx512dq,avx512vl,fma\")")
namespace lanes16 {
#define LANES 16
#define ROWS 14
#include "conv_winograd_lanes.h"
#undef LANES
#undef ROWS
}  // namespace lanes16
END_TARGET

constexpr int64_t kSmall = 1 << 26;  // multiply-adds, about a millisecond of one thread's

int64_t multiple(int64_t n, int64_t of) { return (n + of - 1) / of * of; }

// Tiles of a block, in whole rows of registers and as many blocks for each thread: the more, the seldomer the weights are
// read; the fewer, the nearer to the core what is transformed stays. About as many bytes of both is where the times are low.
int64_t block_tiles(const WinogradConv& p, int64_t tiles, int64_t threads, int64_t rows) {
  const int64_t most = std::clamp<int64_t>(p.channels * p.filters * 2 / (3 * (p.channels + p.filters)), 2 * rows, 168);
  const int64_t blocks = multiple((tiles + most - 1) / most, threads);
  return multiple((tiles + blocks - 1) / blocks, rows);
}

// weight [36, panels, channels padded to lanes, 2 * lanes], the points of each filter; input and residual any layout.
Tensor conv_winograd(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& residual, std::vector<int64_t> padding, int64_t filters,
                     bool upsample_residual, bool relu) {
  const int64_t lanes = weight.dim() == 4 ? weight.size(3) / 2 : 0, rows = lanes == 16 ? 14 : 6;
  CHECK_ARGUMENT(input.dim() == 4 && input.scalar_type() == ScalarType::Float &&
                     weight.scalar_type() == ScalarType::Float && padding.size() == 2,
                 "input must be [B, C, H, W] and weight float32, padding a pair");
  CHECK_ARGUMENT(lanes == 4 || (lanes == 8 && CPU_HAS("avx2") && CPU_HAS("fma")) ||
                     (lanes == 16 && CPU_HAS("avx512f") && CPU_HAS("avx512bw") && CPU_HAS("avx512dq") && CPU_HAS("avx512vl")),
                 "weight: this CPU has no vectors of ", lanes, " floats");
  WinogradConv p{};
  p.channels = input.size(1), p.height = input.size(2), p.width = input.size(3), p.filters = filters;
  const int64_t panels = multiple(filters, 2 * lanes) / (2 * lanes), depth = multiple(p.channels, lanes);
  CHECK_SHAPE(weight, 36, panels, depth, 2 * lanes);
  p.padding_h = padding[0], p.padding_w = padding[1];
  p.out_h = p.height + 2 * padding[0] - 2, p.out_w = p.width + 2 * padding[1] - 2;
  CHECK_ARGUMENT(p.out_h > 0 && p.out_w > 0, "input is smaller than the kernel");
  const int64_t batch = input.size(0), part = upsample_residual ? 2 : 1;
  if (bias) CHECK_SHAPE(*bias, filters);
  if (residual)
    CHECK_SHAPE(*residual, batch, filters, (p.out_h + part - 1) / part, (p.out_w + part - 1) / part);
  const auto nhwc = [](const Tensor& t) { return torch::stable::contiguous(t, MemoryFormat::ChannelsLast); };
  const Tensor x = nhwc(input), w = torch::stable::contiguous(weight), r = residual ? nhwc(*residual) : x;
  const Tensor b = bias ? torch::stable::contiguous(*bias) : x;
  Tensor out = empty_like_device(input, {batch, filters, p.out_h, p.out_w}, ScalarType::Float, MemoryFormat::ChannelsLast);
  Tensor zeros = empty_like_device(input, {p.channels}, ScalarType::Float);
  torch::stable::zero_(zeros);
  p.input = x.const_data_ptr<float>(), p.weight = w.const_data_ptr<float>(), p.zeros = zeros.const_data_ptr<float>();
  p.bias = bias ? b.const_data_ptr<float>() : nullptr, p.residual = residual ? r.const_data_ptr<float>() : nullptr;
  p.output = out.mutable_data_ptr<float>();
  p.upsample = upsample_residual, p.relu = relu;
  p.tiles_h = multiple(p.out_h, 4) / 4, p.tiles_w = multiple(p.out_w, 4) / 4;

  const int64_t tiles = batch * p.tiles_h * p.tiles_w;
  const int64_t most = threads_for(tiles * 36 * p.channels * filters, kSmall);
  const int64_t step = tiles > 0 ? block_tiles(p, tiles, most, rows) : rows;
  const int64_t threads = std::min(most, (tiles + step - 1) / step);
  // A line more than the block needs: 36 streams a power of two apart would meet in the same sets of the cache.
  p.point_stride = step * depth + 16, p.product_stride = step * panels * 2 * lanes + 16;
  const int64_t scratch = 36 * (p.point_stride + p.product_stride);
  Tensor buffer = empty_like_device(input, {threads, scratch}, ScalarType::Float);
  float* const points = buffer.mutable_data_ptr<float>();
  const auto block = lanes == 16 ? lanes16::convolve_block : lanes == 8 ? lanes8::convolve_block : lanes4::convolve_block;
  share(tiles, step, threads, [&](int64_t first, int64_t last, int64_t thread) {
    float* const own = points + thread * scratch;
    for (int64_t t = first; t < last; t += step) block(p, t, std::min(t + step, last), own, own + 36 * p.point_stride);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrcnn, CPU, m) { m.impl("_conv_winograd", TORCH_BOX(&conv_winograd)); }

}  // namespace fastrcnn
