// An exact, stable radix select of many segments at once (each an image's level of RPN logits), with no word to the
// host. Three passes count the keys by one digit each, which gives the k-th greatest key; a fourth collects the keys
// above it and the first of those equal to it. The logits are read once; the keys that the later passes read stay in
// L2. Each pass is short, so its latency counts: a block loads its keys before it looks for the threshold.
#pragma once

#include "decode_proposals.h"
#include "scan.cuh"

#include <torch/csrc/stable/macros.h>

namespace fastrcnn {
namespace {

constexpr int kSelectThreads = 256, kWarp = 32, kMaxLevels = 8;
constexpr int kChunk = 4096;  // candidates of one segment, for one block of the select
constexpr int kOwn = kChunk / kSelectThreads;
constexpr int kGroup = 4096;  // output rows of one segment, for one block that sorts and decodes
constexpr int kAllBins = 2048 + 2048 + 1024;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800  // 1,024 threads a multiprocessor
constexpr int kCollectBlocks = 4;
#else
constexpr int kCollectBlocks = 5;
#endif

// The digits of a key, from the top: how far to the right it lies, its bits, where its bins begin among kAllBins.
template <int kPass>
struct Digit {
  static constexpr int kShift = kPass == 0 ? 21 : kPass == 1 ? 10 : 0, kBits = kPass == 2 ? 10 : 11;
  static constexpr int kBins = 1 << kBits, kFirst = 2048 * kPass;
};

// Sizes of each level, and the running sums over the levels of an image: [l] is where level l begins.
struct Shape {
  int levels, size[kMaxLevels], count[kMaxLevels];  // candidates, and how many of them are taken
  int chunk[kMaxLevels + 1], group[kMaxLevels + 1], row[kMaxLevels + 1];
};
template <class T, class F>
struct Plan {
  Shape shape;
  Level<T, F> level[kMaxLevels];
};

// The digits found so far of a segment's k-th greatest key, and its rank among the keys that begin with them.
struct Threshold {
  uint32_t prefix;
  int rank;
};

// What the passes leave for each other; S segments, C chunks.
struct Work {
  int* histograms;        // [S, kAllBins], from zero
  int* appended;          // [S], from zero
  Threshold* thresholds;  // [S, 2], after one digit and after two
  uint32_t* keys;         // [C, kChunk]
  uint16_t* last_digits;  // [C, 1024], each chunk's own histogram of the last digit
  uint64_t* selected;     // [B, K], (complement of the key, index)
};

// Which chunk or group of which segment this block has.
struct Place {
  int image, level, part, segment;
};
__device__ Place locate(const Shape& shape, const int* start) {
  const unsigned per_image = start[shape.levels];
  Place p{static_cast<int>(blockIdx.x / per_image), 0, static_cast<int>(blockIdx.x % per_image), 0};
  while (p.part >= start[p.level + 1]) ++p.level;
  p.part -= start[p.level];
  p.segment = p.image * shape.levels + p.level;
  return p;
}

// The threshold after kPass digits: each block finds the bin in the histogram of the last of them by itself.
template <int kPass>
__device__ Threshold find_threshold(const Shape& shape, const Work& w, const Place& p) {
  using D = Digit<kPass - 1>;
  constexpr int kMine = D::kBins / kSelectThreads;
  __shared__ Threshold found;
  const Threshold t = kPass == 1 ? Threshold{0, shape.count[p.level]} : w.thresholds[p.segment * 2 + kPass - 2];
  const int* histogram = w.histograms + static_cast<int64_t>(p.segment) * kAllBins + D::kFirst;
  const int top = D::kBins - 1 - threadIdx.x * kMine;  // threads and their bins go from the greatest key down
  int count[kMine], sum = 0;
#pragma unroll
  for (int j = 0; j < kMine; ++j) sum += count[j] = histogram[top - j];
  int before = block_sums<kSelectThreads>(sum).before;
#pragma unroll
  for (int j = 0; j < kMine; ++j) {
    if (before < t.rank && t.rank <= before + count[j])
      found = {t.prefix << D::kBits | static_cast<uint32_t>(top - j), t.rank - before};
    before += count[j];
  }
  __syncthreads();
  return found;
}

template <int kBins>
__device__ void clear(int* bins) {
  for (int i = threadIdx.x; i < kBins; i += kSelectThreads) bins[i] = 0;
  __syncthreads();
}
template <int kPass>
__device__ void add_to_segment(const int* bins, const Work& w, int segment) {
  __syncthreads();
  int* histogram = w.histograms + static_cast<int64_t>(segment) * kAllBins + Digit<kPass>::kFirst;
  for (int i = threadIdx.x; i < Digit<kPass>::kBins; i += kSelectThreads)
    if (bins[i] != 0) atomicAdd(&histogram[i], bins[i]);
}

// The only pass over the logits: keys in the order of the candidates, and the histogram of their first digit. All loads
// of a thread come before the first use.
template <class F>
__global__ void __launch_bounds__(kSelectThreads)
    first_digit_kernel(const __grid_constant__ Plan<float, F> plan, Work w, bool use_sigmoid) {
  using D = Digit<0>;
  __shared__ int bins[D::kBins];
  const Place p = locate(plan.shape, plan.shape.chunk);
  const Level<float, F>& l = plan.level[p.level];
  const F* logits = l.logits + p.image * l.lb;
  const uint32_t n = plan.shape.size[p.level], first = static_cast<uint32_t>(p.part) * kChunk + threadIdx.x;
  float logit[kOwn];
  if (l.la == 1 && l.lw == l.anchors && l.lh == l.lw * l.width) {  // channels-last: memory has the candidates' order
#pragma unroll
    for (int j = 0; j < kOwn; ++j)
      if (first + j * kSelectThreads < n) logit[j] = static_cast<float>(logits[first + j * kSelectThreads]);
  } else {  // a, x and y move on by fixed steps and carry: no division for each
    const uint32_t anchors = l.anchors, width = l.width, cells = kSelectThreads / anchors;
    uint32_t a = first % anchors, x = first / anchors % width, y = first / anchors / width;
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      if (first + j * kSelectThreads < n) logit[j] = static_cast<float>(logits[a * l.la + y * l.lh + x * l.lw]);
      a += kSelectThreads % anchors, x += cells % width, y += cells / width;
      if (a >= anchors) a -= anchors, ++x;
      if (x >= width) x -= width, ++y;
    }
  }
  clear<D::kBins>(bins);
  uint32_t* keys = w.keys + static_cast<int64_t>(blockIdx.x) * kChunk + threadIdx.x;
#pragma unroll
  for (int j = 0; j < kOwn; ++j) {
    const bool inside = first + j * kSelectThreads < n;
    const uint32_t key = inside ? rank_key(logit[j], use_sigmoid) : 0;
    if (inside) atomicAdd(&bins[key >> D::kShift], 1);
    keys[j * kSelectThreads] = key;
  }
  add_to_segment<0>(bins, w, p.segment);
}

// Keys of this thread: four neighbours at a time, `quad` of them along the chunk.
__device__ uint4 load_keys(const Work& w, int quad) {
  return reinterpret_cast<const uint4*>(w.keys + static_cast<int64_t>(blockIdx.x) * kChunk)[quad];
}

// The histogram of digit kPass over the keys that begin as the threshold does.
template <int kPass>
__global__ void __launch_bounds__(kSelectThreads) digit_kernel(const __grid_constant__ Shape shape, Work w) {
  using D = Digit<kPass>;
  __shared__ int bins[D::kBins];
  const Place p = locate(shape, shape.chunk);
  uint4 quads[kOwn / 4];
#pragma unroll
  for (int q = 0; q < kOwn / 4; ++q) quads[q] = load_keys(w, q * kSelectThreads + threadIdx.x);
  clear<D::kBins>(bins);
  const Threshold t = find_threshold<kPass>(shape, w, p);
  if (p.part == 0 && threadIdx.x == 0) w.thresholds[p.segment * 2 + kPass - 1] = t;
  const uint32_t n = shape.size[p.level], first = static_cast<uint32_t>(p.part) * kChunk;
#pragma unroll
  for (int q = 0; q < kOwn / 4; ++q) {
    const uint32_t keys[4] = {quads[q].x, quads[q].y, quads[q].z, quads[q].w};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const uint32_t i = first + (q * kSelectThreads + threadIdx.x) * 4 + e;
      if (i < n && keys[e] >> (D::kShift + D::kBits) == t.prefix)
        atomicAdd(&bins[keys[e] >> D::kShift & (D::kBins - 1)], 1);
    }
  }
  add_to_segment<kPass>(bins, w, p.segment);
  if (kPass == 2)
    for (int i = threadIdx.x; i < D::kBins; i += kSelectThreads)
      w.last_digits[static_cast<int64_t>(blockIdx.x) * D::kBins + i] = static_cast<uint16_t>(bins[i]);
}

