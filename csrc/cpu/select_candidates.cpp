// The best scores above a threshold. Blocks of an image's scores are counted first, vectorised: most have none above it
// and are not looked at again.
#include "box_math.h"
#include "threads.h"

#include <algorithm>

namespace fastrcnn {
namespace {

constexpr int64_t kBlock = 1024;

template <class T>
HOST_DEVICE int count_above_body(const T* scores, int64_t n, T threshold) {
  int count = 0;
#pragma omp simd reduction(+ : count)
  for (int64_t i = 0; i < n; ++i) count += scores[i] > threshold;
  return count;
}
SIMD_CLONES int count_above(const float* scores, int64_t n, float threshold) {
  return count_above_body(scores, n, threshold);
}
int count_above(const double* scores, int64_t n, double threshold) { return count_above_body(scores, n, threshold); }

template <class T>
struct Candidate {
  T score;
  int64_t index;
  bool operator<(const Candidate& o) const { return score > o.score || (score == o.score && index < o.index); }
};

template <class T>
void run(const Tensor& scores, double threshold, int64_t most, T* values, int64_t* indices, int64_t* counts,
         int64_t* found) {
  const int64_t batch = scores.size(0), n = scores.size(1), blocks = (n + kBlock - 1) / kBlock;
  const T* data = scores.const_data_ptr<T>();
  const T limit = static_cast<T>(threshold);
  std::vector<int64_t> start(batch * blocks + 1, 0);  // of each block's candidates among those of the batch
  const int64_t threads = threads_for(batch * n, 1 << 24);
  share(batch * blocks, 64, threads, [&](int64_t first, int64_t last, int64_t) {
    for (int64_t b = first; b < last; ++b) {
      const int64_t at = b % blocks * kBlock;
      start[b + 1] = count_above(data + b / blocks * n + at, std::min(kBlock, n - at), limit);
    }
  });
  for (int64_t b = 0; b < batch * blocks; ++b) start[b + 1] += start[b];
  std::vector<Candidate<T>> all(start.back());
  share(batch * blocks, 64, threads, [&](int64_t first, int64_t last, int64_t) {
    for (int64_t b = first; b < last; ++b) {
      Candidate<T>* to = all.data() + start[b];
      const T* own = data + b / blocks * n;
      const int64_t end = std::min(n, (b % blocks + 1) * kBlock);
      for (int64_t i = b % blocks * kBlock; to < all.data() + start[b + 1] && i < end; ++i)
        if (own[i] > limit) *to++ = {own[i], i};
    }
  });
  share(batch, 1, threads, [&](int64_t first, int64_t last, int64_t) {
    for (int64_t b = first; b < last; ++b) {
      Candidate<T>*begin = all.data() + start[b * blocks], *end = all.data() + start[(b + 1) * blocks];
      const int64_t kept = std::min<int64_t>(end - begin, most);
      found[b] = end - begin, counts[b] = kept;
      if (kept < found[b]) std::nth_element(begin, begin + kept, end);
      std::sort(begin, begin + kept);
      for (int64_t k = 0; k < most; ++k) {
        values[b * most + k] = k < kept ? begin[k].score : T(0);
        indices[b * most + k] = k < kept ? begin[k].index : -1;
      }
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> select_candidates(const Tensor& scores, double threshold,
                                                             int64_t max_candidates) {
  const int64_t batch = scores.size(0);
  CHECK_ARGUMENT(scores.dim() == 2, "scores must have shape [B, N]");
  CHECK_ARGUMENT(max_candidates >= 0, "max_candidates must not be negative");
  const ScalarType dtype = coordinate_type(scores);
  const Tensor s = contiguous_as(scores, dtype);
  Tensor values = empty_like_device(scores, {batch, max_candidates}, dtype);
  Tensor indices = empty_like_device(scores, {batch, max_candidates}, ScalarType::Long);
  Tensor counts = empty_like_device(scores, {batch}, ScalarType::Long);
  Tensor found = empty_like_device(scores, {batch}, ScalarType::Long);
  const auto run_as = [&](auto t) {
    using T = decltype(t);
    run<T>(s, threshold, max_candidates, values.mutable_data_ptr<T>(), indices.mutable_data_ptr<int64_t>(),
           counts.mutable_data_ptr<int64_t>(), found.mutable_data_ptr<int64_t>());
  };
  dtype == ScalarType::Double ? run_as(double()) : run_as(float());
  return {values, indices, counts, found};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrcnn, CPU, m) { m.impl("select_candidates", TORCH_BOX(&select_candidates)); }

}  // namespace fastrcnn
