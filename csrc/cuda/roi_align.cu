// RoIAlign over one map or a pyramid, one block a RoI. By its counts the traffic between L2 and the multiprocessors
// limits it: a RoI's pixels (about 20 x 20 x 512 bytes for 256 channels of bfloat16) are more than its output, and few
// are shared with the next RoI. So each pixel is to be fetched once: a warp walks down the map with one column of bins,
// adds up a row's pixels before the bins that share the row take it with their weights, and the block's warps, one
// column of bins each, pass the same row at about the same time, where the L1 serves the pixels that two columns share.
#include "roi_align.cuh"
#include "sort.cuh"

namespace fastrcnn {
namespace {

constexpr int kThreads = 224;        // at most: 7 warps, which share 7 or 14 columns of bins evenly
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800  // 1,024 threads a multiprocessor
constexpr int kFloatBlocks = 4;
#else
constexpr int kFloatBlocks = 5;
#endif
template <class T>
constexpr int kBlocksAtOnce = sizeof(T) == 8 ? 4 : kFloatBlocks;  // 72 or 56 registers a thread
constexpr int kEnoughBlocks = 1056;  // with fewer RoIs several blocks share one
constexpr int kUnroll = 4;           // loads of one thread in flight
constexpr int kListEntries = 512;    // of all bins together, where the samples are adaptive
constexpr int kListBytes = 32 << 10;
constexpr int64_t kCachedBytes = 32 << 20;  // maps that L2 holds; with larger ones RoIs that share pixels run together

// For sort_lists: a RoI's map, then its place there in steps of 16 pixels. It only decides which RoIs run together.
template <class T>
struct ByPlace {
  Pyramid p;
  const T* rois;
  __device__ uint32_t operator()(int, int i) const {
    const Place<T> place = place_roi(rois + static_cast<int64_t>(i) * 5, p);
    if (place.level < 0) return ~uint32_t{0};
    const auto step = [](T at) { return static_cast<uint32_t>(min(max(at, T(0)), T(1023 * 16))) / 16; };
    return min(place.image * p.num_levels + place.level, 4095) << 20 | step(place.y.start) << 10 | step(place.x.start);
  }
};
struct ToOrder {
  int* order;
  __device__ void operator()(int, int place, int i) const { order[place] = i; }
};

// A pixel of an axis and the summed weights of a bin's samples on it. offset: a column's in bytes, a row's number.
template <class T>
struct Entry {
  int offset;
  T weight;
};

// Appends to a list. Neighbouring samples share pixels: adding up their weights leaves half the reads.
template <class T>
struct ListBuilder {
  Entry<T>* entries;
  int capacity, count;
  Entry<T> last, before_last;  // as in `entries`, which is only written: each read would cost its latency

