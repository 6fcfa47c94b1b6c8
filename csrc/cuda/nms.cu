// Exact greedy NMS in one pass over tiles of 256 boxes, without host synchronisation and with O(N) memory.
//
// Boxes are sorted by (group, score). A block takes the next tile of that order, drops its boxes that survivors of earlier
// tiles of the same group overlap, settles the rest among themselves and publishes which it kept; later tiles wait for that
// and for nothing else (blocks draw tickets, so whoever is waited for is running already). What bounds the time is this
// chain, so as little as possible is left for it: the overlaps with the tile just before, and those within the tile, are
// computed as bit masks while waiting, and a tile publishes 256 bits, not boxes. Tiles further back are compared box by
// box with their survivors only. Within a tile all boxes are decided in rounds: one whose earlier neighbours are all gone
// stays, one with a neighbour that stays goes. That is the greedy result, in as many rounds as the longest such chain.
#include "box_math.h"
#include "scan.cuh"
#include "sort.cuh"

#include <torch/csrc/stable/accelerator.h>

#include <algorithm>

namespace fastrcnn {
namespace {

constexpr int kTile = 256, kWords = kTile / 32, kCompactThreads = 1024;

// Keys that sort by descending score, NaN first, and -0.0 as 0.0: what torch.sort(descending=True) does.
template <class T>
__device__ uint64_t score_key(T score) {
  return score == score ? static_cast<decltype(sortable(score))>(~sortable(score + T(0))) : 0;
}

template <class T>
struct Problem {
  int batch, n, tiles, words;  // words: of 32 ranks, an image
  T threshold;
  int64_t max_output;
  const Box<T>* boxes;    // [B, N]
  const T* scores;        // [B, N]
  const int64_t* groups;  // [B, N] or null
  const int64_t* counts;  // [B] or null
  int* order;             // [B, N] rank by score -> row
  int* members;           // [B, N] place -> rank, by group and score; null without groups
  AlignedBox<T>* sorted;     // [B, N] boxes by place
  int64_t* sorted_group;  // [B, N]; null without groups
  unsigned long long* published;  // [B, tiles, kWords] zeroed: 2^32 + the bits of the places kept, once they are known
  unsigned* keep;                 // [B, words] zeroed: bits of the ranks kept
  unsigned* ticket;               // zeroed

