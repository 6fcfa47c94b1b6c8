// Exact greedy NMS in one pass over tiles of 256 boxes, without host synchronisation and with O(N) memory.
//
// Boxes are sorted by (group, score). One kernel, over all the device, finds which boxes of a tile overlap which of the
// same tile and of the two before it, as bit masks. In a second one a block takes the next tile, drops its boxes that
// survivors of earlier tiles overlap, settles the rest among themselves and publishes which it kept; later tiles wait for
// that and for nothing else (blocks draw tickets, so whoever is waited for is running already). What bounds the time is
// this chain, so as little as possible is left for it: of the two tiles just before it takes masks and 256 bits each;
// tiles further back have long been compared, box by box, with their survivors. Groups that begin in a tile wait for
// nobody and are published first, so that each group is a chain of its own. Within a tile all boxes are decided in rounds:
// one whose earlier neighbours are all gone stays, one with a neighbour that stays goes. That is the greedy result, in as
// many rounds as the longest such chain.
#include "nms_tiles.cuh"
#include "rank_runs.cuh"

#include <torch/csrc/stable/accelerator.h>

#include <algorithm>

namespace fastrcnn {
namespace {

constexpr int kCompactThreads = 1024;

// Keys that sort by descending score, NaN first, and -0.0 as 0.0: what torch.sort(descending=True) does.
template <class T>
using ScoreKey = decltype(sortable(T()));
template <class T>
__device__ ScoreKey<T> score_key(T score) {
  return score == score ? ~sortable(score + T(0)) : ScoreKey<T>{0};
}

template <class T>
struct ByScore {
  Problem<T> p;
  __device__ ScoreKey<T> operator()(int image, int i) const {
    return i < p.valid(image) ? score_key(p.scores[p.row(image) + i]) : ~ScoreKey<T>{0};
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
template <class T>
struct RowsInOrder {  // place and row are one
  Problem<T> p;
  __device__ int length(int image) const { return p.valid(image); }
  __device__ ScoreKey<T> key(int image, int i) const { return score_key(p.scores[p.row(image) + i]); }
  __device__ int64_t group(int image, int i) const { return p.groups[p.row(image) + i]; }
  __device__ void emit(int image, int rank, int i) const {
    p.order[p.row(image) + rank] = i;
    PlaceByGroup<T>{p}(image, i, rank);
  }
};

template <class T>
__global__ void __launch_bounds__(kTile) nms_kernel(Problem<T> p) {
  __shared__ Staged<T, kTile> staged;
  __shared__ Votes votes;
  __shared__ unsigned drawn;
  const int i = threadIdx.x, lane = i % 32, warp = i / 32;
  if (i == 0) drawn = atomicAdd(p.ticket, 1u);
  __syncthreads();
  // Images take turns, so that the first tiles of all of them start first.
  const int image = static_cast<int>(drawn % p.batch), tile = static_cast<int>(drawn / p.batch), begin = tile * kTile;
  const int size = min(kTile, p.valid(image) - begin);
  if (size <= 0) return;  // the same for the whole block, and nobody waits for this tile
  const AlignedBox<T>* boxes = p.sorted + p.row(image);
  const int64_t* groups = p.groups == nullptr ? nullptr : p.sorted_group + p.row(image);
  const auto published = [&](int t, int begun_there) {
    return p.published + ((static_cast<int64_t>(image) * p.tiles + t) * 2 + begun_there) * kWords;
  };

  int start = 0;  // where the group of the tile's first box begins in the image
  if (groups != nullptr) {
    int before = 0;  // tiles that end in the group: they lie just before this one
    for (int t = i; t - i < tile; t += kTile)
      before += __syncthreads_count(t < tile && groups[t * kTile + kTile - 1] == groups[begin]);
    start = begin;
    if (before > 0) {
      const int oldest = (tile - before) * kTile;
      start = oldest + kTile - __syncthreads_count(groups[oldest + i] == groups[begin]);
    }
  }
  const int start_tile = start / kTile;
  const bool continues = start < begin && i < size && (groups == nullptr || groups[begin + i] == groups[begin]);

  const auto load_masks = [&](int back, unsigned (&mask)[kWords]) {
    const int rows = p.mask_words * 32;
    const unsigned* from = p.masks_of(image, tile, back) + i;
    const bool there = tile - back >= start_tile && i < rows;
#pragma unroll
    for (int w = 0; w < kWords; ++w) mask[w] = there && w < p.mask_words ? from[w * rows] : 0;
  };
  unsigned within[kWords], kept[kWords] = {};
  load_masks(0, within);
  const auto publish = [&](int begun_here) {
    unsigned word = 0;
#pragma unroll
    for (int w = 0; w < kWords; ++w) word = w == i ? kept[w] : word;
    if (i < kWords)
      Published(published(tile, begun_here)[i]).store(uint64_t{1} << 32 | word, cuda::memory_order_relaxed);
  };
  if (__syncthreads_or(i < size && !continues)) {
    settle(i < size && !continues, within, kept, votes);
    publish(1);
  }
  if (start < begin) {
    const AlignedBox<T> mine = i < size ? boxes[begin + i] : AlignedBox<T>{};
    const T share = p.bound.share(mine);
    bool alive = continues, any = true;
    int64_t kept_before = 0;
    unsigned words[kWords];
    const auto wait_for_tile = [&](int t) {  // all warps wait by themselves: no barrier
      const unsigned own = lane < kWords ? wait_for(published(t, t == start_tile) + lane) : 0;
#pragma unroll
      for (int w = 0; w < kWords; ++w)
        words[w] = __shfl_sync(~0u, own, w) & bit_range(start - t * kTile - w * 32, 32);
    };
    for (int t = start_tile; t < tile - kBack && any; ++t) {
      wait_for_tile(t);
      int total = 0, slot = 0;
      unsigned mine_there = 0;
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        slot += w < warp ? __popc(words[w]) : 0;
        total += __popc(words[w]);
        mine_there = w == warp ? words[w] : mine_there;
      }
      if (mine_there >> lane & 1) {
        slot += __popc(mine_there & bit_range(0, lane));
        staged.set(slot, boxes[t * kTile + i], p.bound);
      }
      __syncthreads();
      for (int w = 0; w * 32 < total && alive; ++w)
        alive = overlap_word(staged, w * 32, bit_range(0, total - w * 32), mine, share, p.bound) == 0;
      kept_before += total;
      if (kept_before >= p.max_output) alive = false;  // the group has given all that can be asked of it
      any = __syncthreads_or(alive);
    }
    unsigned earlier[kBack + 1][kWords];
#pragma unroll
    for (int back = kBack; back > 0; --back) load_masks(back, earlier[back]);
#pragma unroll
    for (int back = kBack; back > 0; --back) {
      if (tile - back < start_tile || !any) continue;
      wait_for_tile(tile - back);
      unsigned hit = 0;
#pragma unroll
      for (int w = 0; w < kWords; ++w) hit |= earlier[back][w] & words[w];
      alive = alive && hit == 0;
    }
    settle(alive, within, kept, votes);
    publish(0);
  }

  unsigned my_word = 0;
#pragma unroll
  for (int w = 0; w < kWords; ++w) my_word = w == warp ? kept[w] : my_word;
  unsigned* keep = p.keep + static_cast<int64_t>(image) * p.words;
  if (p.members == nullptr) {
    if (lane == 0 && warp * 32 < size) keep[tile * kWords + warp] = my_word;
  } else if (my_word >> lane & 1) {
    const int rank = p.members[p.row(image) + begin + i];
    atomicOr(keep + rank / 32, 1u << rank % 32);
  }
}

// One block an image: the first max_output kept ranks, as rows, in order, over the -1 that stand there.
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
  if (i == 0) num_kept[image] = done < p.max_output ? done : p.max_output;
}

template <class T>
void run(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& groups,
         const std::optional<Tensor>& counts, double iou_threshold, Tensor& indices, Tensor& num_kept) {
  const int64_t batch = boxes.size(0), n = boxes.size(1), tiles = (n + kTile - 1) / kTile, words = (n + 31) / 32;
  CHECK_ARGUMENT(batch * n < int64_t{1} << 31, "boxes: more than 2^31 rows");
  const cudaStream_t stream = current_stream(boxes);
  auto* out = indices.mutable_data_ptr<int64_t>();
  auto* kept = num_kept.mutable_data_ptr<int64_t>();
  if (batch == 0) return;
  if (n == 0) {
    STD_CUDA_CHECK(cudaMemsetAsync(out, 0xff, batch * indices.size(1) * sizeof(int64_t), stream));
    STD_CUDA_CHECK(cudaMemsetAsync(kept, 0, batch * sizeof(int64_t), stream));
    return;
  }
  // torchvision's CUDA kernel takes the threshold as a float, for boxes of every dtype.
  Problem<T> p{static_cast<int>(batch), static_cast<int>(n), static_cast<int>(tiles), static_cast<int>(words),
               static_cast<int>(std::min<int64_t>(tiles, kBack + 1)), static_cast<int>(std::min<int64_t>(words, kWords)),
               Bound<T>(static_cast<float>(iou_threshold)), indices.size(1)};
  const int64_t mask_blocks = batch * tiles * p.masked * ((p.mask_words * 32 + kColumns - 1) / kColumns);
  CHECK_ARGUMENT(mask_blocks < int64_t{1} << 31, "boxes: more images than one call takes");
  const auto buffer = [&](int64_t numbers, ScalarType dtype) { return empty_like_device(boxes, {numbers}, dtype); };
  Tensor order = buffer(batch * n, ScalarType::Int), sorted = buffer(batch * n * 4, boxes.scalar_type());
  Tensor members = buffer(groups ? batch * n : 0, ScalarType::Int);
  Tensor sorted_group = buffer(groups ? batch * n : 0, ScalarType::Long);
  Tensor masks = buffer(batch * tiles * p.masked * p.mask_words * p.mask_words * 32, ScalarType::Int);
  const int64_t state_bytes = batch * tiles * 2 * kWords * 8 + (batch * words + batch + 1) * 4;
  Tensor state = buffer((state_bytes + 7) / 8, ScalarType::Long);
  p.boxes = reinterpret_cast<const Box<T>*>(boxes.const_data_ptr<T>());
  p.scores = scores.const_data_ptr<T>();
  p.groups = groups ? groups->const_data_ptr<int64_t>() : nullptr;
  p.counts = counts ? counts->const_data_ptr<int64_t>() : nullptr;
  p.order = order.mutable_data_ptr<int>();
  p.members = groups ? members.mutable_data_ptr<int>() : nullptr;
  p.sorted = reinterpret_cast<AlignedBox<T>*>(sorted.mutable_data_ptr<T>());
  p.sorted_group = groups ? sorted_group.mutable_data_ptr<int64_t>() : nullptr;
  p.masks = reinterpret_cast<unsigned*>(masks.mutable_data_ptr<int>());
  p.published = reinterpret_cast<uint64_t*>(state.mutable_data_ptr<int64_t>());
  p.keep = reinterpret_cast<unsigned*>(p.published + batch * tiles * 2 * kWords);
  p.in_order = reinterpret_cast<int*>(p.keep + batch * words);
  p.ticket = reinterpret_cast<unsigned*>(p.in_order + batch);
  STD_CUDA_CHECK(cudaMemsetAsync(p.published, 0, state_bytes, stream));

  using Key = ScoreKey<T>;
  const int* done = nullptr;
  if (groups && n <= kMostRunRows<Key>) {
    const int chunks = (p.n + kSortChunk - 1) / kSortChunk;
    rank_runs_kernel<Key, RowsInOrder<T>>
        <<<p.batch * chunks, kSortChunk, 0, stream>>>(chunks, RowsInOrder<T>{p}, p.in_order);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    done = p.in_order;
  }
  sort_lists(batch, p.n, boxes, ByScore<T>{p}, PlaceByScore<T>{p}, done);
  if (groups) sort_lists(batch, p.n, boxes, ByGroup<T>{p}, PlaceByGroup<T>{p}, done);
  mask_kernel<T><<<static_cast<int>(mask_blocks), kTile, 0, stream>>>(p, out);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  nms_kernel<T><<<static_cast<int>(batch * tiles), kTile, 0, stream>>>(p);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  compact_kernel<T><<<p.batch, kCompactThreads, 0, stream>>>(p, out, kept);
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
  int64_t count = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_item_int64(num_kept.get(), &count));  // through pinned memory
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
