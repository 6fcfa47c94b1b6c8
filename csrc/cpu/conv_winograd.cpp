// A 3x3 convolution of stride 1 by Winograd's F(4x4, 3x3) (Lavin and Gray, 2016): tiles of 4x4 outputs, 36 products in
// place of 144. Threads take blocks of tiles; a block is transformed, multiplied and transformed back within the cache.
// The points are 0, +-1/sqrt(2), +-sqrt(2) and infinity: half the error of 0, +-1, +-2 (Alam et al., 2022).
#include "conv_winograd.h"

namespace fastrcnn {
namespace {

struct WinogradConv {
  Maps input;
  Tiles tiles;
  const float *weight, *bias, *residual;
  float* output;
  int64_t filters, out_h, out_w, padding_h, padding_w;
  int64_t point_stride, product_stride;  // floats from one of the 36 points to the next in a block's buffers
  bool upsample, relu;

  int64_t output_pixel(const Tile& at, int64_t i, int64_t j) const {
    return (at.image * out_h + at.y + i) * out_w + at.x + j;
  }
  int64_t residual_pixel(const Tile& at, int64_t i, int64_t j) const {
    if (!upsample) return output_pixel(at, i, j);
    return (at.image * ((out_h + 1) / 2) + (at.y + i) / 2) * ((out_w + 1) / 2) + (at.x + j) / 2;
  }
};

namespace lanes4 {
#define LANES 4
#define ROWS 6
#include "conv_winograd_lanes.h"
#include "conv_winograd_block.h"
#undef LANES
#undef ROWS
}  // namespace lanes4

BEGIN_TARGET("GCC target(\"avx2,fma\")")
namespace lanes8 {
#define LANES 8
#define ROWS 6
#include "conv_winograd_lanes.h"
#include "conv_winograd_block.h"
#undef LANES
#undef ROWS
}  // namespace lanes8
END_TARGET

BEGIN_TARGET("GCC target(\"avx512f,avx512bw,avx512dq,avx512vl,fma\")")
namespace lanes16 {
#define LANES 16
#define ROWS 14
#include "conv_winograd_lanes.h"
#include "conv_winograd_block.h"
#undef LANES
#undef ROWS
}  // namespace lanes16
END_TARGET

// Tiles of a block, in whole rows of registers and as many blocks for each thread: the more, the seldomer the weights are
// read; the fewer, the nearer to the core what is transformed stays. About as many bytes of both is where the times are low.
int64_t block_tiles(const WinogradConv& p, int64_t tiles, int64_t threads, int64_t rows) {
  const int64_t channels = p.input.channels;
  const int64_t most = std::clamp<int64_t>(channels * p.filters * 2 / (3 * (channels + p.filters)), 2 * rows, 168);
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
  check_lanes(lanes);
  WinogradConv p{};
  const int64_t batch = input.size(0), channels = input.size(1), height = input.size(2), width = input.size(3);
  const int64_t panels = multiple(filters, 2 * lanes) / (2 * lanes), depth = multiple(channels, lanes);
  CHECK_SHAPE(weight, 36, panels, depth, 2 * lanes);
  p.filters = filters, p.padding_h = padding[0], p.padding_w = padding[1];
  p.out_h = height + 2 * padding[0] - 2, p.out_w = width + 2 * padding[1] - 2;
  CHECK_ARGUMENT(p.out_h > 0 && p.out_w > 0, "input is smaller than the kernel");
  const int64_t part = upsample_residual ? 2 : 1;
  if (bias) CHECK_SHAPE(*bias, filters);
  if (residual)
    CHECK_SHAPE(*residual, batch, filters, (p.out_h + part - 1) / part, (p.out_w + part - 1) / part);
  const auto nhwc = [](const Tensor& t) { return torch::stable::contiguous(t, MemoryFormat::ChannelsLast); };
  const Tensor x = nhwc(input), w = torch::stable::contiguous(weight), r = residual ? nhwc(*residual) : x;
  const Tensor b = bias ? torch::stable::contiguous(*bias) : x;
  Tensor out = empty_like_device(input, {batch, filters, p.out_h, p.out_w}, ScalarType::Float, MemoryFormat::ChannelsLast);
  Tensor zeros = empty_like_device(input, {channels}, ScalarType::Float);
  torch::stable::zero_(zeros);
  p.input = {x.const_data_ptr<float>(), zeros.const_data_ptr<float>(), height, width, channels};
  p.weight = w.const_data_ptr<float>();
  p.bias = bias ? b.const_data_ptr<float>() : nullptr, p.residual = residual ? r.const_data_ptr<float>() : nullptr;
  p.output = out.mutable_data_ptr<float>();
  p.upsample = upsample_residual, p.relu = relu;
  p.tiles = tiles_of(p.out_h, p.out_w);

  const int64_t tiles = batch * p.tiles.rows * p.tiles.columns;
  const int64_t most = threads_for(tiles * 36 * channels * filters, kSmall);
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