  __device__ int valid(int image) const {
    if (counts == nullptr) return n;
    const int64_t c = counts[image];
    return c < 0 ? 0 : (c < n ? static_cast<int>(c) : n);
  }
  __device__ int64_t row(int image) const { return static_cast<int64_t>(image) * n; }
};

template <class T>
struct ByScore {
  Problem<T> p;
  __device__ uint64_t operator()(int image, int i) const {
    return i < p.valid(image) ? score_key(p.scores[p.row(image) + i]) : ~uint64_t{0};
  }
};
template <class T>
struct PlaceByScore {
  Problem<T> p;
  __device__ void operator()(int image, int place, int i) const {
    p.order[p.row(image) + place] = i;
    if (p.groups == nullptr) p.sorted[p.row(image) + place] = {p.boxes[p.row(image) + i]};
  }
};
template <class T>
struct ByGroup {  // of the box with this rank; the rank breaks ties
  Problem<T> p;
  __device__ uint64_t operator()(int image, int rank) const {
    if (rank >= p.valid(image)) return ~uint64_t{0};
    return static_cast<uint64_t>(p.groups[p.row(image) + p.order[p.row(image) + rank]]) ^ uint64_t{1} << 63;
  }
};
template <class T>
struct PlaceByGroup {
  Problem<T> p;
  __device__ void operator()(int image, int place, int rank) const {
    const int64_t at = p.row(image) + place, from = p.row(image) + p.order[p.row(image) + rank];
    p.members[at] = rank;
    p.sorted[at] = {p.boxes[from]};
    p.sorted_group[at] = p.groups[from];
  }
};

// Whether IoU > threshold is possible, by a product instead of IEEE's division, which is left to decide the few pairs that
// pass. Underflow, infinities and NaN all pass or have no overlap: the comparison is with a margin that no rounding error
// reaches. fmin and fmax take one instruction; that they drop a NaN does not matter here, since its box has no area.
template <class T>
__device__ bool may_overlap(const Box<T>& a, T area_a, const Box<T>& b, T area_b, T threshold) {
  const T w = fmin(a.x2, b.x2) - fmax(a.x1, b.x1), h = fmin(a.y2, b.y2) - fmax(a.y1, b.y1);
  const T inter = w * h, united = area_a + area_b - inter;
  return w > T(0) && h > T(0) && !(inter * T(1.0001) < threshold * united);
}

template <class T>
struct Staged {  // boxes that a whole block compares with
  AlignedBox<T> box[kTile];
  T area[kTile];
  __device__ void set(int i, const AlignedBox<T>& b) {
    box[i] = b;
    area[i] = fastrcnn::area(b);
  }
};

// Bits [first, last) of 32, for whatever first and last.
__device__ inline unsigned bit_range(int first, int last) {
  const unsigned from = first <= 0 ? ~0u : (first < 32 ? ~0u << first : 0u);
  const unsigned until = last <= 0 ? 0u : (last < 32 ? ~(~0u << last) : ~0u);
  return from & until;
}

// Which of the 32 staged boxes from 32 * w on overlap `b`, of those wanted. Without branches but for the few in doubt.
template <class T>
__device__ unsigned overlap_word(const Staged<T>& staged, int w, unsigned wanted, const Box<T>& b, T area_b, T threshold) {
  if (wanted == 0) return 0;  // bounds differ between threads, and a warp often skips whole words
  unsigned word = 0;
#pragma unroll 8
  for (int k = 0, j = w * 32; k < 32; ++k, ++j)
    if (may_overlap(staged.box[j], staged.area[j], b, area_b, threshold)) word |= 1u << k;
  word &= wanted;
  for (unsigned rest = word; rest != 0; rest &= rest - 1) {
    const int k = __ffs(rest) - 1, j = w * 32 + k;
    if (!(iou(staged.box[j], staged.area[j], b, area_b) > threshold)) word &= ~(1u << k);
  }
  return word;
}

__device__ inline unsigned wait_for(const unsigned long long* word) {
  unsigned long long value;
  while (((value = *static_cast<const volatile unsigned long long*>(word)) >> 32) == 0) __nanosleep(20);
  return static_cast<unsigned>(value);
}

template <class T>
__global__ void __launch_bounds__(kTile) nms_kernel(Problem<T> p) {
  __shared__ Staged<T> staged;
  __shared__ unsigned drawn, words[kWords], votes[2][2][kWords];
  const int i = threadIdx.x, lane = i % 32, warp = i / 32;
  if (i == 0) drawn = atomicAdd(p.ticket, 1u);
  __syncthreads();
  // Images take turns, so that the first tiles of all of them start first.
  const int image = static_cast<int>(drawn % p.batch), tile = static_cast<int>(drawn / p.batch), begin = tile * kTile;
  const int size = min(kTile, p.valid(image) - begin);
  if (size <= 0) return;  // the same for the whole block, and nobody waits for this tile
  const AlignedBox<T>* boxes = p.sorted + p.row(image);
  const int64_t* groups = p.groups == nullptr ? nullptr : p.sorted_group + p.row(image);
  unsigned long long* published = p.published + static_cast<int64_t>(image) * p.tiles * kWords;
  const AlignedBox<T> mine = i < size ? boxes[begin + i] : AlignedBox<T>{};
  const T my_area = area(mine);

  // first: where this box's group begins in the tile. start: where the group of the tile's first box begins in the image.
  int first = 0, start = 0;
  if (groups != nullptr) {
    const unsigned heads = __ballot_sync(~0u, i > 0 && i < size && groups[begin + i] != groups[begin + i - 1]);
    if (lane == 0) words[warp] = heads;
    __syncthreads();
    for (int w = 0; w <= warp; ++w) {
      const unsigned until_me = words[w] & bit_range(0, i + 1 - w * 32);
      if (until_me != 0) first = w * 32 + 31 - __clz(until_me);
    }
    int before = 0;  // tiles that end in the group: they lie just before this one
    for (int t = i; t - i < tile; t += kTile)
      before += __syncthreads_count(t < tile && groups[t * kTile + kTile - 1] == groups[begin]);
    start = begin;
    if (before > 0) {
      const int oldest = (tile - before) * kTile;
      start = oldest + kTile - __syncthreads_count(groups[oldest + i] == groups[begin]);
    }
  }
  const bool continues = first == 0 && i < size;  // this box's group may have begun in an earlier tile

  unsigned earlier[kWords] = {}, within[kWords] = {};
  if (start < begin) {
    staged.set(i, boxes[begin - kTile + i]);
    __syncthreads();
    const int from = start - (begin - kTile);
#pragma unroll
    for (int w = 0; w < kWords; ++w)
      earlier[w] = overlap_word(staged, w, continues ? bit_range(from - w * 32, 32) : 0, mine, my_area, p.threshold);
    __syncthreads();
  }
  staged.set(i, mine);
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWords; ++w)
    within[w] = overlap_word(staged, w, i < size ? bit_range(first - w * 32, i - w * 32) : 0, mine, my_area, p.threshold);
  __syncthreads();

