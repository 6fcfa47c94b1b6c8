// What NMS knows of a tile of 256 sorted boxes before it knows of any survivor, which boxes overlap which as bit masks, and
// how the boxes that are left of a tile are settled among themselves.
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

}  // namespace
}  // namespace fastrcnn
