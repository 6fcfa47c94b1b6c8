// Soft-NMS (Bodla et al., 2017): the best box is taken, the scores of the rest decay with their overlap, and so on.
// Each round is one vectorised pass that decays and finds the next best, on one thread: a round waits for the one before.
#include "soft_nms.h"

#include <algorithm>
#include <limits>
#include <numeric>

namespace fastrcnn {
namespace {

template <class T>
struct Columns {
  const T *x1, *y1, *x2, *y2, *area;
  T* score;
};

// Decays scores[first, last) by the overlap with `best` and returns the highest score left there.
template <class T>
HOST_DEVICE T decay_body(const Columns<T>& c, int64_t first, int64_t last, Box<T> best, T best_area, SoftRules<T> rules) {
  T highest = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : highest)
  for (int64_t i = first; i < last; ++i) {
    const T left = decayed(c.score[i], best, best_area, Box<T>{c.x1[i], c.y1[i], c.x2[i], c.y2[i]}, c.area[i], rules);
    c.score[i] = left;
    highest = highest < left ? left : highest;
  }
  return highest;
}

SIMD_CLONES float decay(const Columns<float>& c, int64_t first, int64_t last, Box<float> best, float best_area,
                        SoftRules<float> rules) {
  return decay_body<float>(c, first, last, best, best_area, rules);
}
double decay(const Columns<double>& c, int64_t first, int64_t last, Box<double> best, double best_area,
             SoftRules<double> rules) {
  return decay_body<double>(c, first, last, best, best_area, rules);
}

template <class T>
struct Taken {
  int64_t index;
  T score;
};

// One group, boxes[members[0..n)]: appends what is taken, in that order.
template <class T>
void take(const Box<T>* boxes, const T* scores, const int64_t* members, int64_t n, const SoftRules<T>& rules,
          std::vector<Taken<T>>& taken) {
  std::vector<T> x1(n), y1(n), x2(n), y2(n), areas(n), score(n);
  const T minus_inf = -std::numeric_limits<T>::infinity();
  T highest = minus_inf;
  for (int64_t i = 0; i < n; ++i) {
    const Box<T>& b = boxes[members[i]];
    x1[i] = b.x1, y1[i] = b.y1, x2[i] = b.x2, y2[i] = b.y2;
    areas[i] = area(b);
    score[i] = scores[members[i]];
    highest = max_(highest, score[i]);  // a NaN score never wins
  }
  const Columns<T> columns{x1.data(), y1.data(), x2.data(), y2.data(), areas.data(), score.data()};
  // As in the usual CPU code, the first box is taken whatever its score; min_score bounds the decayed ones.
  while (highest > minus_inf) {
    const int64_t best = std::find(score.begin(), score.end(), highest) - score.begin();  // equal scores: lowest index
    taken.push_back({members[best], highest});
    score[best] = minus_inf;
    highest = decay(columns, int64_t{0}, n, boxes[members[best]], areas[best], rules);
  }
}

// What is taken of n boxes in all groups, by descending decayed score; groups may be null.
template <class T>
std::vector<Taken<T>> run(const T* boxes, const T* scores, const int64_t* groups, int64_t n, const SoftRules<T>& rules) {
  const auto* box = reinterpret_cast<const Box<T>*>(boxes);
  std::vector<int64_t> members(n);
  std::iota(members.begin(), members.end(), 0);
  std::vector<Taken<T>> taken;
  if (groups == nullptr) {
    take(box, scores, members.data(), n, rules, taken);
    return taken;
  }
  std::stable_sort(members.begin(), members.end(), [&](int64_t a, int64_t b) { return groups[a] < groups[b]; });
  for (int64_t begin = 0, end = 0; begin < n; begin = end) {
    while (end < n && groups[members[end]] == groups[members[begin]]) ++end;
    take(box, scores, members.data() + begin, end - begin, rules, taken);
  }
  std::stable_sort(taken.begin(), taken.end(), [](const auto& a, const auto& b) { return a.score > b.score; });
  return taken;
}

template <class T>
std::tuple<Tensor, Tensor> run(const Tensor& boxes, const Tensor& scores, const int64_t* groups,
                               const SoftRules<T>& rules, int64_t max_output) {
  const T* box = boxes.const_data_ptr<T>();
  const std::vector<Taken<T>> taken = run(box, scores.const_data_ptr<T>(), groups, boxes.size(0), rules);
  const int64_t k = std::min<int64_t>(taken.size(), max_output);
  Tensor out = empty_like_device(boxes, {k, 5}, boxes.scalar_type());
  Tensor out_indices = empty_like_device(boxes, {k}, ScalarType::Long);
  for (int64_t i = 0; i < k; ++i) {
    T* det = out.mutable_data_ptr<T>() + i * 5;
    memcpy(det, box + taken[i].index * 4, sizeof(Box<T>));
    det[4] = taken[i].score;
    out_indices.mutable_data_ptr<int64_t>()[i] = taken[i].index;
  }
  return {out, out_indices};
}

std::tuple<Tensor, Tensor> any(const Tensor& boxes, const Tensor& scores, std::optional<Tensor> groups,
                               double iou_threshold, double sigma, double min_score, const std::string& method,
                               int64_t max_output) {
  return soft_nms_in(boxes, scores, groups, iou_threshold, sigma, min_score, method,
                     [&](const Tensor& b, const Tensor& s, const std::optional<Tensor>& g, auto rules) {
                       return run(b, s, g ? g->const_data_ptr<int64_t>() : nullptr, rules, max_output);
                     });
}

std::tuple<Tensor, Tensor> soft_nms(const Tensor& boxes, const Tensor& scores, double iou_threshold, double sigma,
                                    double min_score, std::string method) {
  return any(boxes, scores, std::nullopt, iou_threshold, sigma, min_score, method, boxes.size(0));
}

std::tuple<Tensor, Tensor> batched_soft_nms(const Tensor& boxes, const Tensor& scores, const Tensor& idxs,
                                            double iou_threshold, double sigma, double min_score, std::string method,
                                            std::optional<int64_t> max_output) {
  return any(boxes, scores, idxs, iou_threshold, sigma, min_score, method, max_output.value_or(boxes.size(0)));
}

template <class T>
void run_padded(const PaddedBoxes& p, const SoftRules<T>& rules, int64_t max_output, T* decayed, int64_t* indices,
                int64_t* num_kept) {
  const int64_t batch = p.scores.size(0), n = p.scores.size(1);
  const int64_t *groups = p.group_ids(), *counts = p.count_ids();
  for (int64_t i = 0; i < batch; ++i) {
    const int64_t valid = counts == nullptr ? n : std::min(std::max<int64_t>(counts[i], 0), n);
    const auto taken = run(p.boxes.const_data_ptr<T>() + i * n * 4, p.scores.const_data_ptr<T>() + i * n,
                           groups ? groups + i * n : nullptr, valid, rules);
    num_kept[i] = std::min<int64_t>(taken.size(), max_output);
    for (int64_t k = 0; k < max_output; ++k) {
      decayed[i * max_output + k] = k < num_kept[i] ? taken[k].score : T(0);
      indices[i * max_output + k] = k < num_kept[i] ? taken[k].index : -1;
    }
  }
}

std::tuple<Tensor, Tensor, Tensor> soft_nms_padded(const Tensor& boxes, const Tensor& scores,
                                                   std::optional<Tensor> groups, double iou_threshold, double sigma,
                                                   double min_score, std::string method, int64_t max_output,
                                                   std::optional<Tensor> counts) {
  return soft_nms_padded_in(boxes, scores, groups, iou_threshold, sigma, min_score, method, max_output, counts,
                            [&](const PaddedBoxes& p, auto rules, auto*... out) { run_padded(p, rules, max_output, out...); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrcnn, CPU, m) {
  m.impl("soft_nms", TORCH_BOX(&soft_nms));
  m.impl("batched_soft_nms", TORCH_BOX(&batched_soft_nms));
  m.impl("soft_nms_padded", TORCH_BOX(&soft_nms_padded));
}

}  // namespace fastrcnn
