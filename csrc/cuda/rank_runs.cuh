// Ranks by score of rows that lie in order already: by group, and by score within it, as decode_proposals leaves them.
// Groups are then sorted runs, and a row's rank is what stands before it in each of them: one launch instead of two sorts.
#pragma once

#include "scan.cuh"
#include "sort.cuh"

namespace fastrcnn {

constexpr int kMostRuns = 16;
template <class Key>
constexpr int kMostRunRows = (46 << 10) / sizeof(Key);  // whose keys fit shared memory

// rows.length(list); rows.key(list, i) and rows.group(list, i), by which a list is sorted if it is; rows.emit(list, rank, i)
// is called for every row of a list that is, and has no more than kMostRuns groups, and its number in `done` set to 1.
// Blocks of kSortChunk rows; each looks at the whole list, so that none waits for another.
template <class Key, class Rows>
__global__ void __launch_bounds__(kSortChunk) rank_runs_kernel(int chunks, Rows rows, int* done) {
  __shared__ Key keys[kMostRunRows<Key>];
  __shared__ int found[kMostRuns], start[kMostRuns + 1], next;
  const int list = blockIdx.x / chunks, n = rows.length(list), i = threadIdx.x;
  for (int k = i; k < n; k += kSortChunk) keys[k] = rows.key(list, k);
  if (i == 0) next = 0;
  __syncthreads();
  bool sorted = true;
  int own_starts = 0;
  for (int k = i; k < n; k += kSortChunk) {
    const auto group = rows.group(list, k), before = rows.group(list, max(k - 1, 0));
    own_starts += k == 0 || before != group;
    sorted = sorted && (k == 0 || before < group || (before == group && keys[k - 1] <= keys[k]));
  }
  if (__syncthreads_or(!sorted)) return;
  const int runs = block_sums<kSortChunk>(own_starts).all;
  if (runs > kMostRuns) return;
  for (int k = i; k < n && own_starts > 0; k += kSortChunk)
    if (k == 0 || rows.group(list, k - 1) != rows.group(list, k)) found[atomicAdd(&next, 1)] = k;
  __syncthreads();
  if (i < runs) {
    int place = 0;
    for (int r = 0; r < runs; ++r) place += found[r] < found[i];
    start[place] = found[i];
  }
  if (i == 0) start[runs] = n;
  __syncthreads();

  const int row = blockIdx.x % chunks * kSortChunk + i;
  if (row == 0) done[list] = 1;
  if (row >= n) return;
  const Key mine = keys[row];
  int rank = 0;
  for (int r = 0; r < runs; ++r) {
    int low = start[r], high = start[r + 1];
    while (low < high) {
      const int middle = (low + high) / 2;
      if (keys[middle] < mine || (keys[middle] == mine && middle < row)) {  // equal keys stay in their order
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    rank += low - start[r];
  }
  rows.emit(list, rank, row);
}

}  // namespace fastrcnn
