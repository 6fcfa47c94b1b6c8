// The weight of a Winograd convolution (conv_winograd.cpp): to its points, and its gradient, by the same algorithm read
// backwards: G^T [sum over tiles of (B^T d B) * (A dy A^T)] G. Every sum is taken in the order of the tiles: the same bits
// with any number of threads.
#include "conv_winograd.h"

namespace fastrcnn {
namespace {

// Kernels of nine taps, [filters, channels] in `data` as they stand, or as the gradient of the input reads them: from
// [channels, filters], turned by half a circle.
struct Taps {
  float* data;
  int64_t filters, channels;
  bool turned;
  int64_t at(int64_t filter, int64_t channel, int64_t tap) const {
    return turned ? (channel * filters + filter) * 9 + 8 - tap : (filter * channels + channel) * 9 + tap;
  }
};

namespace lanes4 {
#define LANES 4
#include "conv_winograd_lanes.h"
#include "conv_winograd_weight_block.h"
#undef LANES
}  // namespace lanes4

BEGIN_TARGET("GCC target(\"avx2,fma\")")
namespace lanes8 {
#define LANES 8
#include "conv_winograd_lanes.h"
#include "conv_winograd_weight_block.h"
#undef LANES
}  // namespace lanes8
END_TARGET

BEGIN_TARGET("GCC target(\"avx512f,avx512bw,avx512dq,avx512vl,fma\")")
namespace lanes16 {
#define LANES 16
#include "conv_winograd_lanes.h"
#include "conv_winograd_weight_block.h"
#undef LANES
}  // namespace lanes16
END_TARGET

#define BY_LANES(lanes, function) (lanes == 16 ? lanes16::function : lanes == 8 ? lanes8::function : lanes4::function)

constexpr int64_t kBlock = 64;  // tiles whose points lie in memory at once

// weight [O, C, 3, 3] to [36, panels of 2 * lanes filters, channels, 2 * lanes], both filled up with zeros.
Tensor winograd_weight(const Tensor& weight, int64_t lanes, bool turned) {
  CHECK_ARGUMENT(weight.dim() == 4 && weight.scalar_type() == ScalarType::Float, "weight must be float32 [O, C, 3, 3]");
  CHECK_SHAPE(weight, weight.size(0), weight.size(1), 3, 3);
  check_lanes(lanes);
  const Tensor w = torch::stable::contiguous(weight);
  const Taps taps{const_cast<float*>(w.const_data_ptr<float>()), weight.size(turned), weight.size(!turned), turned};
  const int64_t panels = multiple(taps.filters, 2 * lanes) / (2 * lanes), chunks = multiple(taps.channels, lanes) / lanes;
  Tensor out = empty_like_device(weight, {36, panels, chunks * lanes, 2 * lanes}, ScalarType::Float);
  const int64_t piece = lanes * 2 * lanes, point_stride = panels * chunks * piece;
  float* const points = out.mutable_data_ptr<float>();
  const auto pack = BY_LANES(lanes, pack);
  const int64_t threads = threads_for(point_stride * 36 * 16, kSmall);  // memory that is written for the first time is slow
  share(panels * chunks, 1, threads, [&](int64_t first, int64_t last, int64_t) {
    for (int64_t i = first; i < last; ++i)
      pack(taps, i / chunks * 2 * lanes, i % chunks * lanes, points + i * piece, point_stride);
  });
  return out;
}

// input [B, C, H, W], gradient [B, O, H', W'] of the output; any layout. Returns the weight's [O, C, 3, 3].
Tensor winograd_weight_gradient(const Tensor& input, const Tensor& gradient, std::vector<int64_t> padding, int64_t lanes) {
  CHECK_ARGUMENT(input.dim() == 4 && gradient.dim() == 4 && input.scalar_type() == ScalarType::Float &&
                     gradient.scalar_type() == ScalarType::Float && padding.size() == 2,
                 "input and gradient must be float32 [B, C, H, W], padding a pair");
  check_lanes(lanes);
  const int64_t batch = input.size(0), channels = input.size(1), filters = gradient.size(1);
  const int64_t out_h = input.size(2) + 2 * padding[0] - 2, out_w = input.size(3) + 2 * padding[1] - 2;
  CHECK_SHAPE(gradient, batch, filters, out_h, out_w);
  const auto nhwc = [](const Tensor& t) { return torch::stable::contiguous(t, MemoryFormat::ChannelsLast); };
  const Tensor x = nhwc(input), g = nhwc(gradient);
  Tensor zeros = empty_like_device(input, {std::max(channels, filters)}, ScalarType::Float);
  torch::stable::zero_(zeros);
  const float* const nothing = zeros.const_data_ptr<float>();
  const Maps inputs{x.const_data_ptr<float>(), nothing, input.size(2), input.size(3), channels};
  const Maps gradients{g.const_data_ptr<float>(), nothing, out_h, out_w, filters};
  const Tiles grid = tiles_of(out_h, out_w);

  const int64_t tiles = batch * grid.rows * grid.columns, block = std::clamp<int64_t>(tiles, 1, kBlock);
  const int64_t panels = multiple(filters, 2 * lanes) / (2 * lanes), chunks = multiple(channels, lanes) / lanes;
  const int64_t threads = threads_for(tiles * 36 * channels * filters, kSmall), piece = lanes * 2 * lanes;
  // Some lines more than needed: 36 streams a power of two apart would meet in the same sets of the cache.
  const int64_t input_stride = block * chunks * lanes + 16, gradient_stride = block * panels * 2 * lanes + 16;
  Tensor sums = empty_like_device(input, {36, panels, chunks, piece}, ScalarType::Float);
  if (tiles == 0) torch::stable::zero_(sums);
  Tensor buffer = empty_like_device(input, {36 * (input_stride + gradient_stride)}, ScalarType::Float);
  torch::stable::zero_(buffer);  // where a panel or a chunk is not full
  float *const sum = sums.mutable_data_ptr<float>(), *const a = buffer.mutable_data_ptr<float>();
  float* const b = a + 36 * input_stride;
  const auto transform_input = BY_LANES(lanes, transform_input);
  const auto transform_gradient = BY_LANES(lanes, transform_gradient);
  const auto accumulate = BY_LANES(lanes, accumulate);
  for (int64_t begin = 0; begin < tiles; begin += block) {
    const int64_t count = std::min(block, tiles - begin);
    share(count, 4, threads, [&](int64_t first, int64_t last, int64_t) {
      for (int64_t t = first; t < last; ++t) {
        const float* pixel[36];
        const Tile tile = grid.at(begin + t);
        inputs.window<6>(tile.image, tile.y - padding[0], tile.x - padding[1], true, pixel);
        transform_input(pixel, channels, a + t * lanes, block * lanes, input_stride);
        gradients.window<4>(tile.image, tile.y, tile.x, true, pixel);
        transform_gradient(pixel, filters, b + t * 2 * lanes, block * 2 * lanes, gradient_stride);
      }
    });
    share(36 * panels, 1, threads, [&](int64_t first, int64_t last, int64_t) {
      for (int64_t i = first; i < last; ++i)
        for (int64_t chunk = 0; chunk < chunks; ++chunk)
          accumulate(a + i / panels * input_stride + chunk * block * lanes,
                     b + i / panels * gradient_stride + i % panels * block * 2 * lanes, count, begin == 0,
                     sum + (i * chunks + chunk) * piece);
    });
  }
  Tensor out = empty_like_device(input, {filters, channels, 3, 3}, ScalarType::Float);
  const Taps taps{out.mutable_data_ptr<float>(), filters, channels, false};
  const auto unpack = BY_LANES(lanes, unpack);
  share(panels * chunks, 1, threads, [&](int64_t first, int64_t last, int64_t) {
    for (int64_t i = first; i < last; ++i)
      unpack(taps, i / chunks * 2 * lanes, i % chunks * lanes, sum + i * piece, panels * chunks * piece);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrcnn, CPU, m) {
  m.impl("_winograd_weight", TORCH_BOX(&winograd_weight));
  m.impl("_winograd_weight_gradient", TORCH_BOX(&winograd_weight_gradient));
}

}  // namespace fastrcnn
