// Max-IoU assignment (Ren et al., Faster R-CNN, 2015, section 3.1.2) without the boxes x ground-truth matrix.
// Boxes go in chunks, shared by the threads; SIMD lanes run over the boxes of a chunk. Each chunk leaves its best IoU for
// every ground-truth box, so the low-quality pass revisits only the chunks in which a ground-truth box attains its best.
#include "box_math.h"

#include <algorithm>
#include <limits>

namespace fastrcnn {
namespace {

constexpr int64_t kChunk = 1024;

template <class T>
struct Chunk {
  T x1[kChunk], y1[kChunk], x2[kChunk], y2[kChunk], area[kChunk], best[kChunk];
  int64_t arg[kChunk];

  void load(const Box<T>* boxes, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      x1[i] = boxes[i].x1, y1[i] = boxes[i].y1, x2[i] = boxes[i].x2, y2[i] = boxes[i].y2;
      area[i] = fastrcnn::area(boxes[i]);
      best[i] = -std::numeric_limits<T>::infinity();
      arg[i] = 0;
    }
  }
};

struct Rules {
  double pos_iou_thr, neg_iou_thr, min_pos_iou, ignore_iof_thr, iou_eps;
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

template <class T>
HOST_DEVICE T best_gt_body(Chunk<T>& c, int64_t n, Box<T> gt, T gt_area, int64_t index, T eps) {
  T best = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : best)
  for (int64_t i = 0; i < n; ++i) {
    const T v = c.best[i] == T(-1) ? T(-1)  // inside an ignore region: no ground truth may have it
                                   : matching_iou(gt, gt_area, Box<T>{c.x1[i], c.y1[i], c.x2[i], c.y2[i]}, c.area[i], eps);
    const bool better = v > c.best[i];
    c.best[i] = better ? v : c.best[i];
    c.arg[i] = better ? index : c.arg[i];
    best = best < v ? v : best;
  }
  return best;
}
SIMD_CLONES float best_gt(Chunk<float>& c, int64_t n, Box<float> gt, float gt_area, int64_t index, float eps) {
  return best_gt_body<float>(c, n, gt, gt_area, index, eps);
}
double best_gt(Chunk<double>& c, int64_t n, Box<double> gt, double gt_area, int64_t index, double eps) {
  return best_gt_body<double>(c, n, gt, gt_area, index, eps);
}

// Boxes of which more than ignore_iof_thr lies in one ignore region leave the assignment: best becomes -1.
template <class T>
void mark_ignored(Chunk<T>& c, int64_t n, const Box<T>* regions, int64_t num_regions, T ignore_iof_thr) {
  for (int64_t r = 0; r < num_regions; ++r) {
    for (int64_t i = 0; i < n; ++i) {
      const T inter = intersection(regions[r], Box<T>{c.x1[i], c.y1[i], c.x2[i], c.y2[i]});
      if (inter / max_(c.area[i], T(1e-6)) > ignore_iof_thr) c.best[i] = T(-1);
    }
  }
}

// One image.
template <class T>
void match(const Box<T>* boxes, int64_t n, const Box<T>* gts, int64_t num_gts, const Box<T>* regions,
           int64_t num_regions, const Rules& rules, int64_t* matches, T* max_iou) {
  const int64_t num_chunks = (n + kChunk - 1) / kChunk;
  const T eps = static_cast<T>(rules.iou_eps);
  std::vector<T> chunk_best(num_chunks * num_gts), gt_best(num_gts, -std::numeric_limits<T>::infinity());
  torch::stable::parallel_for(0, num_chunks, 1, [&](int64_t first, int64_t last) {
    Chunk<T> c;
    for (int64_t k = first; k < last; ++k) {
      const int64_t begin = k * kChunk, size = std::min(kChunk, n - begin);
      c.load(boxes + begin, size);
      if (rules.ignore_iof_thr > 0 && num_gts > 0)
        mark_ignored(c, size, regions, num_regions, static_cast<T>(rules.ignore_iof_thr));
      for (int64_t g = 0; g < num_gts; ++g)
        chunk_best[k * num_gts + g] = best_gt(c, size, gts[g], area(gts[g]), g, eps);
      for (int64_t i = 0; i < size; ++i) {
        const T best = num_gts > 0 ? c.best[i] : T(0);
        max_iou[begin + i] = best;
        int64_t m = -2;
        if (best >= T(0) && best < static_cast<T>(rules.neg_iou_thr)) m = -1;
        if (best >= static_cast<T>(rules.pos_iou_thr) && num_gts > 0) m = c.arg[i];
        matches[begin + i] = num_gts > 0 ? m : -1;
      }
    }
  });
  if (!rules.match_low_quality || num_gts == 0) return;
  for (int64_t k = 0; k < num_chunks; ++k)
    for (int64_t g = 0; g < num_gts; ++g) gt_best[g] = std::max(gt_best[g], chunk_best[k * num_gts + g]);
  torch::stable::parallel_for(0, num_chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t k = first; k < last; ++k) {
      for (int64_t g = 0; g < num_gts; ++g) {  // in order: where two rules meet, the later ground truth wins
        if (chunk_best[k * num_gts + g] != gt_best[g] || !(gt_best[g] >= static_cast<T>(rules.min_pos_iou))) continue;
        for (int64_t i = k * kChunk; i < std::min(n, (k + 1) * kChunk); ++i) {
          if (max_iou[i] == T(-1)) continue;
          if (matching_iou(gts[g], area(gts[g]), boxes[i], area(boxes[i]), eps) != gt_best[g]) continue;
          matches[i] = rules.low_quality_last_gt ? g : -3;  // -3: its own best, filled in below
        }
      }
      if (rules.low_quality_last_gt) continue;
      for (int64_t i = k * kChunk; i < std::min(n, (k + 1) * kChunk); ++i) {
        if (matches[i] != -3) continue;
        for (int64_t g = 0; matches[i] == -3; ++g)
          if (matching_iou(gts[g], area(gts[g]), boxes[i], area(boxes[i]), eps) == max_iou[i]) matches[i] = g;
      }
    }
  });
}