  bool alive = i < size;
  int64_t kept_before = 0;
  for (int t = start / kTile; t < tile; ++t) {
    if (i < kWords) words[i] = wait_for(published + t * kWords + i) & bit_range(start - t * kTile - i * 32, 32);
    __syncthreads();
    int total = 0, slot = 0;
    unsigned hit = 0;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      slot += w < warp ? __popc(words[w]) : 0;
      total += __popc(words[w]);
      hit |= earlier[w] & words[w];
    }
    if (t + 1 == tile) {
      alive = alive && hit == 0;
    } else {
      if (words[warp] >> lane & 1) staged.set(slot + __popc(words[warp] & bit_range(0, lane)), boxes[t * kTile + i]);
      __syncthreads();
      for (int w = 0; w * 32 < total && alive && continues; ++w)
        alive = overlap_word(staged, w, bit_range(0, total - w * 32), mine, my_area, p.threshold) == 0;
    }
    kept_before += total;
    if (kept_before >= p.max_output) alive = alive && !continues;  // the group has given all that can be asked of it
    if (!__syncthreads_or(alive && continues)) break;
  }

  // Every thread keeps the state of all 256 boxes.
  unsigned kept[kWords] = {}, open[kWords];
  const unsigned alive_bits = __ballot_sync(~0u, alive);
  if (lane == 0) votes[0][0][warp] = alive_bits;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWords; ++w) open[w] = votes[0][0][w];
  unsigned left = 1;
  for (int parity = 1; left != 0; parity ^= 1) {
    unsigned hit = 0, waits = 0;
#pragma unroll
    for (int w = 0; w < kWords; ++w) hit |= within[w] & kept[w], waits |= within[w] & open[w];
    const unsigned hits = __ballot_sync(~0u, hit != 0), waiting = __ballot_sync(~0u, waits != 0);
    if (lane == 0) votes[parity][0][warp] = hits, votes[parity][1][warp] = waiting;
    __syncthreads();
    left = 0;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const unsigned gone = votes[parity][0][w], undecided = votes[parity][1][w];
      kept[w] |= open[w] & ~gone & ~undecided;
      open[w] &= undecided & ~gone;
      left |= open[w];
    }
  }
  unsigned my_word = 0;