// Keys above the threshold are appended in any order, since they are sorted afterwards. Of the equal ones the first
// `t.rank` count: a thread holds neighbours, and the chunks' own histograms tell how many came in the chunks before.
// Few threads have a key to write, so those load it again: that keeps the registers down and more blocks on the device.
__global__ void __launch_bounds__(kSelectThreads, kCollectBlocks)
collect_kernel(const __grid_constant__ Shape shape, Work w) {
  using D = Digit<2>;
  __shared__ int base;
  const Place p = locate(shape, shape.chunk);
  uint4 quads[kOwn / 4];
#pragma unroll
  for (int q = 0; q < kOwn / 4; ++q) quads[q] = load_keys(w, threadIdx.x * (kOwn / 4) + q);
  const Threshold t = find_threshold<3>(shape, w, p);
  const uint32_t n = shape.size[p.level], first = static_cast<uint32_t>(p.part) * kChunk + threadIdx.x * kOwn;
  uint32_t above = 0, equal = 0;  // a bit for each key of this thread
#pragma unroll
  for (int j = 0; j < kOwn; ++j) {
    const uint4 quad = quads[j / 4];
    const uint32_t key = j % 4 == 0 ? quad.x : j % 4 == 1 ? quad.y : j % 4 == 2 ? quad.z : quad.w;
    if (first + j < n) above |= uint32_t{key > t.prefix} << j, equal |= uint32_t{key == t.prefix} << j;
  }
  int ties = 0;
  for (int c = threadIdx.x; c < p.part; c += kSelectThreads)
    ties += w.last_digits[static_cast<int64_t>(blockIdx.x - p.part + c) * D::kBins + (t.prefix & (D::kBins - 1))];
  ties = block_sums<kSelectThreads>(ties).all;
  const Sums sums = block_sums<kSelectThreads>(__popc(above) | __popc(equal) << 16);  // a chunk's counts fit 16 bits
  if (threadIdx.x == 0) base = atomicAdd(&w.appended[p.segment], sums.all & 0xffff);
  __syncthreads();
  uint64_t* selected = w.selected + static_cast<int64_t>(p.image) * shape.row[shape.levels] + shape.row[p.level];
  const uint32_t* keys = w.keys + static_cast<int64_t>(blockIdx.x) * kChunk + threadIdx.x * kOwn;
  const auto entry = [&](uint32_t bits) {
    const int j = __ffs(bits) - 1;
    return static_cast<uint64_t>(~keys[j]) << 32 | (first + j);
  };
  for (int at = base + (sums.before & 0xffff); above != 0; above &= above - 1) selected[at++] = entry(above);
  ties += sums.before >> 16;
  selected += shape.count[p.level] - t.rank;  // the last t.rank places are theirs
  for (; equal != 0 && ties < t.rank; equal &= equal - 1) selected[ties++] = entry(equal);
}

