// NMS over one set of boxes, over groups, and over a padded batch: sorts, splits into groups, runs the greedy scan.
#include "greedy_nms.h"
#include "threads.h"

#include <algorithm>
#include <limits>
#include <numeric>

namespace fastrcnn {
namespace {

// Indices by descending score; NaN first (as torch.sort puts it), equal scores by index.
template <class T>
std::vector<int64_t> score_order(const T* scores, int64_t n) {
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [scores](int64_t a, int64_t b) {
    const T sa = scores[a], sb = scores[b];
    if (sa > sb) return true;
    if (sb > sa) return false;
    const bool nan_a = sa != sa, nan_b = sb != sb;
    return nan_a != nan_b ? nan_a : a < b;
  });
  return order;
}

// The CPU compares a float IoU with the double threshold. That is the same as comparing it with the largest T that does
// not exceed the threshold, and needs no conversion in the loop.
template <class T>
T floor_threshold(double threshold) {
  const T t = static_cast<T>(threshold);
  return static_cast<double>(t) > threshold ? std::nextafter(t, -std::numeric_limits<T>::infinity()) : t;
}

constexpr int64_t kSmall = 16384;  // boxes, of all groups or images together

// Survivors' indices by descending score, at most max_output. groups may be null.
template <class T>
std::vector<int64_t> run(const T* boxes, const T* scores, const int64_t* groups, int64_t n, double iou_threshold,
                         int64_t max_output) {
  const auto* box = reinterpret_cast<const Box<T>*>(boxes);
  const T threshold = floor_threshold<T>(iou_threshold);
  const std::vector<int64_t> by_score = score_order(scores, n);
  std::vector<uint8_t> keep(n, 0);  // by rank in by_score
  if (groups == nullptr) {
    greedy(box, by_score.data(), n, threshold, max_output, keep.data());
  } else {
    std::vector<int64_t> ranks(n);  // ranks, group by group: the sort is stable, so each group stays in score order
    std::iota(ranks.begin(), ranks.end(), 0);
    std::stable_sort(ranks.begin(), ranks.end(),
                     [&](int64_t a, int64_t b) { return groups[by_score[a]] < groups[by_score[b]]; });
    std::vector<int64_t> members(n), starts;
    for (int64_t i = 0; i < n; ++i) {
      members[i] = by_score[ranks[i]];
      if (i == 0 || groups[members[i]] != groups[members[i - 1]]) starts.push_back(i);
    }
    starts.push_back(n);
    std::vector<uint8_t> keep_member(n, 0);
    share(static_cast<int64_t>(starts.size()) - 1, 1, threads_for(n, kSmall), [&](int64_t first, int64_t last, int64_t) {
      for (int64_t g = first; g < last; ++g)
        greedy(box, members.data() + starts[g], starts[g + 1] - starts[g], threshold, max_output,
               keep_member.data() + starts[g]);
    });
    for (int64_t i = 0; i < n; ++i) keep[ranks[i]] = keep_member[i];
  }
  std::vector<int64_t> kept;
  for (int64_t r = 0; r < n && static_cast<int64_t>(kept.size()) < max_output; ++r)
    if (keep[r]) kept.push_back(by_score[r]);
  return kept;
}

Tensor nms_any(const Tensor& boxes, const Tensor& scores, const Tensor* groups, double iou_threshold,
               int64_t max_output) {
  const int64_t n = boxes.size(0);
  CHECK_SHAPE(boxes, n, 4);
  CHECK_SHAPE(scores, n);
  const ScalarType dtype = coordinate_type(boxes);
  const Tensor b = contiguous_as(boxes, dtype), s = contiguous_as(scores, dtype);
  std::optional<Tensor> g;
  if (groups != nullptr) {
    CHECK_SHAPE(*groups, n);
    g = contiguous_as(*groups, ScalarType::Long);
  }
  const int64_t* group_ids = g ? g->const_data_ptr<int64_t>() : nullptr;
  const std::vector<int64_t> kept =
      dtype == ScalarType::Double
          ? run(b.const_data_ptr<double>(), s.const_data_ptr<double>(), group_ids, n, iou_threshold, max_output)
          : run(b.const_data_ptr<float>(), s.const_data_ptr<float>(), group_ids, n, iou_threshold, max_output);
  Tensor out = empty_like_device(boxes, {static_cast<int64_t>(kept.size())}, ScalarType::Long);
  std::copy(kept.begin(), kept.end(), out.mutable_data_ptr<int64_t>());
  return out;
}

Tensor nms(const Tensor& boxes, const Tensor& scores, double iou_threshold) {
  return nms_any(boxes, scores, nullptr, iou_threshold, std::numeric_limits<int64_t>::max());
}

Tensor batched_nms(const Tensor& boxes, const Tensor& scores, const Tensor& idxs, double iou_threshold,
                   std::optional<int64_t> max_output) {
  return nms_any(boxes, scores, &idxs, iou_threshold, max_output.value_or(std::numeric_limits<int64_t>::max()));
}

template <class T>
void run_padded(const Tensor& boxes, const Tensor& scores, const int64_t* groups, const int64_t* counts,
                double iou_threshold, int64_t max_output, int64_t* indices, int64_t* num_kept) {
  const int64_t batch = boxes.size(0), n = boxes.size(1);
  const T* b = boxes.const_data_ptr<T>();
  const T* s = scores.const_data_ptr<T>();
  share(batch, 1, threads_for(batch * n, kSmall), [&](int64_t first, int64_t last, int64_t) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t valid = counts == nullptr ? n : std::min(std::max<int64_t>(counts[i], 0), n);
      const auto kept =
          run(b + i * n * 4, s + i * n, groups ? groups + i * n : nullptr, valid, iou_threshold, max_output);
      std::fill_n(std::copy(kept.begin(), kept.end(), indices + i * max_output), max_output - kept.size(), -1);
      num_kept[i] = static_cast<int64_t>(kept.size());
    }
  });
}