template <class T>
void run(const Tensor& boxes, const Tensor& gts, const int64_t* gt_counts, const std::optional<Tensor>& regions,
         const int64_t* region_counts, const Rules& rules, Tensor& matches, Tensor& max_iou) {
  const int64_t batch = gts.size(0), n = boxes.size(1), m = gts.size(1), r = regions ? regions->size(1) : 0;
  const auto* b = reinterpret_cast<const Box<T>*>(boxes.const_data_ptr<T>());
  const auto* g = reinterpret_cast<const Box<T>*>(gts.const_data_ptr<T>());
  const auto* ignored = regions ? reinterpret_cast<const Box<T>*>(regions->const_data_ptr<T>()) : nullptr;
  for (int64_t i = 0; i < batch; ++i)
    match(b + (boxes.size(0) == 1 ? 0 : i * n), n, g + i * m, std::clamp<int64_t>(gt_counts[i], 0, m), ignored + i * r,
          region_counts ? std::clamp<int64_t>(region_counts[i], 0, r) : 0, rules,
          matches.mutable_data_ptr<int64_t>() + i * n, max_iou.mutable_data_ptr<T>() + i * n);
}

std::tuple<Tensor, Tensor> match_boxes(const Tensor& boxes, const Tensor& gt_boxes, const Tensor& gt_counts,
                                       std::optional<Tensor> ignore_boxes, std::optional<Tensor> ignore_counts,
                                       double pos_iou_thr, double neg_iou_thr, double min_pos_iou,
                                       bool match_low_quality, bool low_quality_last_gt, double ignore_iof_thr,
                                       double iou_eps) {
  const int64_t batch = gt_boxes.size(0), n = boxes.size(1), m = gt_boxes.size(1);
  CHECK_SHAPE(gt_boxes, batch, m, 4);
  CHECK_SHAPE(boxes, boxes.size(0), n, 4);
  CHECK_SHAPE(gt_counts, batch);
  STD_TORCH_CHECK(boxes.size(0) == 1 || boxes.size(0) == batch, "boxes must have batch size 1 or that of gt_boxes");
  STD_TORCH_CHECK(ignore_boxes.has_value() == ignore_counts.has_value(), "ignore_boxes and ignore_counts go together");
  const ScalarType dtype = coordinate_type(boxes);
  const Tensor b = contiguous_as(boxes, dtype), g = contiguous_as(gt_boxes, dtype);
  const Tensor counts = contiguous_as(gt_counts, ScalarType::Long);
  std::optional<Tensor> regions, region_counts;
  if (ignore_boxes) {
    CHECK_SHAPE(*ignore_boxes, batch, ignore_boxes->size(1), 4);
    CHECK_SHAPE(*ignore_counts, batch);
    regions = contiguous_as(*ignore_boxes, dtype);
    region_counts = contiguous_as(*ignore_counts, ScalarType::Long);
  }
  const Rules rules{pos_iou_thr, neg_iou_thr, min_pos_iou, ignore_iof_thr, iou_eps, match_low_quality,
                    low_quality_last_gt};
  Tensor matches = empty_like_device(boxes, {batch, n}, ScalarType::Long);
  Tensor max_iou = empty_like_device(boxes, {batch, n}, dtype);
  const auto launch = dtype == ScalarType::Double ? run<double> : run<float>;
  launch(b, g, counts.const_data_ptr<int64_t>(), regions,
         region_counts ? region_counts->const_data_ptr<int64_t>() : nullptr, rules, matches, max_iou);
  return {matches, max_iou};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrcnn, CPU, m) { m.impl("match_boxes", TORCH_BOX(&match_boxes)); }

}  // namespace fastrcnn