  // False where the list is full.
  __device__ __forceinline__ bool add(int offset, T weight) {
    if (weight == T(0)) return true;
    if (count > 0 && offset == last.offset) {
      last.weight += weight;
      entries[count - 1] = last;
    } else if (count > 1 && offset == before_last.offset) {
      before_last.weight += weight;
      entries[count - 2] = before_last;
    } else {
      if (count == capacity) return false;
      before_last = last;
      last = {offset, weight};
      entries[count++] = last;
    }
    return true;
  }
};

// The rows or columns of bin p. False where there are more than the list holds.
template <class T>
__device__ __forceinline__ bool build_list(ListBuilder<T>& list, const RoiGrid<T>& grid, int p, int size, int stride,
                                           T scale) {
  const SampleRange range = samples_within(grid, p, T(-1), static_cast<T>(size));
  for (int i = range.begin; i < range.end; ++i) {
    const Tap<T> tap = axis_tap(grid, p, i, size);
    if (!list.add(tap.low * stride, tap.w_low * scale)) return false;
    if (!list.add(tap.high * stride, tap.w_high * scale)) return false;
  }
  return true;
}

// sum += the weighted pixels of N columns. The loads come first, so that they are under way together.
template <int N, class T, class F, int V>
__device__ __forceinline__ void add_columns(T (&sum)[V], const F* line, const Entry<T>* columns) {
  Pack<F, V> pixel[N];
#pragma unroll
  for (int q = 0; q < N; ++q)
    pixel[q] = load_pack<F, V>(reinterpret_cast<const F*>(reinterpret_cast<const char*>(line) + columns[q].offset));
#pragma unroll
  for (int q = 0; q < N; ++q) {
    T value[V];
    widen(pixel[q], value);
#pragma unroll
    for (int v = 0; v < V; ++v) sum[v] = std::fma(columns[q].weight, value[v], sum[v]);
  }
}

template <class T, class F, int V>
__device__ __forceinline__ void sum_columns(T (&sum)[V], const F* line, const Entry<T>* columns, int count) {
#pragma unroll
  for (int v = 0; v < V; ++v) sum[v] = T(0);
  int q = 0;
#pragma unroll 1
  for (; q + kUnroll <= count; q += kUnroll) add_columns<kUnroll>(sum, line, columns + q);
  const int rest = count - q;
  static_assert(kUnroll == 4);
  if (rest == 3) add_columns<3>(sum, line, columns + q);
  if (rest == 2) add_columns<2>(sum, line, columns + q);
  if (rest == 1) add_columns<1>(sum, line, columns + q);
}

// One column of bins from their lists; `rows` holds the lists of all rows of bins. A bin's last row is as a rule the
// next bin's first: its sum stays in registers.
template <class T, class F, int V>
__device__ __forceinline__ void walk_lists(const F* map, int64_t stride_h, const Entry<T>* rows, const int* num_rows,
                                           int capacity, const Entry<T>* columns, int num_columns, int pooled_h, F* out,
                                           int64_t out_step) {
  T line_sum[V];
  int line = -1;
  for (int ph = 0; ph < pooled_h; ++ph, rows += capacity, out += out_step) {
    T sum[V] = {};
    const int count = num_columns > 0 ? num_rows[ph] : 0;
    for (int r = 0; r < count; ++r) {
      const Entry<T> row = rows[r];
      if (row.offset != line) {
        line = row.offset;
        sum_columns(line_sum, map + line * stride_h, columns, num_columns);
      }
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] = std::fma(row.weight, line_sum[v], sum[v]);
    }
    store_pack(out, sum);
  }
}

// The same sample by sample, for a RoI some bin of which has more pixels than its list holds.
template <class T, class F, int V>
__device__ __forceinline__ void walk_samples(const F* map, const FeatureMap& level, const Place<T>& place, int pooled_h,
                                             int pw, F* out, int64_t out_step) {
  const SampleRange columns = samples_within(place.x, pw, T(-1), static_cast<T>(level.width));
  for (int ph = 0; ph < pooled_h; ++ph, out += out_step) {
    T sum[V] = {};
    const SampleRange rows = samples_within(place.y, ph, T(-1), static_cast<T>(level.height));
    for (int iy = rows.begin; iy < rows.end; ++iy) {
      const Tap<T> y = axis_tap(place.y, ph, iy, level.height);
      for (int ix = columns.begin; ix < columns.end && (y.w_low != T(0) || y.w_high != T(0)); ++ix) {
        const Tap<T> x = axis_tap(place.x, pw, ix, level.width);
        for (int corner = 0; corner < 4; ++corner) {
          const T w = (corner & 1 ? x.w_high : x.w_low) * (corner & 2 ? y.w_high : y.w_low) * place.mean;
          if (w == T(0)) continue;
          const Pack<F, V> pixel = load_pack<F, V>(map + (corner & 2 ? y.high : y.low) * level.stride_h +
                                                   (corner & 1 ? x.high : x.low) * level.stride_w);
          T value[V];
          widen(pixel, value);
#pragma unroll
          for (int v = 0; v < V; ++v) sum[v] = std::fma(w, value[v], sum[v]);
        }
      }
    }
    store_pack(out, sum);
  }
}

// Threads take (column of bins, V channels), whichever lies closer in memory varying fastest: the channels of a
// channels-last pyramid, the bins of an NCHW one.
template <class T, class F, int V>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<T>)
forward_kernel(const __grid_constant__ Pyramid p, const T* rois, const int* order, int capacity, F* out) {
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ Place<T> shared_place;
  const int num_lists = p.pooled_h + p.pooled_w, bins = p.pooled_h * p.pooled_w;
  Entry<T>* entries = reinterpret_cast<Entry<T>*>(memory);               // [pooled_h + pooled_w, capacity], rows first
  int* counts = reinterpret_cast<int*>(entries + num_lists * capacity);  // [pooled_h + pooled_w]

  const int64_t roi = order == nullptr ? blockIdx.x : order[blockIdx.x];
  bool overflown = false;
  if (static_cast<int>(threadIdx.x) < num_lists) {
    const Place<T> place = place_roi(rois + roi * 5, p);
    const FeatureMap& level = p.level[max(place.level, 0)];
    if (threadIdx.x == 0) shared_place = place;
    for (int b = threadIdx.x; b < num_lists; b += blockDim.x) {
      ListBuilder<T> list{entries + b * capacity, capacity, 0, {}, {}};
      const bool is_row = b < p.pooled_h;
      if (place.level >= 0) {
        RoiGrid<T> grid = place.x;
        if (is_row) grid = place.y;
        const int stride = is_row ? 1 : static_cast<int>(level.stride_w * sizeof(F));
        overflown |= !build_list(list, grid, is_row ? b : b - p.pooled_h, is_row ? level.height : level.width, stride,
                                 is_row ? T(1) : place.mean);
      }
      counts[b] = list.count;
    }
  }
  const bool listed = !__syncthreads_or(overflown);

  const Place<T>& place = shared_place;
  const FeatureMap& level = p.level[max(place.level, 0)];
  const F* image = static_cast<const F*>(level.data) + place.image * level.stride_n;
  F* roi_out = out + roi * bins * p.channels;
  const int packs = p.channels / V, items = packs * p.pooled_w;
  for (int64_t i = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x; i < items;
       i += static_cast<int64_t>(gridDim.y) * blockDim.x) {
    const int item = static_cast<int>(i);
    const int pw = p.channels_last ? item / packs : item % p.pooled_w;
    const int c = (p.channels_last ? item % packs : item / p.pooled_w) * V;
    const F* map = image + c * level.stride_c;
    F* to = roi_out + (p.channels_last ? pw * p.channels + c : c * bins + pw);
    const int64_t step = p.channels_last ? p.pooled_w * p.channels : p.pooled_w;
    if (listed) {
      const int column = p.pooled_h + pw;
      walk_lists<T, F, V>(map, level.stride_h, entries, counts, capacity, entries + column * capacity, counts[column],
                          p.pooled_h, to, step);
    } else {
      walk_samples<T, F, V>(map, level, place, p.pooled_h, pw, to, step);
    }
  }
}

