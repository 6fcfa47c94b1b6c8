// relu(conv(input, weight) + bias + residual) on the tensor cores, of float32, float16 and bfloat16: one kernel for dense
// and wide groups (conv_gemm.cuh), one for narrow groups (conv_groups.cuh), each in the tiles named here.
#include "conv_gemm.cuh"
#include "conv_groups.cuh"
#include "conv_launch.cuh"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

namespace fastrcnn {
namespace {

// In the order of TILES in fastrcnn/ops/conv_tile.py. All but 256 x 128 fit the 99 KB of shared memory of the smallest cards;
// that one, for cards with more, halves what goes through the L2.
constexpr int kNarrowGroups = 5;

// run(Tile(), packed) of the tile with that number; float32 has no registers for the larger ones.
template <class F, class Run>
void with_tile(int64_t tile, bool packed, Run run) {
  if (!packed) return run(Tile<F, 128, 64, 2, 2, 3>(), std::false_type());
  if (tile == 1) return run(Tile<F, 128, 64, 2, 2, 3>(), std::true_type());
  if (tile == 2) return run(Tile<F, 64, 64, 2, 2, 4>(), std::true_type());
  if (tile == 3) return run(Tile<F, 128, 32, 4, 1, 3>(), std::true_type());
  if constexpr (!std::is_same_v<F, float>) {
    if (tile == 0) return run(Tile<F, 128, 128, 2, 2, 3>(), std::true_type());
    if (tile == 4) return run(Tile<F, 256, 128, 4, 2, 3>(), std::true_type());
  }
  refuse("tile must be one that the dtype has, got ", tile);
}

Conv make_conv(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& residual, const std::vector<int64_t>& stride,
               const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups,
               bool upsample_residual, bool relu) {
  CHECK_ARGUMENT(input.dim() == 4 && weight.dim() == 4, "input and weight must have 4 dimensions");
  CHECK_ARGUMENT(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2, "stride must have 2 numbers");
  CHECK_ARGUMENT(groups > 0 && weight.size(0) % groups == 0 && weight.size(1) * groups == input.size(1),
                 "weight must have shape [O, C / groups, kh, kw]");
  CHECK_ARGUMENT(weight.scalar_type() == input.scalar_type(), "weight must have the dtype of input");
  check_channels_last(input, "input");
  check_channels_last(weight, "weight");
  int out[2];
  for (int i = 0; i < 2; ++i) {
    CHECK_ARGUMENT(stride[i] > 0 && padding[i] >= 0 && dilation[i] > 0, "stride must be positive");
    const int64_t reach = dilation[i] * (weight.size(2 + i) - 1), size = input.size(2 + i) + 2 * padding[i];
    CHECK_ARGUMENT(reach < (1 << 29) && size < (1 << 29) && size > reach, "padding must fit the map, got ", padding[i]);
    out[i] = static_cast<int>((size - reach - 1) / stride[i] + 1);
  }
  CHECK_ARGUMENT(std::max(weight.size(2), weight.size(3)) <= kMostPositions, "weight must have kernels of at most ",
                 kMostPositions, " x ", kMostPositions);
  Conv p{};
  p.input = input.const_data_ptr(), p.weight = weight.const_data_ptr();
  p.pixels = input.size(0) * out[0] * out[1];
  p.height = as_int("input", input.size(2)), p.width = as_int("input", input.size(3));
  p.channels = as_int("input", input.size(1)), p.outputs = as_int("weight", weight.size(0));
  p.groups = as_int("groups", groups);
  p.group_channels = p.channels / p.groups, p.group_outputs = p.outputs / p.groups;
  p.out_height = out[0], p.out_width = out[1];
  p.kernel_h = as_int("weight", weight.size(2)), p.kernel_w = as_int("weight", weight.size(3));
  p.stride_h = as_int("stride", stride[0]), p.stride_w = as_int("stride", stride[1]);
  p.padding_h = static_cast<int>(padding[0]), p.padding_w = static_cast<int>(padding[1]);
  p.dilation_h = as_int("dilation", dilation[0]), p.dilation_w = as_int("dilation", dilation[1]);
  p.depth = as_int("weight", weight.size(1) * weight.size(2) * weight.size(3) + kRowBytes) - kRowBytes;
  p.relu = relu;
  const int pack = input.scalar_type() == ScalarType::Float ? kPack<float> : kPack<Half>;
  p.packed_input = p.group_channels % pack == 0 && lies_on(p.input, kChunkBytes) && lies_on(p.weight, kChunkBytes);
  p.packed_output = p.group_outputs % pack == 0;
  if (bias) {
    check_shape(*bias, "bias", "O", p.outputs);
    p.wide_bias = bias->scalar_type() == ScalarType::Float;
    CHECK_ARGUMENT(p.wide_bias || bias->scalar_type() == input.scalar_type(), "bias must be float32 or as input is");
    CHECK_ARGUMENT(bias->is_contiguous(), "bias must be contiguous");
    p.bias = bias->const_data_ptr();
  }
  if (residual) {
    CHECK_ARGUMENT(residual->scalar_type() == input.scalar_type(), "residual must have the dtype of input");
    const int h = upsample_residual ? (out[0] + 1) / 2 : out[0], w = upsample_residual ? (out[1] + 1) / 2 : out[1];
    check_shape(*residual, "residual", "B, O, H', W'", input.size(0), p.outputs, h, w);
    check_channels_last(*residual, "residual");
    if (upsample_residual) p.residual_h = h, p.residual_w = w;
    p.residual = residual->const_data_ptr();
    p.packed_output = p.packed_output && lies_on(p.residual, kChunkBytes);
  }
  return p;
}

template <class F>
void launch_gemm(Conv p, int64_t tile, const Tensor& out) {
  with_tile<F>(tile, p.packed_input, [&](auto shape, auto packed) {
    using T = decltype(shape);
    p.column_tiles = (p.group_outputs + T::kN - 1) / T::kN;
    const int64_t blocks = (p.pixels + T::kM - 1) / T::kM * p.column_tiles;
    CHECK_ARGUMENT(blocks < int64_t{1} << 31 && p.groups < 1 << 16, "input has too many pixels or groups for one launch");
    constexpr int kShared = std::max(T::kStages * T::kStageBytes, T::kEpilogueBytes);
    launch(gemm_kernel<F, T, decltype(packed)::value>, dim3(static_cast<unsigned>(blocks), p.groups), T::kThreads, kShared,
           out, p);
  });
}

constexpr int kSpan = 16, kMostShared = 99 << 10, kEnoughBlocks = 1056;

template <class F>
void launch_groups(const Conv& p, int64_t images, const Tensor& out) {
  const int width = p.group_channels;
  CHECK_ARGUMENT(width == p.group_outputs && kSpan % width == 0 && p.channels % kPack<F> == 0 && lies_on(p.input, kChunkBytes),
                 "tile is for groups of 1, 2, 4, 8 or 16 channels and outputs, 16 bytes of channels at a time");
  Conv q = p;
  q.packed_output = p.outputs % kPack<F> == 0 && lies_on(p.residual, kChunkBytes);
  const Patch patch = make_patch<F>(q, images, kSpan);
  CHECK_ARGUMENT(patch.all_bytes <= kMostShared, "tile takes smaller kernels, strides and dilations");
  const int parts = (p.channels + kRowDepth<F> - 1) / kRowDepth<F>;
  const int64_t blocks = std::min<int64_t>(patch.tiles, std::max(kEnoughBlocks / parts, 1));
  CHECK_ARGUMENT(parts < 1 << 16, "input has too many channels for one launch");
  launch(groups_kernel<F, kSpan>, dim3(static_cast<unsigned>(blocks), parts), GroupTile<F>::kThreads, patch.all_bytes, out,
         q, patch);
}

Tensor conv_tile(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias, std::optional<Tensor> residual,
                 std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
                 bool upsample_residual, bool relu, int64_t tile) {
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  Conv p = make_conv(input, weight, bias, residual, stride, padding, dilation, groups, upsample_residual, relu);
  Tensor out = empty_like_device(input, {input.size(0), p.outputs, p.out_height, p.out_width}, input.scalar_type(),
                                 MemoryFormat::ChannelsLast);
  if (out.numel() == 0) return out;
  p.out = out.mutable_data_ptr();
  const auto run = [&](auto f) {
    using F = decltype(f);
    tile == kNarrowGroups ? launch_groups<F>(p, input.size(0), out) : launch_gemm<F>(p, tile, out);
  };
  if (input.scalar_type() == ScalarType::Float) {
    run(float());
  } else if (input.scalar_type() == ScalarType::BFloat16) {
    run(BFloat16());
  } else {
    CHECK_ARGUMENT(input.scalar_type() == ScalarType::Half, "input must be float32, float16 or bfloat16");
    run(Half());
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrcnn, CUDA, m) { m.impl("_conv_tile", TORCH_BOX(&conv_tile)); }

}  // namespace fastrcnn
