// Gradient of RoIAlign with respect to its maps, the same bits on every run: a block owns a tile of one map, adds up
// the RoIs that touch it in ascending order in registers, and writes each pixel once. So nothing is cleared before,
// nothing is added to memory, and no float passes through an atomic.
//
// By its counts the multiply-adds limit it: a bin of 4 x 4 pixels gives 16 of them for each gradient loaded, spread
// over up to four tiles. So a warp owns a few pixels of one row and 16 bytes of channels a lane: it first sums the bins
// above each other that reach its row, then spreads that sum over its pixels. The bins' weights on the tile are small
// dense matrices in shared memory, built once for all warps, and so are the ranges of bins that each warp goes through.
#include "roi_align.cuh"
#include "scan.cuh"

namespace fastrcnn {
namespace {

constexpr int kTileW = 8, kTileH = 6;
constexpr int kPixels = 4;                                       // of one row, in a warp's registers
constexpr int kThreads = kTileW / kPixels * kTileH * kWarp;      // 12 warps
constexpr int kBlocksAtOnce = 2;                                 // 80 registers a thread
constexpr int kRanges = kTileH + kTileW / kPixels;               // of bins: on each row and on each run of pixels
constexpr int kPending = 2 * kThreads;                           // RoIs found, not yet added
constexpr int kWeightBytes = 20 << 10;                           // of a batch of RoIs, or one RoI's if that is more
constexpr int kBucketThreads = 1024, kPlaceThreads = 256;
static_assert(kTileW % kPixels == 0 && kThreads <= 1024);

// Tiles of each level, and where its gradient goes: contiguous in the pyramid's layout.
struct Tiles {
  int across[kMaxLevels], down[kMaxLevels];
  void* grad[kMaxLevels];
};

// The pixels (first, last) of an axis that a RoI may touch; the margin is what rounding can move a sample by.
template <class T>
__device__ __forceinline__ int2 touched(const RoiGrid<T>& g, int pooled, int size) {
  const T a = sample_position(g, 0, 0), b = sample_position(g, pooled - 1, g.samples - 1);
  const T margin = T(0x1p-20) * (std::fabs(g.start) + static_cast<T>(pooled) * std::fabs(g.bin));
  const T low = (a < b ? a : b) - margin, high = (a < b ? b : a) + margin;
  if (high < T(-1) || low > static_cast<T>(size)) return make_int2(0, -1);
  return make_int2(low > T(0) ? static_cast<int>(low) : 0,
                   high < static_cast<T>(size - 1) ? static_cast<int>(high > T(0) ? high : T(0)) + 1 : size - 1);
}

// One thread a RoI: its bucket (level, image), or the one behind the last, and its rectangle (x, y, last x, last y).
template <class T>
__global__ void __launch_bounds__(kPlaceThreads)
place_kernel(const __grid_constant__ Pyramid p, const T* rois, int num_rois, int* bucket, int4* rectangle) {
  const int k = blockIdx.x * kPlaceThreads + threadIdx.x;
  if (k >= num_rois) return;
  const Place<T> place = place_roi(rois + static_cast<int64_t>(k) * 5, p);
  bucket[k] = p.num_levels * p.batch;
  if (place.level < 0) return;
  const int2 x = touched(place.x, p.pooled_w, p.level[place.level].width);
  const int2 y = touched(place.y, p.pooled_h, p.level[place.level].height);
  bucket[k] = place.level * p.batch + place.image;
  rectangle[k] = make_int4(x.x, y.x, x.y, y.y);
}

// One block a bucket: its RoIs in ascending order, from begin[bucket] on. A tile then looks at these alone.
__global__ void __launch_bounds__(kBucketThreads)
bucket_kernel(const int* bucket, const int4* rectangle, int num_rois, int* begin, int* order, int4* ordered) {
  const int own = blockIdx.x, thread = threadIdx.x;
  int at = 0;
  for (int first = 0; first < num_rois; first += kBucketThreads)
    at += __syncthreads_count(first + thread < num_rois && bucket[first + thread] < own);
  if (threadIdx.x == 0) begin[own] = at;
  for (int first = 0; first < num_rois; first += kBucketThreads) {
    const int k = first + thread;
    const bool hit = k < num_rois && bucket[k] == own;
    const Sums hits = block_votes<kBucketThreads>(hit);
    if (hit) {
      order[at + hits.before] = k;
      ordered[at + hits.before] = rectangle[k];
    }
    at += hits.all;
  }
  if (threadIdx.x == 0 && own == static_cast<int>(gridDim.x) - 1) begin[own + 1] = at;
}

// weights[pixel] = what a bin's samples weigh on pixels [first, first + N) of the axis, times `scale`.
template <int N, class T>
__device__ __forceinline__ void tile_weights(T* weights, const RoiGrid<T>& grid, int p, int first, int size, T scale) {
  for (int x = 0; x < N; ++x) weights[x] = T(0);
  const SampleRange range = samples_within(grid, p, static_cast<T>(first - 1), static_cast<T>(first + N));
  for (int i = range.begin; i < range.end; ++i) {
    const Tap<T> tap = axis_tap(grid, p, i, size);
    const int low = tap.low - first, high = tap.high - first;
    if (low >= 0 && low < N) weights[low] += tap.w_low * scale;
    if (high >= 0 && high < N) weights[high] += tap.w_high * scale;
  }
}

// The bins from the first to the last that weigh something on a row (N = 1) or on N pixels. Samples lie in order along an
// axis, so every bin between the two does, too.
template <int N, class T>
__device__ __forceinline__ SampleRange bins_touching(const T* weights, int apart, int pooled) {
  SampleRange range{pooled, 0};
  for (int b = 0; b < pooled; ++b) {
    const Pack<T, N> w = *reinterpret_cast<const Pack<T, N>*>(weights + b * apart);
    bool touches = false;
#pragma unroll
    for (int x = 0; x < N; ++x) touches |= w.value[x] != T(0);
    if (touches) range = {min(range.begin, b), b + 1};
  }
  return range;
}

// sum += R bins above each other, each with its weight.
template <int R, class T, class F, int V>
__device__ __forceinline__ void add_bins(T (&sum)[V], const T (&weight)[R], const Pack<F, V> (&bins)[R]) {
#pragma unroll
  for (int r = 0; r < R; ++r) {
    T value[V];
    widen(bins[r], value);
#pragma unroll
    for (int v = 0; v < V; ++v) sum[v] = std::fma(weight[r], value[v], sum[v]);
  }
}

template <int R, class F, int V>
__device__ __forceinline__ void load_bins(Pack<F, V> (&bins)[R], const F* grad, int step) {
#pragma unroll
  for (int r = 0; r < R; ++r) bins[r] = load_pack<F, V>(grad + r * step);
}

// acc[pixel] += weight[pixel] * the sum of a column of bins.
template <class T, int V>
__device__ __forceinline__ void add_column(T (&acc)[kPixels][V], const T* wx, const T (&sum)[V]) {
  const Pack<T, kPixels> weight = *reinterpret_cast<const Pack<T, kPixels>*>(wx);
#pragma unroll
  for (int x = 0; x < kPixels; ++x) {
    if (weight.value[x] == T(0)) continue;  // or an infinite gradient would spread beyond its bin
#pragma unroll
    for (int v = 0; v < V; ++v) acc[x][v] = std::fma(weight.value[x], sum[v], acc[x][v]);
  }
}

// C columns of R bins, whose loads are under way together. wx: the first column's weights; the next are kTileW further.
template <int C, int R, class T, class F, int V>
__device__ __forceinline__ void add_columns(T (&acc)[kPixels][V], const T (&wy)[R], const T* wx, const F* grad, int step,
                                            int channels) {
  Pack<F, V> bins[C][R];
#pragma unroll
  for (int c = 0; c < C; ++c) load_bins(bins[c], grad + c * channels, step);
#pragma unroll
  for (int c = 0; c < C; ++c) {
    T sum[V] = {};
    add_bins(sum, wy, bins[c]);
    add_column(acc, wx + c * kTileW, sum);
  }
}

// All columns, where R bins above each other reach the warp's row: their weights, kTileH apart, stay in registers.
template <int R, class T, class F, int V>
__device__ __forceinline__ void add_rows(T (&acc)[kPixels][V], const T* wy, const T* wx, const F* grad, int columns,
                                         int step, int channels) {
  T weight[R];
#pragma unroll
  for (int r = 0; r < R; ++r) weight[r] = wy[r * kTileH];
#pragma unroll 1
  for (; columns > 1; columns -= 2, grad += 2 * channels, wx += 2 * kTileW)
    add_columns<2>(acc, weight, wx, grad, step, channels);
  if (columns > 0) add_columns<1>(acc, weight, wx, grad, step, channels);
}

// acc[pixel] += one RoI's gradient on the warp's pixels. grad: [pooled_h, pooled_w, channels] from the lane's channel
// on; wy, wx: the weights of all bins on the warp's row and on its first pixel. Two of three rows lie in one bin alone.
template <class T, class F, int V>
__device__ __forceinline__ void add_roi(T (&acc)[kPixels][V], const T* wy, const T* wx, SampleRange rows,
                                        SampleRange columns, const F* grad, int step, int channels) {
  const int num_rows = rows.end - rows.begin, num_columns = columns.end - columns.begin;
  grad += rows.begin * step + columns.begin * channels;
  wy += rows.begin * kTileH;
  wx += columns.begin * kTileW;
  if (num_rows == 1) return add_rows<1>(acc, wy, wx, grad, num_columns, step, channels);
  if (num_rows == 2) return add_rows<2>(acc, wy, wx, grad, num_columns, step, channels);
#pragma unroll 1
  for (int c = 0; c < num_columns; ++c, grad += channels, wx += kTileW) {
    T sum[V] = {};
    int r = 0;
#pragma unroll 1
    for (; r + 1 < num_rows; r += 2) {
      Pack<F, V> bins[2];
      load_bins(bins, grad + r * step, step);
      add_bins(sum, {wy[r * kTileH], wy[(r + 1) * kTileH]}, bins);
    }
    if (r < num_rows) add_bins(sum, {wy[r * kTileH]}, {load_pack<F, V>(grad + r * step)});
    add_column(acc, wx, sum);
  }
}

// The warp's pixels, V channels of the lane: at [image, y, x, c] or [image, c, y, x] of the level's gradient.
template <class T, class F, int V>
__device__ __forceinline__ void store_pixels(const T (&acc)[kPixels][V], F* grad, bool channels_last, int64_t image,
                                             int y, int x, int c, int height, int width, int channels) {
  if (channels_last) {
    F* to = grad + ((image * height + y) * width + x) * channels + c;
#pragma unroll
    for (int i = 0; i < kPixels; ++i)
      if (x + i < width) store_pack(to + static_cast<int64_t>(i) * channels, acc[i]);
    return;
  }
#pragma unroll
  for (int v = 0; v < V; ++v) {
    F* to = grad + ((image * channels + c + v) * height + y) * width + x;
    Pack<F, kPixels> row;
#pragma unroll
    for (int i = 0; i < kPixels; ++i) row.value[i] = static_cast<F>(acc[i][v]);
    if (width % kPixels == 0) {
      *reinterpret_cast<Pack<F, kPixels>*>(to) = row;
    } else {
#pragma unroll
      for (int i = 0; i < kPixels; ++i)
        if (x + i < width) to[i] = row.value[i];
    }
  }
}

// One block: one tile of one image's map, kWarp * V channels. Tiles of the last (as a rule the coarsest) level come
// first: RoIs lie closest there, and what takes longest must not start last.
template <class T, class F, int V>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce)
tile_kernel(const __grid_constant__ Pyramid p, const __grid_constant__ Tiles tiles, const F* grad, const T* rois,
            const int* begin, const int* order, const int4* ordered, int batch_rois) {
  extern __shared__ __align__(64) unsigned char memory[];
  __shared__ int pending[kPending];
  const int num_bins = p.pooled_h + p.pooled_w;
  T* wx = reinterpret_cast<T*>(memory);           // [batch_rois, pooled_w, kTileW], read kPixels at once
  T* wy = wx + batch_rois * p.pooled_w * kTileW;  // [batch_rois, pooled_h, kTileH]
  SampleRange* ranges = reinterpret_cast<SampleRange*>(wy + batch_rois * p.pooled_h * kTileH);  // [batch_rois, kRanges]

  int tile = static_cast<int>(blockIdx.x);
  int l = p.num_levels - 1;
  for (; l > 0; --l) {
    const int on_level = tiles.across[l] * tiles.down[l] * p.batch;
    if (tile < on_level) break;
    tile -= on_level;
  }
  const int across = tiles.across[l], down = tiles.down[l], height = p.level[l].height, width = p.level[l].width;
  const int left = tile % across * kTileW, top = tile / across % down * kTileH, image = tile / across / down;
  const int warp = threadIdx.x / kWarp, row = warp / (kTileW / kPixels), column = warp % (kTileW / kPixels) * kPixels;
  const int c = (static_cast<int>(blockIdx.y) * kWarp + static_cast<int>(threadIdx.x) % kWarp) * V;
  const bool active = c < p.channels;

  const F* from = grad + min(c, p.channels - V);  // lanes beyond the last channel read what they will not write
  const int step = p.pooled_w * p.channels, roi_size = p.pooled_h * step;
  T acc[kPixels][V] = {};
  int at = begin[l * p.batch + image];
  const int end = begin[l * p.batch + image + 1];
  while (at < end) {
    int found = 0;
    for (; at < end && found <= kPending - kThreads; at += kThreads) {
      bool hit = false;
      if (at + static_cast<int>(threadIdx.x) < end) {
        const int4 r = ordered[at + threadIdx.x];
        hit = r.x < left + kTileW && r.z >= left && r.y < top + kTileH && r.w >= top;
      }
      const Sums hits = block_votes<kThreads>(hit);
      if (hit) pending[found + hits.before] = order[at + threadIdx.x];
      found += hits.all;
    }
    for (int first = 0; first < found; first += batch_rois) {
      const int count = min(batch_rois, found - first);
      __syncthreads();  // the RoIs found are written, the weights of the batch before read
      for (int i = threadIdx.x; i < count * num_bins; i += kThreads) {
        const int k = i / num_bins, b = i % num_bins;
        Place<T> place;
        place.level = l;
        place_on_level(rois + static_cast<int64_t>(pending[first + k]) * 5, p, place);
        if (b < p.pooled_h) {
          tile_weights<kTileH>(wy + (k * p.pooled_h + b) * kTileH, place.y, b, top, height, place.mean);
        } else {
          const int pw = b - p.pooled_h;
          tile_weights<kTileW>(wx + (k * p.pooled_w + pw) * kTileW, place.x, pw, left, width, T(1));
        }
      }
      __syncthreads();
      for (int i = threadIdx.x; i < count * kRanges; i += kThreads) {
        const int k = i / kRanges, r = i % kRanges;
        ranges[i] = r < kTileH ? bins_touching<1>(wy + k * p.pooled_h * kTileH + r, kTileH, p.pooled_h)
                               : bins_touching<kPixels>(wx + k * p.pooled_w * kTileW + (r - kTileH) * kPixels, kTileW,
                                                        p.pooled_w);
      }
      __syncthreads();
      for (int k = 0; k < count; ++k) {
        const SampleRange rows = ranges[k * kRanges + row], columns = ranges[k * kRanges + kTileH + column / kPixels];
        if (rows.begin >= rows.end || columns.begin >= columns.end) continue;
        add_roi(acc, wy + k * p.pooled_h * kTileH + row, wx + k * p.pooled_w * kTileW + column, rows, columns,
                from + static_cast<int64_t>(pending[first + k]) * roi_size, step, p.channels);
      }
    }
  }
  if (active && top + row < height && left + column < width)
    store_pixels(acc, static_cast<F*>(tiles.grad[l]), p.channels_last, image, top + row, left + column, c, height,
                 width, p.channels);
}

// [K, C, pooled_h, pooled_w] with the channels innermost and dense, on 16 bytes.
Tensor channels_innermost(const Tensor& grad, ScalarType dtype) {
  const int64_t c = grad.size(1), w = grad.size(3), h = grad.size(2);
  const auto is = [&](int axis, int64_t stride) { return grad.size(axis) <= 1 || grad.stride(axis) == stride; };
  if (grad.scalar_type() == dtype && is(1, 1) && is(3, c) && is(2, c * w) && is(0, c * w * h) &&
      reinterpret_cast<uintptr_t>(grad.data_ptr()) % 16 == 0)
    return grad;
  Tensor copy = empty_like_device(grad, {grad.size(0), c, h, w}, dtype, MemoryFormat::ChannelsLast);
  return torch::stable::copy_(copy, grad);
}

template <class T, class F, int V>
void launch(const Pyramid& p, const Tiles& tiles, int64_t num_tiles, const Tensor& grad, const Tensor& rois) {
  const cudaStream_t stream = current_stream(grad);
  const int num_rois = static_cast<int>(rois.size(0)), num_buckets = p.num_levels * p.batch;
  Tensor bucket = empty_like_device(rois, {num_rois}, ScalarType::Int);
  Tensor rectangle = empty_like_device(rois, {num_rois, 4}, ScalarType::Int);
  Tensor ordered = empty_like_device(rois, {num_rois, 4}, ScalarType::Int);
  Tensor order = empty_like_device(rois, {num_rois}, ScalarType::Int);
  Tensor begin = empty_like_device(rois, {num_buckets + 1}, ScalarType::Int);
  if (num_rois > 0) {
    place_kernel<T><<<(num_rois + kPlaceThreads - 1) / kPlaceThreads, kPlaceThreads, 0, stream>>>(
        p, rois.const_data_ptr<T>(), num_rois, bucket.mutable_data_ptr<int>(),
        reinterpret_cast<int4*>(rectangle.mutable_data_ptr<int>()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  bucket_kernel<<<num_buckets, kBucketThreads, 0, stream>>>(
      bucket.const_data_ptr<int>(), reinterpret_cast<const int4*>(rectangle.const_data_ptr<int>()), num_rois,
      begin.mutable_data_ptr<int>(), order.mutable_data_ptr<int>(),
      reinterpret_cast<int4*>(ordered.mutable_data_ptr<int>()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();

  const int chunks = (p.channels / V + kWarp - 1) / kWarp;
  CHECK_ARGUMENT(num_tiles <= kMaxInt && chunks < 65536, "features: too many tiles or channels for one launch");
  const int roi_bytes = (p.pooled_h * kTileH + p.pooled_w * kTileW) * static_cast<int>(sizeof(T)) +
                        kRanges * static_cast<int>(sizeof(SampleRange));
  const int most = std::max(1, kThreads / (p.pooled_h + p.pooled_w));  // one bin a thread
  const int batch_rois = std::clamp(kWeightBytes / roi_bytes, 1, most);
  const size_t shared = static_cast<size_t>(batch_rois) * roi_bytes;
  const dim3 grid(static_cast<unsigned>(num_tiles), static_cast<unsigned>(chunks));
  tile_kernel<T, F, V><<<grid, kThreads, shared, stream>>>(
      p, tiles, grad.const_data_ptr<F>(), rois.const_data_ptr<T>(), begin.const_data_ptr<int>(),
      order.const_data_ptr<int>(), reinterpret_cast<const int4*>(ordered.const_data_ptr<int>()), batch_rois);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::vector<Tensor> multilevel_roi_align_backward(const Tensor& grad, std::vector<Tensor> features, const Tensor& rois,
                                                  std::vector<double> scales, int64_t sampling_ratio, bool aligned,
                                                  std::vector<double> level_rule) {
  CHECK_ARGUMENT(!features.empty() && grad.dim() == 4, "grad must have shape [K, C, pooled_h, pooled_w]");
  const torch::stable::accelerator::DeviceGuard guard(features[0].get_device_index());
  const int64_t pooled_h = grad.size(2), pooled_w = grad.size(3);
  const ScalarType dtype = features[0].scalar_type();
  const bool channels_last = all_channels_last(features);
  const Problem problem =
      make_problem(features, rois, scales, pooled_h, pooled_w, sampling_ratio, aligned, level_rule);
  const Pyramid p = make_pyramid(problem, rois.size(0), channels_last);
  CHECK_SHAPE(grad, rois.size(0), p.channels, pooled_h, pooled_w);
  CHECK_ARGUMENT(int64_t{p.num_levels} * p.batch < kMaxInt, "features: more than 2^31 images");
  std::vector<Tensor> grads;
  Tiles tiles{};
  int64_t num_tiles = 0;
  for (int l = 0; l < p.num_levels; ++l) {
    const FeatureMap& level = p.level[l];
    grads.push_back(empty_like_device(features[l], {p.batch, p.channels, level.height, level.width}, dtype,
                                      channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous));
    tiles.across[l] = (level.width + kTileW - 1) / kTileW;
    tiles.down[l] = (level.height + kTileH - 1) / kTileH;
    tiles.grad[l] = grads[l].data_ptr();
    num_tiles += int64_t{tiles.across[l]} * tiles.down[l] * p.batch;
  }
  if (num_tiles == 0 || p.channels == 0) return grads;
  const Tensor r = contiguous_as(rois, coordinate_type(features[0])), g = channels_innermost(grad, dtype);
  dispatch_features(dtype, [&](auto t, auto f) {
    using T = decltype(t);
    using F = decltype(f);
    constexpr int V = 16 / sizeof(F);
    if (p.channels % V == 0) {
      launch<T, F, V>(p, tiles, num_tiles, g, r);
    } else {
      launch<T, F, 1>(p, tiles, num_tiles, g, r);
    }
  });
  return grads;
}

Tensor roi_align_backward(const Tensor& grad, const Tensor& input, const Tensor& rois, double spatial_scale,
                          int64_t sampling_ratio, bool aligned) {
  return multilevel_roi_align_backward(grad, {input}, rois, {spatial_scale}, sampling_ratio, aligned, kAnyLevel)[0];
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrcnn, CUDA, m) {
  m.impl("roi_align_backward", TORCH_BOX(&roi_align_backward));
  m.impl("multilevel_roi_align_backward", TORCH_BOX(&multilevel_roi_align_backward));
}

}  // namespace fastrcnn
