// Exact greedy NMS of sorted boxes in one pass over tiles of 256, without host synchronisation and with O(N) memory.
//
// Boxes are sorted by (group, score). One kernel, over all the device, finds which boxes of a tile overlap which of the same
// tile and of the two before it, as bit masks. In a second one a block takes the next tile, drops its boxes that survivors
// of earlier tiles overlap, settles the rest among themselves and publishes which it kept; later tiles wait for that and
// for nothing else (blocks draw tickets, so whoever is waited for is running already). What bounds the time is this chain,
// so as little as possible is left for it: of the two tiles just before it takes masks and 256 bits each; tiles further
// back have long been compared, box by box, with their survivors. Groups that begin in a tile wait for nobody and are
// published first, so that each group is a chain of its own. Within a tile all boxes are decided in rounds: one whose
// earlier neighbours are all gone stays, one with a neighbour that stays goes. That is the greedy result, in as many
// rounds as the longest such chain.
#pragma once

#include "overlap.cuh"

#include <torch/csrc/stable/macros.h>

#include <cuda/atomic>

namespace fastrcnn {
namespace {

constexpr int kTile = 256, kWords = kTile / 32;
constexpr int kBack = 2;      // tiles before a box's own of which it has masks
constexpr int kColumns = 64;  // of a tile, for one block that makes masks

template <class T>
struct Problem {
  int batch, n, tiles, words;  // words: of 32 ranks, an image
  int masked, mask_words;      // tiles that a tile has masks for: itself and those before; words of a box's mask
  Bound<T> bound;
  int64_t max_output;
  const Box<T>* boxes;    // [B, N]
  const T* scores;        // [B, N]
  const int64_t* groups;  // [B, N] or null
  const int64_t* counts;  // [B] or null
  int* order;             // [B, N] rank by score -> row
  int* members;           // [B, N] place -> rank, by group and score; null without groups
  AlignedBox<T>* sorted;     // [B, N] boxes by place
  int64_t* sorted_group;  // [B, N]; null without groups
  unsigned* masks;        // [B, tiles, masked, mask_words, 32 * mask_words]: of the box in the last place
  // [B, tiles, 2, kWords] zeroed: 2^32 + the bits of the places kept, once they are known; first those of the group that
  // began in an earlier tile, then those of groups that begin here.
  uint64_t* published;
  unsigned* keep;  // [B, words] zeroed: bits of the ranks kept
  int* in_order;   // [B] zeroed: 1 where the rows came sorted by group and score
  unsigned* ticket;  // zeroed