#pragma unroll
  for (int w = 0; w < kWords; ++w) my_word = w == warp ? kept[w] : my_word;
  if (lane == 0)
    *static_cast<volatile unsigned long long*>(published + tile * kWords + warp) = 1ull << 32 | my_word;

  unsigned* keep = p.keep + static_cast<int64_t>(image) * p.words;
  if (p.members == nullptr) {
    if (lane == 0 && warp * 32 < size) keep[tile * kWords + warp] = my_word;
  } else if (my_word >> lane & 1) {
    const int rank = p.members[p.row(image) + begin + i];
    atomicOr(keep + rank / 32, 1u << rank % 32);
  }
}

// One block an image: the first max_output kept ranks, as rows, in order.
template <class T>
__global__ void __launch_bounds__(kCompactThreads) compact_kernel(Problem<T> p, int64_t* indices, int64_t* num_kept) {
  const int image = blockIdx.x, i = threadIdx.x;
  const unsigned* keep = p.keep + static_cast<int64_t>(image) * p.words;
  int64_t* out = indices + image * p.max_output;
  int64_t done = 0;
  for (int begin = 0; begin < p.words && done < p.max_output; begin += kCompactThreads) {
    unsigned bits = begin + i < p.words ? keep[begin + i] : 0;
    const Sums sums = block_sums<kCompactThreads>(__popc(bits));
    int64_t at = done + sums.before;
    done += sums.all;
    for (; bits != 0 && at < p.max_output; bits &= bits - 1, ++at)
      out[at] = p.order[p.row(image) + (begin + i) * 32 + __ffs(bits) - 1];
  }
  const int64_t total = done < p.max_output ? done : p.max_output;
  for (int64_t k = total + i; k < p.max_output; k += kCompactThreads) out[k] = -1;
  if (i == 0) num_kept[image] = total;
}

