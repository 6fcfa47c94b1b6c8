// Soft-NMS (Bodla et al., 2017): the best box is taken, the scores of the rest decay with their overlap, and so on.
// Each round is one vectorised pass that decays and finds the next best, shared by the threads when there are many boxes.
#include "box_math.h"

#include <algorithm>
#include <limits>

namespace fastrcnn {
namespace {

enum class Method { naive, linear, gaussian };

template <class T>
struct Columns {
  const T *x1, *y1, *x2, *y2, *area;
  T* score;
};

// Decays scores[first, last) by the overlap with `best` and returns the highest score left there.
template <class T>
HOST_DEVICE T decay_body(const Columns<T>& c, int64_t first, int64_t last, Box<T> best, T best_area, T iou_threshold,
                         T sigma, T min_score, int method) {
  T highest = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : highest)
  for (int64_t i = first; i < last; ++i) {
    const T overlap = iou(best, best_area, Box<T>{c.x1[i], c.y1[i], c.x2[i], c.y2[i]}, c.area[i]);
    const bool over = overlap >= iou_threshold;
    const T linear = over ? T(1) - overlap : T(1);
    const T naive = over ? T(0) : T(1);
    const T gaussian = overlap == overlap ? exp_(-(overlap * overlap) / sigma) : T(1);
    const T weight = method == 0 ? naive : (method == 1 ? linear : gaussian);
    const T score = c.score[i] * weight;
    // Out of the race: below min_score, or taken already (-inf stays -inf, and 0 * -inf is NaN, which fails too).
    const T left = score >= min_score ? score : -std::numeric_limits<T>::infinity();
    c.score[i] = left;
    highest = highest < left ? left : highest;
  }
  return highest;
}

SIMD_CLONES float decay(const Columns<float>& c, int64_t first, int64_t last, Box<float> best, float best_area,
                        float iou_threshold, float sigma, float min_score, int method) {
  return decay_body<float>(c, first, last, best, best_area, iou_threshold, sigma, min_score, method);
}
double decay(const Columns<double>& c, int64_t first, int64_t last, Box<double> best, double best_area,
             double iou_threshold, double sigma, double min_score, int method) {
  return decay_body<double>(c, first, last, best, best_area, iou_threshold, sigma, min_score, method);
}

template <class T>
std::tuple<Tensor, Tensor> run(const Tensor& boxes, const Tensor& scores, double iou_threshold, double sigma,
                               double min_score, Method method) {
  const int64_t n = boxes.size(0);
  const auto* box = reinterpret_cast<const Box<T>*>(boxes.const_data_ptr<T>());
  std::vector<T> x1(n), y1(n), x2(n), y2(n), areas(n);
  std::vector<T> score(scores.const_data_ptr<T>(), scores.const_data_ptr<T>() + n);
  const T minus_inf = -std::numeric_limits<T>::infinity();
  T highest = minus_inf;
  for (int64_t i = 0; i < n; ++i) {
    x1[i] = box[i].x1, y1[i] = box[i].y1, x2[i] = box[i].x2, y2[i] = box[i].y2;
    areas[i] = area(box[i]);
    highest = max_(highest, score[i]);  // a NaN score never wins
  }
  const Columns<T> columns{x1.data(), y1.data(), x2.data(), y2.data(), areas.data(), score.data()};
  // As in the usual CPU code, the first box is taken whatever its score; min_score bounds the decayed ones.
  std::vector<T> dets;
  std::vector<int64_t> indices;
  const int64_t grain = 4096;
  std::vector<T> part((n + grain - 1) / grain);
  while (highest > minus_inf) {
    const int64_t best = std::find(score.begin(), score.end(), highest) - score.begin();  // equal scores: lowest index
    const Box<T> b = box[best];
    dets.insert(dets.end(), {b.x1, b.y1, b.x2, b.y2, highest});
    indices.push_back(best);
    score[best] = minus_inf;
    torch::stable::parallel_for(0, static_cast<int64_t>(part.size()), 1, [&](int64_t first, int64_t last) {
      for (int64_t p = first; p < last; ++p)
        part[p] = decay(columns, p * grain, std::min(n, (p + 1) * grain), b, areas[best],
                        static_cast<T>(iou_threshold), static_cast<T>(sigma), static_cast<T>(min_score),
                        static_cast<int>(method));
    });
    highest = *std::max_element(part.begin(), part.end());
  }
  const int64_t k = static_cast<int64_t>(indices.size());
  Tensor out = empty_like_device(boxes, {k, 5}, boxes.scalar_type());
  Tensor out_indices = empty_like_device(boxes, {k}, ScalarType::Long);
  std::copy(dets.begin(), dets.end(), out.mutable_data_ptr<T>());
  std::copy(indices.begin(), indices.end(), out_indices.mutable_data_ptr<int64_t>());
  return {out, out_indices};
}

std::tuple<Tensor, Tensor> soft_nms(const Tensor& boxes, const Tensor& scores, double iou_threshold, double sigma,
                                    double min_score, std::string method) {
  const int64_t n = boxes.size(0);
  CHECK_SHAPE(boxes, n, 4);
  CHECK_SHAPE(scores, n);
  STD_TORCH_CHECK(method == "naive" || method == "linear" || method == "gaussian",
                  "method must be naive, linear or gaussian, got ", method);
  const Method m = method == "naive" ? Method::naive : (method == "linear" ? Method::linear : Method::gaussian);
  const ScalarType dtype = coordinate_type(boxes);
  const Tensor b = contiguous_as(boxes, dtype), s = contiguous_as(scores, dtype);
  return dtype == ScalarType::Double ? run<double>(b, s, iou_threshold, sigma, min_score, m)
                                     : run<float>(b, s, iou_threshold, sigma, min_score, m);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrcnn, CPU, m) { m.impl("soft_nms", TORCH_BOX(&soft_nms)); }

}  // namespace fastrcnn
