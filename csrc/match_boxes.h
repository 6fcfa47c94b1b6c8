// What the CPU and CUDA kernels of match_boxes share: the arithmetic of a pair, the rule for a box, the arguments.
#pragma once

#include "box_math.h"

namespace fastrcnn {

template <class T>
struct MatchRules {
  T pos_iou_thr, neg_iou_thr, min_pos_iou, ignore_iof_thr, iou_eps;
  bool match_low_quality, low_quality_last_gt;
};

// MMDetection bounds the union from below by eps; with eps = 0 two boxes that do not meet have IoU 0, never 0 / 0.
template <class T>
HOST_DEVICE T matching_iou(const Box<T>& gt, T gt_area, const Box<T>& b, T area, T eps) {
  const T inter = intersection(gt, b);
  const T united = gt_area + area - inter;
  const T ratio = inter / (eps > T(0) ? max_(united, eps) : united);
  return inter > T(0) && ratio == ratio ? ratio : T(0);  // a NaN or infinite box meets nothing
}

// Boxes of which more than thr > 0 lies in one ignore region take no part.
template <class T>
HOST_DEVICE bool in_region(const Box<T>& region, const Box<T>& b, T area, T thr) {
  const T inter = intersection(region, b);
  return inter > T(0) && inter / max_(area, T(1e-6)) > thr;
}

// What its best IoU alone makes of a box; -1 stands for a box in an ignore region.
template <class T>
HOST_DEVICE int64_t match_by_best(T best, int64_t arg, const MatchRules<T>& rules) {
  if (best >= rules.pos_iou_thr) return arg;
  return best >= T(0) && best < rules.neg_iou_thr ? -1 : -2;
}

template <class T>
struct MatchImage {
  const Box<T>*boxes, *gts, *regions;
  int64_t n, num_gts, num_regions;
  int64_t* matches;
  T* max_iou;
};

template <class T>
struct MatchBatch {
  const Box<T>*boxes, *gts, *regions;  // [B, N] or shared [N], [B, M], [B, R]
  const int64_t *gt_counts, *region_counts;
  int64_t n, m, r, box_stride;
  int64_t* matches;  // [B, N]
  T* max_iou;        // [B, N]
  MatchRules<T> rules;

  HOST_DEVICE MatchImage<T> image(int64_t i) const {
    const int64_t gts_here = min_(max_(gt_counts[i], int64_t(0)), m);
    // Without ground truth every box is background, wherever it lies.
    const int64_t regions_here = r > 0 && gts_here > 0 ? min_(max_(region_counts[i], int64_t(0)), r) : 0;
    return {boxes + i * box_stride, gts + i * m, regions + i * r, n, gts_here, regions_here, matches + i * n,
            max_iou + i * n};
  }
};

template <class T, class Run>
void run_match_batch(const Tensor& boxes, const Tensor& gts, const Tensor& gt_counts, const Tensor& regions,
                     const Tensor& region_counts, int64_t r, const MatchRules<double>& d, Tensor& matches,
                     Tensor& max_iou, Run run) {
  const auto as_boxes = [](const Tensor& t) { return reinterpret_cast<const Box<T>*>(t.const_data_ptr<T>()); };
  const int64_t n = boxes.size(1);
  const MatchRules<T> rules{static_cast<T>(d.pos_iou_thr), static_cast<T>(d.neg_iou_thr),
                            static_cast<T>(d.min_pos_iou), static_cast<T>(d.ignore_iof_thr),
                            static_cast<T>(d.iou_eps),     d.match_low_quality,
                            d.low_quality_last_gt};
  run(MatchBatch<T>{as_boxes(boxes), as_boxes(gts), as_boxes(regions), gt_counts.const_data_ptr<int64_t>(),
                    region_counts.const_data_ptr<int64_t>(), n, gts.size(1), r, boxes.size(0) == 1 ? 0 : n,
                    matches.mutable_data_ptr<int64_t>(), max_iou.mutable_data_ptr<T>(), rules},
      gts.size(0));
}

// Checks the arguments, allocates (matches, max_iou) and calls run(MatchBatch<T>, batch size).
template <class Run>
std::tuple<Tensor, Tensor> match_batch(const Tensor& boxes, const Tensor& gt_boxes, const Tensor& gt_counts,
                                       const std::optional<Tensor>& ignore_boxes,
                                       const std::optional<Tensor>& ignore_counts, const MatchRules<double>& rules,
                                       Run run) {
  const int64_t batch = gt_boxes.size(0), n = boxes.size(1), m = gt_boxes.size(1);
  CHECK_SHAPE(gt_boxes, batch, m, 4);
  CHECK_SHAPE(boxes, boxes.size(0), n, 4);
  CHECK_SHAPE(gt_counts, batch);
  CHECK_ARGUMENT(boxes.size(0) == 1 || boxes.size(0) == batch, "boxes must have batch size 1 or that of gt_boxes");
  CHECK_ARGUMENT(ignore_boxes.has_value() == ignore_counts.has_value(), "ignore_boxes and ignore_counts go together");
  const ScalarType dtype = coordinate_type(boxes);
  const Tensor b = contiguous_as(boxes, dtype), g = contiguous_as(gt_boxes, dtype);
  const Tensor counts = contiguous_as(gt_counts, ScalarType::Long);
  Tensor regions = g, region_counts = counts;  // not read where r is 0
  int64_t r = 0;
  if (ignore_boxes) {
    CHECK_SHAPE(*ignore_boxes, batch, ignore_boxes->size(1), 4);
    CHECK_SHAPE(*ignore_counts, batch);
    regions = contiguous_as(*ignore_boxes, dtype);
    region_counts = contiguous_as(*ignore_counts, ScalarType::Long);
    r = rules.ignore_iof_thr > 0 ? ignore_boxes->size(1) : 0;
  }
  Tensor matches = empty_like_device(boxes, {batch, n}, ScalarType::Long);
  Tensor max_iou = empty_like_device(boxes, {batch, n}, dtype);
  const auto with = dtype == ScalarType::Double ? run_match_batch<double, Run> : run_match_batch<float, Run>;
  with(b, g, counts, regions, region_counts, r, rules, matches, max_iou, run);
  return {matches, max_iou};
}

}  // namespace fastrcnn