Shape make_shape(const ProposalInputs& in) {
  Shape s{};
  const int64_t batch = in.sizes.size(0);
  s.levels = static_cast<int>(in.logits.size());
  int64_t chunks = 0, groups = 0;
  for (int l = 0; l < s.levels; ++l) {
    const Tensor& x = in.logits[l];
    s.size[l] = static_cast<int>(x.size(1) * x.size(2) * x.size(3));
    s.count[l] = static_cast<int>(in.start[l + 1] - in.start[l]);
    chunks += (int64_t{s.size[l]} + kChunk - 1) / kChunk;
    groups += (int64_t{s.count[l]} + kGroup - 1) / kGroup;
    CHECK_ARGUMENT(in.start[l + 1] < int64_t{1} << 31 && batch * chunks < int64_t{1} << 31,
                    "cls_logits: too many anchors for one call");
    s.chunk[l + 1] = static_cast<int>(chunks), s.group[l + 1] = static_cast<int>(groups);
    s.row[l + 1] = static_cast<int>(in.start[l + 1]);
  }
  return s;
}

// Leaves the candidates that count in `selected` [B, K], level by level and in any order within one.
template <class F>
void select(const Plan<float, F>& plan, int64_t batch, bool use_sigmoid, Tensor& selected, cudaStream_t stream) {
  const Shape& shape = plan.shape;
  const int64_t segments = batch * shape.levels, chunks = batch * shape.chunk[shape.levels];
  Tensor counters = empty_like_device(selected, {segments * (kAllBins + 1 + 4)}, ScalarType::Int);
  Tensor keys = empty_like_device(selected, {chunks * kChunk}, ScalarType::Int);
  Tensor last_digits = empty_like_device(selected, {chunks * Digit<2>::kBins}, ScalarType::Short);
  int* histograms = counters.mutable_data_ptr<int>();
  int* appended = histograms + segments * kAllBins;
  const Work w{histograms, appended, reinterpret_cast<Threshold*>(appended + segments),
               reinterpret_cast<uint32_t*>(keys.mutable_data_ptr<int>()),
               reinterpret_cast<uint16_t*>(last_digits.mutable_data_ptr<int16_t>()),
               reinterpret_cast<uint64_t*>(selected.mutable_data_ptr<int64_t>())};
  STD_CUDA_CHECK(cudaMemsetAsync(histograms, 0, segments * (kAllBins + 1) * sizeof(int), stream));
  first_digit_kernel<F><<<chunks, kSelectThreads, 0, stream>>>(plan, w, use_sigmoid);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  digit_kernel<1><<<chunks, kSelectThreads, 0, stream>>>(shape, w);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  digit_kernel<2><<<chunks, kSelectThreads, 0, stream>>>(shape, w);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  collect_kernel<<<chunks, kSelectThreads, 0, stream>>>(shape, w);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace
}  // namespace fastrcnn
