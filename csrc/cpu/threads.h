// How kernels share work: in one region whose pieces go to whoever is free, so that a thread which the system holds up (a
// server shares its cores) keeps one piece, not its half. Each region may cost the wait for a thread that is not scheduled,
// some milliseconds: work of about that length stays on the calling thread.
#pragma once

#include "../common.h"

#include <algorithm>
#include <atomic>

namespace fastrcnn {

// For `work` of a unit of which `small` take some milliseconds: all threads, or the calling one.
inline int64_t threads_for(int64_t work, int64_t small) {
  return work < small ? 1 : static_cast<int64_t>(torch::stable::get_num_threads());
}

// run(first, last, thread) for pieces of [0, n) of `step`, on at most `threads` threads, numbered from 0.
template <class Run>
void share(int64_t n, int64_t step, int64_t threads, const Run& run) {
  threads = std::min(threads, (n + step - 1) / step);
  if (threads <= 1) {
    if (n > 0) run(int64_t{0}, n, int64_t{0});
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t thread, int64_t) {
    for (int64_t first = next.fetch_add(step); first < n; first = next.fetch_add(step))
      run(first, std::min(n, first + step), thread);
  });
}

}  // namespace fastrcnn