std::tuple<Tensor, Tensor> nms_padded(const Tensor& boxes, const Tensor& scores, std::optional<Tensor> groups,
                                      double iou_threshold, int64_t max_output, std::optional<Tensor> counts) {
  const int64_t batch = boxes.size(0), n = boxes.size(1);
  CHECK_SHAPE(boxes, batch, n, 4);
  CHECK_SHAPE(scores, batch, n);
  const ScalarType dtype = coordinate_type(boxes);
  const Tensor b = contiguous_as(boxes, dtype), s = contiguous_as(scores, dtype);
  if (groups) {
    CHECK_SHAPE(*groups, batch, n);
    groups = contiguous_as(*groups, ScalarType::Long);
  }
  if (counts) {
    CHECK_SHAPE(*counts, batch);
    counts = contiguous_as(*counts, ScalarType::Long);
  }
  Tensor indices = empty_like_device(boxes, {batch, max_output}, ScalarType::Long);
  Tensor num_kept = empty_like_device(boxes, {batch}, ScalarType::Long);
  const int64_t* g = groups ? groups->const_data_ptr<int64_t>() : nullptr;
  const int64_t* c = counts ? counts->const_data_ptr<int64_t>() : nullptr;
  const auto launch = dtype == ScalarType::Double ? run_padded<double> : run_padded<float>;
  launch(b, s, g, c, iou_threshold, max_output, indices.mutable_data_ptr<int64_t>(),
         num_kept.mutable_data_ptr<int64_t>());
  return {indices, num_kept};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrcnn, CPU, m) {
  m.impl("nms", TORCH_BOX(&nms));
  m.impl("batched_nms", TORCH_BOX(&batched_nms));
  m.impl("nms_padded", TORCH_BOX(&nms_padded));
}

}  // namespace fastrcnn