  __device__ int valid(int image) const {
    if (counts == nullptr) return n;
    const int64_t c = counts[image];
    return c < 0 ? 0 : (c < n ? static_cast<int>(c) : n);
  }
  __device__ int64_t row(int image) const { return static_cast<int64_t>(image) * n; }
  __device__ unsigned* masks_of(int image, int tile, int back) const {
    return masks + ((static_cast<int64_t>(image) * tiles + tile) * masked + back) * mask_words * mask_words * 32;
  }
};

// The masks of one tile's boxes over kColumns places of the same tile (bits of earlier places) or of one before it, of the
// same group only. All blocks together also fill `indices` with -1.
template <class T>
__global__ void __launch_bounds__(kTile) mask_kernel(Problem<T> p, int64_t* indices) {
  __shared__ Staged<T, kColumns> staged;
  __shared__ unsigned heads[kWords];
  const int i = threadIdx.x, lane = i % 32, warp = i / 32;
#pragma unroll 1
  for (int64_t k = static_cast<int64_t>(blockIdx.x) * kTile + i; k < p.batch * p.max_output;
       k += static_cast<int64_t>(gridDim.x) * kTile)
    indices[k] = -1;
  const int parts = (p.mask_words * 32 + kColumns - 1) / kColumns, part = blockIdx.x % parts;
  const int back = blockIdx.x / parts % p.masked, at = blockIdx.x / parts / p.masked;
  const int image = at / p.tiles, tile = at % p.tiles, begin = tile * kTile;
  const int valid = p.valid(image), from = begin - back * kTile + part * kColumns;
  if (begin >= valid || tile < back) return;
  const AlignedBox<T>* boxes = p.sorted + p.row(image);
  const bool inside = begin + i < valid;
  const AlignedBox<T> mine = inside ? boxes[begin + i] : AlignedBox<T>{};
  if (i < kColumns) {
    staged.set(i, from + i < valid ? boxes[from + i] : AlignedBox<T>{}, p.bound);
  }
  int first = 0, last = back == 0 ? i - part * kColumns : kColumns;  // the columns of this box's group
  if (p.groups != nullptr) {
    const int64_t* groups = p.sorted_group + p.row(image);
    if (back == 0) {
      const unsigned begins = __ballot_sync(~0u, i > 0 && inside && groups[begin + i] != groups[begin + i - 1]);
      if (lane == 0) heads[warp] = begins;
      __syncthreads();
      for (int w = 0; w <= warp; ++w) {
        const unsigned until_me = heads[w] & bit_range(0, i + 1 - w * 32);
        if (until_me != 0) first = w * 32 + 31 - __clz(until_me) - part * kColumns;
      }
    } else {
      first = kColumns - __syncthreads_count(i < kColumns && groups[from + i] == groups[begin]);
      if (inside && groups[begin + i] != groups[begin]) first = kColumns;
    }
  }
  __syncthreads();
  const T share = p.bound.share(mine);
  unsigned* masks = p.masks_of(image, tile, back) + i;
#pragma unroll
  for (int w = 0; w < kColumns / 32; ++w) {
    const unsigned wanted = inside ? bit_range(first - w * 32, last - w * 32) : 0;
    const unsigned word = overlap_word(staged, w * 32, wanted, mine, share, p.bound);
    const int to = part * (kColumns / 32) + w;
    if (to < p.mask_words && i < p.mask_words * 32) masks[to * p.mask_words * 32] = word;
  }
}

// Flag and bits are one word, so no order among different words is needed.
using Published = cuda::atomic_ref<uint64_t, cuda::thread_scope_device>;
__device__ inline unsigned wait_for(uint64_t* word) {
  uint64_t value;
  while ((value = Published(*word).load(cuda::memory_order_relaxed)) >> 32 == 0) __nanosleep(20);
  return static_cast<unsigned>(value);
}
__device__ inline void load_words(const unsigned* from, unsigned (&words)[kWords]) {
#pragma unroll
  for (int w = 0; w < kWords; ++w) words[w] = from[w];
}

struct Votes {
  alignas(16) unsigned alive[kWords];
  alignas(16) unsigned hits[2][kWords];
  alignas(16) unsigned waits[2][kWords];
};
// Decides the boxes that are alive, each by what it overlaps `within` the tile, and adds those that stay to `kept`. Every
// thread keeps the state of all boxes.
__device__ inline void settle(bool alive, const unsigned (&within)[kWords], unsigned (&kept)[kWords], Votes& votes) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned bits = __ballot_sync(~0u, alive);
  if (lane == 0) votes.alive[warp] = bits;
  __syncthreads();
  unsigned open[kWords], left = 0;
  load_words(votes.alive, open);
#pragma unroll
  for (int w = 0; w < kWords; ++w) left |= open[w];
  for (int parity = 0; left != 0; parity ^= 1) {
    unsigned hit = 0, wait = 0;
#pragma unroll
    for (int w = 0; w < kWords; ++w) hit |= within[w] & kept[w], wait |= within[w] & open[w];
    const unsigned hits = __ballot_sync(~0u, hit != 0), waits = __ballot_sync(~0u, wait != 0);
    if (lane == 0) votes.hits[parity][warp] = hits, votes.waits[parity][warp] = waits;
    __syncthreads();
    unsigned gone[kWords], undecided[kWords];
    load_words(votes.hits[parity], gone);
    load_words(votes.waits[parity], undecided);
    left = 0;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      kept[w] |= open[w] & ~gone[w] & ~undecided[w];
      open[w] &= undecided[w] & ~gone[w];
      left |= open[w];
    }
  }
}

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

}  // namespace
}  // namespace fastrcnn
