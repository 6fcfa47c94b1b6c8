// Images of different sizes -> one batch, resized, normalised, padded, channels-last, in one launch. Neighbouring lanes
// make neighbouring pixels, so that loads share cache lines; a warp's row of pixels then goes through shared memory
// into whole 16-byte stores. A byte has 256 normalised values in each channel: a table replaces the divisions. What
// limits it is the number of instructions, twelve single-byte loads a pixel among them; then the writing of the batch.
#include "preprocess.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

namespace fastrcnn {
namespace {

constexpr int kWarp = 32, kWarps = 8, kThreads = kWarp * kWarps;
constexpr int kColumns = 64, kRows = 64, kPixels = kColumns / kWarp;  // of a block's tile; of a lane in one row
constexpr int kImages = 44;                                           // a launch: their descriptions are parameters
constexpr int kMostTaps = 47;  // whose weights fit the 48 KiB of shared memory that every block may have
static_assert(kColumns + kRows <= kThreads);

template <class T, class V>
struct Job {
  Picture<T> pictures[kImages];
  Normalization<V> normalization;  // in the channel order of the images
  bool bgr;                        // the batch wants the last channel first
  int height, width;               // of the batch
  int strips;                      // of kColumns pixels in a row
  int taps;                        // that a window can hold, or 0 where the weights do not fit shared memory
  bool wide;                       // the batch's rows start on 16 bytes
};
static_assert(sizeof(Job<double, double>) <= 4000, "a kernel takes 4096 bytes of parameters");

template <class V, Resize R>
using Place = std::conditional_t<R == Resize::kPillow, Window, ResizeTap<std::conditional_t<R == Resize::kOpencv, int, V>>>;

template <class V, Resize R>
__device__ Place<V, R> place(int i, int size, double scale, bool columns) {
  if constexpr (R == Resize::kOpencv) return opencv_tap(i, size, scale, columns);
  if constexpr (R == Resize::kInterpolate) return interpolate_tap<V>(i, size, scale);
  if constexpr (R == Resize::kPillow) return pillow_window(i, size, scale);
}

// One pixel of either bilinear rule, from its four neighbours: three entries of the table, or interpolated values.
template <class T, class O, Resize R, bool kPacked, class W>
__device__ void linear_pixel(const T* const* at, int64_t channel, const Entry<T, O, R>* table,
                             const Normalization<Value<T, R>>& n, W weight_x, W weight_y, Entry<T, O, R>* value) {
  using Loaded = std::conditional_t<R == Resize::kOpencv || std::is_same_v<T, uint8_t>, int, T>;
  const auto load = [](const T* from) {
    if constexpr (R == Resize::kOpencv) return as_byte(__ldg(from));
    else return static_cast<Loaded>(__ldg(from));
  };
  Loaded t[3][4];
#pragma unroll
  for (int i = 0; i < 12; ++i) t[i / 4][i % 4] = load(at[i % 4] + i / 4 * (kPacked ? 1 : channel));
#pragma unroll
  for (int c = 0; c < 3; ++c) {
    if constexpr (R == Resize::kOpencv) {
      const int top = opencv_row(t[c][0], t[c][1], weight_x), bottom = opencv_row(t[c][2], t[c][3], weight_x);
      value[c] = table[256 * c + opencv_pixel(top, bottom, weight_y)];
    } else {
      const auto normalized = [&](Loaded v) {
        if constexpr (std::is_same_v<T, uint8_t>) return table[256 * c + v];
        else return n.of_unit(v, c);
      };
      value[c] = interpolate(interpolate(normalized(t[c][0]), normalized(t[c][1]), weight_x),
                             interpolate(normalized(t[c][2]), normalized(t[c][3]), weight_x), weight_y);
    }
  }
}

// The two passes of Pillow's filter for one pixel: each row's sum becomes a byte before it is used.
template <class T, class O, bool kPacked>
__device__ void pillow_pixel(const Picture<T>& p, const O* table, const Window& x, const Window& y,
                             const int* weights_x, const int* weights_y, bool stored, O* value) {
  int sum[3] = {kPillowHalf, kPillowHalf, kPillowHalf};
  for (int j = 0; j < y.count; ++j) {
    const T* at = p.data + (y.first + j) * p.row + x.first * p.column;
    int row[3] = {kPillowHalf, kPillowHalf, kPillowHalf};
    for (int k = 0; k < x.count; ++k, at += p.column) {
      const int w = stored ? weights_x[k] : x.weight(k);
#pragma unroll
      for (int c = 0; c < 3; ++c) row[c] += w * as_byte(__ldg(at + c * (kPacked ? 1 : p.channel)));
    }
    const int w = stored ? weights_y[j] : y.weight(j);
#pragma unroll
    for (int c = 0; c < 3; ++c) sum[c] += w * pillow_byte(row[c]);
  }
#pragma unroll
  for (int c = 0; c < 3; ++c) value[c] = table[256 * c + pillow_byte(sum[c])];
}

// kPacked: the channels of a pixel lie side by side in every image, so that their addresses differ by constants.
template <class T, class O, Resize R, bool kPacked>
__global__ void __launch_bounds__(kThreads, std::is_same_v<Value<T, R>, double> ? 2 : 4)
    preprocess_kernel(const __grid_constant__ Job<T, Value<T, R>> job, O* out) {
  using V = Value<T, R>;
  using E = Entry<T, O, R>;
  constexpr int kTable = R != Resize::kInterpolate || std::is_same_v<T, uint8_t> ? 3 * 256 : 0;
  __shared__ E table[kTable > 0 ? kTable : 1];
  __shared__ Place<V, R> columns[kColumns], rows[kRows];
  alignas(16) __shared__ O staged[kWarps][kColumns * 3];
  extern __shared__ int weights[];  // Pillow's: `taps` for each column, then for each row

  const Picture<T>& p = job.pictures[blockIdx.y];
  const int x0 = blockIdx.x % job.strips * kColumns, y0 = blockIdx.x / job.strips * kRows;
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  if (x0 < p.new_width && y0 < p.new_height) {  // the same for the whole block
#pragma unroll 1
    for (int i = thread; i < kTable; i += kThreads) table[i] = table_entry<T, O, R>(job.normalization, i);
    if (thread < kColumns + kRows) {
      const bool is_column = thread < kColumns;
      const int i = is_column ? thread : thread - kColumns;
      const int last = (is_column ? p.new_width - x0 : p.new_height - y0) - 1;  // beyond it any pixel will do
      const int at = (i < last ? i : last) + (is_column ? x0 : y0);
      const int size = is_column ? p.width : p.height;
      const Place<V, R> one = place<V, R>(at, size, is_column ? p.scale_w : p.scale_h, is_column);
      (is_column ? columns : rows)[i] = one;
      if constexpr (R == Resize::kPillow)
        for (int k = 0; k < one.count && job.taps > 0; ++k) weights[thread * job.taps + k] = one.weight(k);
    }
    __syncthreads();
  }

  Place<V, R> mine[kPixels];  // the columns of this lane; in a block of padding nobody looks at them
  int64_t low[kPixels] = {}, high[kPixels] = {};
#pragma unroll
  for (int k = 0; k < kPixels; ++k) {
    mine[k] = columns[k * kWarp + lane];
    if constexpr (R != Resize::kPillow) low[k] = mine[k].low * p.column, high[k] = mine[k].high * p.column;
  }
  const int first = job.bgr ? 2 : 0, step = job.bgr ? -1 : 1;  // channels keep the image's order until here
  const int height = job.height - y0 < kRows ? job.height - y0 : kRows;
  const int inside = x0 < p.new_width ? p.new_height - y0 : 0;  // rows that are not padding
  const int count = (job.width - x0 < kColumns ? job.width - x0 : kColumns) * 3;
  O* row = out + ((static_cast<int64_t>(p.index) * job.height + y0 + warp) * job.width + x0) * 3;
  for (int r = warp; r < height; r += kWarps, row += static_cast<int64_t>(kWarps) * 3 * job.width) {
    if (r < inside) {  // the same for the whole warp
#pragma unroll
      for (int k = 0; k < kPixels; ++k) {
        const int column = k * kWarp + lane;
        E value[3];
        if constexpr (R == Resize::kPillow) {
          pillow_pixel<T, O, kPacked>(p, table, columns[column], rows[r], weights + column * job.taps,
                                      weights + (kColumns + r) * job.taps, job.taps > 0, value);
        } else {
          const Place<V, R> y = rows[r];
          const T *top = p.data + y.low * p.row, *bottom = p.data + y.high * p.row;
          const T* const at[4] = {top + low[k], top + high[k], bottom + low[k], bottom + high[k]};
          linear_pixel<T, O, R, kPacked>(at, p.channel, table, job.normalization, mine[k].weight, y.weight, value);
        }
#pragma unroll
        for (int c = 0; c < 3; ++c)
          staged[warp][column * 3 + first + c * step] =
              x0 + column < p.new_width ? static_cast<O>(value[c]) : static_cast<O>(0.0f);
      }
    } else {
#pragma unroll
      for (int k = 0; k < 3 * kPixels; ++k) staged[warp][k * kWarp + lane] = static_cast<O>(0.0f);
    }
    __syncwarp();
    if (job.wide) {
      constexpr int kPack = 16 / sizeof(O), kPacks = kColumns * 3 / kPack;
      const uint4* from = reinterpret_cast<const uint4*>(staged[warp]);
#pragma unroll
      for (int i = lane; i < kPacks; i += kWarp)
        if (i < count / kPack) reinterpret_cast<uint4*>(row)[i] = from[i];
    } else {
#pragma unroll 1
      for (int i = lane; i < count; i += kWarp) row[i] = staged[warp][i];
    }
    __syncwarp();  // before the next row is staged
  }
}

template <class T, class O, Resize R>
void launch(const std::vector<Picture<T>>& pictures, Normalization<Value<T, R>> n, bool bgr, Tensor& out) {
  O* data = out.mutable_data_ptr<O>();
  Job<T, Value<T, R>> job{};
  if (bgr) std::swap(n.mean[0], n.mean[2]), std::swap(n.std[0], n.std[2]);
  job.normalization = n, job.bgr = bgr;
  job.height = static_cast<int>(out.size(2)), job.width = static_cast<int>(out.size(3));
  job.strips = (job.width + kColumns - 1) / kColumns;
  job.wide = job.width * 3 * sizeof(O) % 16 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  const int64_t tiles = int64_t{job.strips} * ((job.height + kRows - 1) / kRows);
  CHECK_ARGUMENT(tiles < int64_t{1} << 31, "batch_size is too large");
  for (size_t first = 0; first < pictures.size(); first += kImages) {
    const size_t count = std::min<size_t>(kImages, pictures.size() - first);
    bool packed = true;
    job.taps = 0;
    for (size_t i = 0; i < count; ++i) {
      const Picture<T>& p = job.pictures[i] = pictures[first + i];
      packed = packed && p.channel == 1;
      if (R == Resize::kPillow) job.taps = std::max({job.taps, pillow_taps(p.scale_h), pillow_taps(p.scale_w)});
    }
    if (job.taps > kMostTaps) job.taps = 0;
    const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(count));
    const size_t shared = job.taps * (kColumns + kRows) * sizeof(int);
    if constexpr (std::is_same_v<T, uint8_t>) {
      if (packed) {
        preprocess_kernel<T, O, R, true><<<grid, kThreads, shared, current_stream(out)>>>(job, data);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
        continue;
      }
    }
    preprocess_kernel<T, O, R, false><<<grid, kThreads, shared, current_stream(out)>>>(job, data);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

Tensor preprocess(std::vector<Tensor> images, std::vector<int64_t> sizes, int64_t height, int64_t width,
                  std::vector<double> mean, std::vector<double> std, std::string resize, bool bgr, ScalarType dtype) {
  const Resize rule = check_preprocess(images, sizes, height, width, mean, std, resize);
  const torch::stable::accelerator::DeviceGuard guard(images[0].get_device_index());
  return preprocess_images(images, sizes, height, width, mean, std, rule, dtype,
                           [bgr](auto kind, const auto& pictures, const auto& n, Tensor& out) {
                             using K = decltype(kind);
                             launch<typename K::T, typename K::O, K::R>(pictures, n, bgr, out);
                           });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrcnn, CUDA, m) { m.impl("preprocess", TORCH_BOX(&preprocess)); }

}  // namespace fastrcnn
