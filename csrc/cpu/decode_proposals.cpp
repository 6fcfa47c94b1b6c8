// RPN maps -> proposals: per-level top-k, anchors, decoding, clipping and the size filter in one pass over each image
// and level. Anchors are computed where they are needed and never stored.
#include "decode_proposals.h"
#include "threads.h"

#include <functional>
#include <utility>

namespace fastrcnn {
namespace {

// keys[i] for the candidates of one level and image.
template <class T>
HOST_DEVICE void make_keys_body(const Level<T, T>& l, int64_t image, bool use_sigmoid, Key<T>* keys) {
  for (int64_t a = 0; a < l.anchors; ++a) {
    for (int64_t y = 0; y < l.height; ++y) {
      const T* row = l.logits + image * l.lb + a * l.la + y * l.lh;
      Key<T>* out = keys + y * l.width * l.anchors + a;
#pragma omp simd
      for (int64_t x = 0; x < l.width; ++x) out[x * l.anchors] = rank_key(row[x * l.lw], use_sigmoid);
    }
  }
}
SIMD_CLONES void make_keys(const Level<float, float>& l, int64_t image, bool use_sigmoid, uint32_t* keys) {
  make_keys_body(l, image, use_sigmoid, keys);
}
void make_keys(const Level<double, double>& l, int64_t image, bool use_sigmoid, uint64_t* keys) {
  make_keys_body(l, image, use_sigmoid, keys);
}

// Indices of the k largest keys, descending, equal keys by index. A histogram of the leading bits leaves only the
// candidates of the last bin to sort out, so the cost is two passes over the keys.
template <class K>
std::vector<int64_t> top_k(const std::vector<K>& keys, int64_t k) {
  constexpr int kShift = 8 * sizeof(K) - 12;
  std::vector<int64_t> histogram(size_t{1} << 12, 0);
  for (const K key : keys) ++histogram[key >> kShift];
  int64_t bin = static_cast<int64_t>(histogram.size()) - 1;
  for (int64_t seen = 0; bin > 0 && (seen += histogram[bin]) < k; --bin) {
  }
  std::vector<std::pair<K, int64_t>> candidates;  // key, then the negated index: greater is earlier
  const K lowest = static_cast<K>(bin) << kShift;
  for (size_t i = 0; i < keys.size(); ++i)
    if (keys[i] >= lowest) candidates.emplace_back(keys[i], -static_cast<int64_t>(i));
  const auto end = candidates.begin() + std::min<int64_t>(k, candidates.size());
  std::partial_sort(candidates.begin(), end, candidates.end(), std::greater<>());
  std::vector<int64_t> indices(end - candidates.begin());
  std::transform(candidates.begin(), end, indices.begin(), [](const auto& c) { return -c.second; });
  return indices;
}

template <class T>
struct Rows {
  T *boxes, *scores;  // [K, 4], [K]
  int64_t* levels;    // [K]
};

// One image, one level: writes the surviving rows and returns how many there are.
template <class T>
int64_t run_level(const Level<T, T>& l, int64_t level, int64_t image, const T* hw, int64_t k,
                  const ProposalRules<T>& rules, Rows<T> rows) {
  std::vector<Key<T>> keys(l.size());
  make_keys(l, image, !rules.topk_on_logits, keys.data());
  int64_t count = 0;
  for (const int64_t i : top_k(keys, k)) {
    Box<T> box;
    T score;
    if (!propose(l, image, static_cast<uint32_t>(i), hw, rules, box, score)) continue;
    memcpy(rows.boxes + count * 4, &box, sizeof(box));
    rows.scores[count] = score;
    rows.levels[count++] = level;
  }
  return count;
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;
template <class T>
Outputs run(const ProposalInputs& in, const ProposalRules<T>& rules) {
  const int64_t levels = static_cast<int64_t>(in.logits.size()), batch = in.sizes.size(0), total = in.start.back();
  Tensor boxes = empty_like_device(in.sizes, {batch, total, 4}, in.dtype);
  Tensor scores = empty_like_device(in.sizes, {batch, total}, in.dtype);
  Tensor level_ids = empty_like_device(in.sizes, {batch, total}, ScalarType::Long);
  Tensor counts = empty_like_device(in.sizes, {batch}, ScalarType::Long);
  const T* hw = in.sizes.const_data_ptr<T>();
  T *b = boxes.mutable_data_ptr<T>(), *s = scores.mutable_data_ptr<T>();
  int64_t* ids = level_ids.mutable_data_ptr<int64_t>();
  const auto rows_at = [&](int64_t image, int64_t row) {
    const int64_t at = image * total + row;
    return Rows<T>{b + at * 4, s + at, ids + at};
  };
  std::vector<int64_t> found(batch * levels);
  int64_t anchors = 0;
  for (const Tensor& map : in.logits) anchors += map.numel();
  share(batch * levels, 1, threads_for(anchors, 1 << 19), [&](int64_t first, int64_t last, int64_t) {
    for (int64_t t = first; t < last; ++t) {
      const int64_t image = t % batch, i = t / batch;
      found[t] = run_level(make_level<T, T>(in, i), i, image, hw + image * 2, in.start[i + 1] - in.start[i], rules,
                           rows_at(image, in.start[i]));
    }
  });
  // Close the gaps the filter left, so that each image's valid rows come first.
  for (int64_t image = 0; image < batch; ++image) {
    int64_t row = 0;
    for (int64_t i = 0; i < levels; ++i) {
      const Rows<T> to = rows_at(image, row), from = rows_at(image, in.start[i]);
      const int64_t n = found[i * batch + image];
      if (n == 0) continue;
      memmove(to.boxes, from.boxes, n * 4 * sizeof(T));
      memmove(to.scores, from.scores, n * sizeof(T));
      memmove(to.levels, from.levels, n * sizeof(int64_t));
      row += n;
    }
    std::fill_n(rows_at(image, row).boxes, (total - row) * 4, T(0));
    std::fill_n(rows_at(image, row).scores, total - row, T(0));
    std::fill_n(rows_at(image, row).levels, total - row, int64_t{-1});
    counts.mutable_data_ptr<int64_t>()[image] = row;
  }
  return {boxes, scores, level_ids, counts};
}

Outputs decode_proposals(std::vector<Tensor> cls_logits, std::vector<Tensor> bbox_deltas,
                         std::vector<Tensor> base_anchors, std::vector<double> strides, const Tensor& image_sizes,
                         int64_t nms_pre, std::vector<double> means, std::vector<double> stds, double wh_ratio_clip,
                         bool symmetric_clip, double min_size, bool topk_on_logits, bool return_logits,
                         std::optional<std::vector<int64_t>> batch_shape) {
  const ProposalInputs in =
      make_proposal_inputs(cls_logits, bbox_deltas, base_anchors, strides, image_sizes, nms_pre,
                           batch_shape.value_or(std::vector<int64_t>{}), /*convert=*/true);
  const auto run_as = [&](auto t) {
    using T = decltype(t);
    return run<T>(in, make_proposal_rules<T>(means, stds, wh_ratio_clip, symmetric_clip, min_size, topk_on_logits,
                                             return_logits));
  };
  return in.dtype == ScalarType::Double ? run_as(double()) : run_as(float());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrcnn, CPU, m) { m.impl("decode_proposals", TORCH_BOX(&decode_proposals)); }

}  // namespace fastrcnn
