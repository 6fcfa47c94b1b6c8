// What the CPU and CUDA kernels of soft_nms share: the decay of one score.
#pragma once

#include "box_math.h"

namespace fastrcnn {

enum class Decay { naive, linear, gaussian };

template <class T>
struct SoftRules {
  T iou_threshold, sigma, min_score;
  Decay method;
};

template <class T>
SoftRules<T> make_soft_rules(double iou_threshold, double sigma, double min_score, const std::string& method) {
  CHECK_ARGUMENT(method == "naive" || method == "linear" || method == "gaussian",
                 "method must be naive, linear or gaussian, got ", method);
  const Decay decay = method == "naive" ? Decay::naive : (method == "linear" ? Decay::linear : Decay::gaussian);
  const double least = std::numeric_limits<T>::min();  // a sigma that T rounds to 0 is still above 0
  return {static_cast<T>(iou_threshold), static_cast<T>(sigma < least ? least : sigma), static_cast<T>(min_score), decay};
}

// The score of `b` after `best` was taken; -inf where that is below min_score, or where the box was taken already.
template <class T>
HOST_DEVICE T decayed(T score, const Box<T>& best, T best_area, const Box<T>& b, T area_b, const SoftRules<T>& rules) {
  const T overlap = iou(best, best_area, b, area_b);
  const bool over = overlap >= rules.iou_threshold;
  const T linear = over ? T(1) - overlap : T(1);
  const T naive = over ? T(0) : T(1);
  const T gaussian = overlap == overlap ? exp_(-(overlap * overlap) / rules.sigma) : T(1);
  const T weight = rules.method == Decay::naive ? naive : (rules.method == Decay::linear ? linear : gaussian);
  const T left = score * weight;
  constexpr T kTaken = -std::numeric_limits<T>::infinity();
  return score > kTaken && left >= rules.min_score ? left : kTaken;
}

// Checks the arguments and calls run(boxes, scores, groups, SoftRules<T>) on contiguous ones; groups may be absent.
template <class Run>
std::tuple<Tensor, Tensor> soft_nms_in(const Tensor& boxes, const Tensor& scores, std::optional<Tensor> groups,
                                       double iou_threshold, double sigma, double min_score, const std::string& method,
                                       Run run) {
  const int64_t n = boxes.size(0);
  CHECK_SHAPE(boxes, n, 4);
  CHECK_SHAPE(scores, n);
  if (groups) {
    CHECK_SHAPE(*groups, n);
    groups = contiguous_as(*groups, ScalarType::Long);
  }
  const ScalarType dtype = coordinate_type(boxes);
  const Tensor b = contiguous_as(boxes, dtype), s = contiguous_as(scores, dtype);
  if (dtype == ScalarType::Double)
    return run(b, s, groups, make_soft_rules<double>(iou_threshold, sigma, min_score, method));
  return run(b, s, groups, make_soft_rules<float>(iou_threshold, sigma, min_score, method));
}

// A batch of lists, contiguous. Hidden, as the stable Tensor is: the struct never leaves the library.
struct __attribute__((visibility("hidden"))) PaddedBoxes {
  Tensor boxes, scores;  // [B, N, 4], [B, N]
  std::optional<Tensor> groups, counts;
  const int64_t* group_ids() const { return groups ? groups->const_data_ptr<int64_t>() : nullptr; }
  const int64_t* count_ids() const { return counts ? counts->const_data_ptr<int64_t>() : nullptr; }
};

// The same for a batch with static shapes: run(PaddedBoxes, SoftRules<T>, decayed, indices, num_kept).
template <class Run>
std::tuple<Tensor, Tensor, Tensor> soft_nms_padded_in(const Tensor& boxes, const Tensor& scores,
                                                      std::optional<Tensor> groups, double iou_threshold, double sigma,
                                                      double min_score, const std::string& method, int64_t max_output,
                                                      std::optional<Tensor> counts, Run run) {
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
  const PaddedBoxes in{contiguous_as(boxes, dtype), contiguous_as(scores, dtype), groups, counts};
  Tensor decayed = empty_like_device(boxes, {batch, max_output}, dtype);
  Tensor indices = empty_like_device(boxes, {batch, max_output}, ScalarType::Long);
  Tensor num_kept = empty_like_device(boxes, {batch}, ScalarType::Long);
  const auto run_as = [&](auto t) {
    using T = decltype(t);
    run(in, make_soft_rules<T>(iou_threshold, sigma, min_score, method), decayed.mutable_data_ptr<T>(),
        indices.mutable_data_ptr<int64_t>(), num_kept.mutable_data_ptr<int64_t>());
  };
  dtype == ScalarType::Double ? run_as(double()) : run_as(float());
  return {decayed, indices, num_kept};
}

}  // namespace fastrcnn