template <class T>
void run(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& groups,
         const std::optional<Tensor>& counts, double iou_threshold, Tensor& indices, Tensor& num_kept) {
  const int64_t batch = boxes.size(0), n = boxes.size(1), tiles = (n + kTile - 1) / kTile, words = (n + 31) / 32;
  CHECK_ARGUMENT(batch * n < int64_t{1} << 31, "boxes: more than 2^31 rows");
  const cudaStream_t stream = current_stream(boxes);
  if (batch == 0) return;
  // torchvision's CUDA kernel takes the threshold as a float, for boxes of every dtype.
  Problem<T> p{static_cast<int>(batch), static_cast<int>(n), static_cast<int>(tiles), static_cast<int>(words),
               static_cast<T>(static_cast<float>(iou_threshold)), indices.size(1)};
  const auto buffer = [&](int64_t numbers, ScalarType dtype) { return empty_like_device(boxes, {numbers}, dtype); };
  Tensor order = buffer(batch * n, ScalarType::Int), sorted = buffer(batch * n * 4, boxes.scalar_type());
  Tensor members = buffer(groups ? batch * n : 0, ScalarType::Int);
  Tensor sorted_group = buffer(groups ? batch * n : 0, ScalarType::Long);
  const int64_t state_bytes = batch * tiles * kWords * 8 + batch * words * 4 + 4;
  Tensor state = buffer((state_bytes + 7) / 8, ScalarType::Long);
  p.boxes = reinterpret_cast<const Box<T>*>(boxes.const_data_ptr<T>());
  p.scores = scores.const_data_ptr<T>();
  p.groups = groups ? groups->const_data_ptr<int64_t>() : nullptr;
  p.counts = counts ? counts->const_data_ptr<int64_t>() : nullptr;
  p.order = order.mutable_data_ptr<int>();
  p.members = groups ? members.mutable_data_ptr<int>() : nullptr;
  p.sorted = reinterpret_cast<AlignedBox<T>*>(sorted.mutable_data_ptr<T>());
  p.sorted_group = groups ? sorted_group.mutable_data_ptr<int64_t>() : nullptr;
  p.published = reinterpret_cast<unsigned long long*>(state.mutable_data_ptr<int64_t>());
  p.keep = reinterpret_cast<unsigned*>(p.published + batch * tiles * kWords);
  p.ticket = p.keep + batch * words;
  if (n > 0) {
    STD_CUDA_CHECK(cudaMemsetAsync(p.published, 0, state_bytes, stream));
    sort_lists(batch, p.n, boxes, ByScore<T>{p}, PlaceByScore<T>{p});
    if (groups) sort_lists(batch, p.n, boxes, ByGroup<T>{p}, PlaceByGroup<T>{p});
    nms_kernel<T><<<static_cast<int>(batch * tiles), kTile, 0, stream>>>(p);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  compact_kernel<T><<<p.batch, kCompactThreads, 0, stream>>>(p, indices.mutable_data_ptr<int64_t>(),
                                                              num_kept.mutable_data_ptr<int64_t>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor> nms_padded(const Tensor& boxes, const Tensor& scores, std::optional<Tensor> groups,
                                      double iou_threshold, int64_t max_output, std::optional<Tensor> counts) {
  const torch::stable::accelerator::DeviceGuard guard(boxes.get_device_index());
  const int64_t batch = boxes.size(0), n = boxes.size(1);
  CHECK_SHAPE(boxes, batch, n, 4);
  CHECK_SHAPE(scores, batch, n);
  if (groups) {
    CHECK_SHAPE(*groups, batch, n);
    groups = contiguous_as(*groups, ScalarType::Long);
  }
  if (counts) {
    CHECK_SHAPE(*counts, batch);
    counts = contiguous_as(*counts, ScalarType::Long);
  }
  const ScalarType dtype = coordinate_type(boxes);
  Tensor indices = empty_like_device(boxes, {batch, max_output}, ScalarType::Long);
  Tensor num_kept = empty_like_device(boxes, {batch}, ScalarType::Long);
  const auto launch = dtype == ScalarType::Double ? run<double> : run<float>;
  launch(contiguous_as(boxes, dtype), contiguous_as(scores, dtype), groups, counts, iou_threshold, indices, num_kept);
  return {indices, num_kept};
}

// The number of survivors is the answer's size: the one thing here that the host has to wait for.
Tensor survivors(const Tensor& boxes, const Tensor& scores, std::optional<Tensor> groups, double iou_threshold,
                 int64_t max_output) {
  const int64_t n = boxes.size(0);
  CHECK_SHAPE(boxes, n, 4);
  CHECK_SHAPE(scores, n);
  const auto one = [](const Tensor& t) { return torch::stable::unsqueeze(t, 0); };
  if (groups) {
    CHECK_SHAPE(*groups, n);
    groups = one(*groups);
  }
  const auto [indices, num_kept] =
      nms_padded(one(boxes), one(scores), groups, iou_threshold, std::min(max_output, n), std::nullopt);
  const torch::stable::accelerator::DeviceGuard guard(boxes.get_device_index());
  const cudaStream_t stream = current_stream(boxes);
  int64_t count = 0;
  STD_CUDA_CHECK(cudaMemcpyAsync(&count, num_kept.const_data_ptr<int64_t>(), 8, cudaMemcpyDeviceToHost, stream));
  STD_CUDA_CHECK(cudaStreamSynchronize(stream));
  Tensor list = torch::stable::flatten(indices);
  return torch::stable::narrow(list, 0, 0, count);
}

Tensor nms(const Tensor& boxes, const Tensor& scores, double iou_threshold) {
  return survivors(boxes, scores, std::nullopt, iou_threshold, boxes.size(0));
}

Tensor batched_nms(const Tensor& boxes, const Tensor& scores, const Tensor& idxs, double iou_threshold,
                   std::optional<int64_t> max_output) {
  return survivors(boxes, scores, idxs, iou_threshold, max_output.value_or(boxes.size(0)));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrcnn, CUDA, m) {
  m.impl("nms", TORCH_BOX(&nms));
  m.impl("batched_nms", TORCH_BOX(&batched_nms));
  m.impl("nms_padded", TORCH_BOX(&nms_padded));
}

}  // namespace fastrcnn