// The maps as they are, or a copy where a column's offset is more than a list entry holds.
std::vector<Tensor> usable(std::vector<Tensor> maps, bool channels_last) {
  const auto fits = [](const Tensor& m) { return m.size(3) * m.stride(3) <= kMaxInt / 8; };
  for (Tensor& m : maps) {
    if (fits(m)) continue;
    Tensor copy = empty_like_device(m, {m.size(0), m.size(1), m.size(2), m.size(3)}, m.scalar_type(),
                                    channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
    CHECK_ARGUMENT(fits(copy), "features: more than 2^31 bytes in one row of a map");
    m = torch::stable::copy_(copy, m);
  }
  return maps;
}

// A slice of a channels-last map need not lie on 16 bytes.
bool packs_fit(const Pyramid& p, int V, int64_t element_size) {
  bool fit = p.channels_last && p.channels % V == 0;
  for (int i = 0; i < p.num_levels; ++i) {
    const FeatureMap& l = p.level[i];
    const bool strides = (p.batch == 1 || l.stride_n % V == 0) && (l.height == 1 || l.stride_h % V == 0) &&
                         (l.width == 1 || l.stride_w % V == 0);
    fit = fit && strides && reinterpret_cast<uintptr_t>(l.data) % (V * element_size) == 0;
  }
  return fit;
}

template <class T, class F, int V>
void launch(const Pyramid& p, const Tensor& rois, Tensor& out) {
  const int64_t items = int64_t{p.channels / V} * p.pooled_w, warps = (items + kWarp - 1) / kWarp;
  const int64_t num_rois = rois.size(0), most = kThreads / kWarp, rounds = (warps + most - 1) / most;
  const int64_t threads = (warps + rounds - 1) / rounds * kWarp;
  const int64_t shares = std::min<int64_t>(rounds, std::max<int64_t>(1, kEnoughBlocks / num_rois));
  const int num_lists = p.pooled_h + p.pooled_w, list_bytes = num_lists * static_cast<int>(sizeof(Entry<T>));
  const int wanted = p.sampling_ratio > 0 ? 2 * std::min(p.sampling_ratio, 64)
                                          : std::clamp(kListEntries / num_lists, 16, 128);
  const int capacity = std::min(wanted, kListBytes / list_bytes);
  const size_t shared = static_cast<size_t>(list_bytes) * capacity + num_lists * sizeof(int);
  const dim3 grid(static_cast<unsigned>(num_rois), static_cast<unsigned>(std::min<int64_t>(shares, 65535)));
  int64_t bytes = 0;
  for (int i = 0; i < p.num_levels; ++i)
    bytes += int64_t{p.level[i].height} * p.level[i].width * p.batch * p.channels * static_cast<int64_t>(sizeof(F));
  Tensor order = rois;
  int* in_order = nullptr;
  if (num_rois > kEnoughBlocks && bytes > kCachedBytes) {
    order = empty_like_device(rois, {num_rois}, ScalarType::Int);
    in_order = order.mutable_data_ptr<int>();
    sort_lists(1, static_cast<int>(num_rois), rois, ByPlace<T>{p, rois.const_data_ptr<T>()}, ToOrder{in_order});
  }
  forward_kernel<T, F, V><<<grid, static_cast<unsigned>(threads), shared, current_stream(out)>>>(
      p, rois.const_data_ptr<T>(), in_order, capacity, out.mutable_data_ptr<F>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor multilevel_roi_align(std::vector<Tensor> features, const Tensor& rois, int64_t pooled_h, int64_t pooled_w,
                            std::vector<double> scales, int64_t sampling_ratio, bool aligned,
                            std::vector<double> level_rule) {
  CHECK_ARGUMENT(!features.empty(), "features and strides must have the same length");
  const torch::stable::accelerator::DeviceGuard guard(features[0].get_device_index());
  const ScalarType dtype = features[0].scalar_type();
  const bool channels_last = all_channels_last(features);
  const std::vector<Tensor> maps = usable(features, channels_last);
  const Problem problem =
      make_problem(maps, rois, scales, pooled_h, pooled_w, sampling_ratio, aligned, level_rule);
  const Pyramid p = make_pyramid(problem, rois.size(0), channels_last);
  Tensor out = empty_like_device(rois, {rois.size(0), p.channels, pooled_h, pooled_w}, dtype,
                                 channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  if (rois.size(0) == 0 || p.channels == 0) return out;
  const Tensor r = contiguous_as(rois, coordinate_type(features[0]));
  dispatch_features(dtype, [&](auto t, auto f) {
    using T = decltype(t);
    using F = decltype(f);
    constexpr int V = 16 / sizeof(F);
    if (packs_fit(p, V, sizeof(F))) {
      launch<T, F, V>(p, r, out);
    } else {
      launch<T, F, 1>(p, r, out);
    }
  });
  return out;
}

Tensor roi_align(const Tensor& input, const Tensor& rois, int64_t pooled_h, int64_t pooled_w, double spatial_scale,
                 int64_t sampling_ratio, bool aligned) {
  return multilevel_roi_align({input}, rois, pooled_h, pooled_w, {spatial_scale}, sampling_ratio, aligned, kAnyLevel);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrcnn, CUDA, m) {
  m.impl("roi_align", TORCH_BOX(&roi_align));
  m.impl("multilevel_roi_align", TORCH_BOX(&multilevel_roi_align));
}

}  // namespace fastrcnn
