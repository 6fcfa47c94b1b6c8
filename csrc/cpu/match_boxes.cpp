// Max-IoU assignment (Ren et al., Faster R-CNN, 2015, section 3.1.2) without the boxes x ground-truth matrix.
// Boxes go in chunks, shared by the threads; SIMD lanes run over the boxes of a chunk. Each chunk leaves its best IoU for
// every ground-truth box, so the low-quality pass revisits only the chunks in which a ground-truth box attains its best.
#include "match_boxes.h"
#include "threads.h"

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

// best becomes -1.
template <class T>
void mark_ignored(Chunk<T>& c, int64_t n, const MatchImage<T>& image, T ignore_iof_thr) {
  for (int64_t r = 0; r < image.num_regions; ++r)
    for (int64_t i = 0; i < n; ++i) {
      const Box<T> b{c.x1[i], c.y1[i], c.x2[i], c.y2[i]};
      if (in_region(image.regions[r], b, c.area[i], ignore_iof_thr)) c.best[i] = T(-1);
    }
}

template <class T>
void match(const MatchImage<T>& image, const MatchRules<T>& rules) {
  const Box<T>*boxes = image.boxes, *gts = image.gts;
  const int64_t n = image.n, num_gts = image.num_gts, num_chunks = (n + kChunk - 1) / kChunk;
  const T eps = rules.iou_eps;
  std::vector<T> chunk_best(num_chunks * num_gts), gt_best(num_gts, -std::numeric_limits<T>::infinity());
  const int64_t threads = threads_for(n * num_gts, 1 << 23);
  share(num_chunks, 8, threads, [&](int64_t first, int64_t last, int64_t) {
    Chunk<T> c;
    for (int64_t k = first; k < last; ++k) {
      const int64_t begin = k * kChunk, size = std::min(kChunk, n - begin);
      c.load(boxes + begin, size);
      mark_ignored(c, size, image, rules.ignore_iof_thr);
      for (int64_t g = 0; g < num_gts; ++g)
        chunk_best[k * num_gts + g] = best_gt(c, size, gts[g], area(gts[g]), g, eps);
      for (int64_t i = 0; i < size; ++i) {
        const T best = num_gts > 0 ? c.best[i] : T(0);
        image.max_iou[begin + i] = best;
        image.matches[begin + i] = num_gts > 0 ? match_by_best(best, c.arg[i], rules) : -1;
      }
    }
  });
  if (!rules.match_low_quality || num_gts == 0) return;
  for (int64_t k = 0; k < num_chunks; ++k)
    for (int64_t g = 0; g < num_gts; ++g) gt_best[g] = std::max(gt_best[g], chunk_best[k * num_gts + g]);
  share(num_chunks, 8, threads, [&](int64_t first, int64_t last, int64_t) {
    for (int64_t k = first; k < last; ++k) {
      const int64_t begin = k * kChunk, end = std::min(n, begin + kChunk);
      for (int64_t g = 0; g < num_gts; ++g) {  // in order: where two rules meet, the later ground truth wins
        if (chunk_best[k * num_gts + g] != gt_best[g] || !(gt_best[g] >= rules.min_pos_iou)) continue;
        for (int64_t i = begin; i < end; ++i) {
          if (image.max_iou[i] == T(-1)) continue;
          if (matching_iou(gts[g], area(gts[g]), boxes[i], area(boxes[i]), eps) != gt_best[g]) continue;
          image.matches[i] = rules.low_quality_last_gt ? g : -3;  // -3: its own best, filled in below
        }
      }
      if (rules.low_quality_last_gt) continue;
      for (int64_t i = begin; i < end; ++i)
        for (int64_t g = 0; image.matches[i] == -3; ++g)
          if (matching_iou(gts[g], area(gts[g]), boxes[i], area(boxes[i]), eps) == image.max_iou[i])
            image.matches[i] = g;
    }
  });
}

std::tuple<Tensor, Tensor> match_boxes(const Tensor& boxes, const Tensor& gt_boxes, const Tensor& gt_counts,
                                       std::optional<Tensor> ignore_boxes, std::optional<Tensor> ignore_counts,
                                       double pos_iou_thr, double neg_iou_thr, double min_pos_iou,
                                       bool match_low_quality, bool low_quality_last_gt, double ignore_iof_thr,
                                       double iou_eps) {
  const MatchRules<double> rules{pos_iou_thr, neg_iou_thr,       min_pos_iou,        ignore_iof_thr,
                                 iou_eps,     match_low_quality, low_quality_last_gt};
  return match_batch(boxes, gt_boxes, gt_counts, ignore_boxes, ignore_counts, rules, [](const auto& all, int64_t batch) {
    for (int64_t i = 0; i < batch; ++i) match(all.image(i), all.rules);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrcnn, CPU, m) { m.impl("match_boxes", TORCH_BOX(&match_boxes)); }

}  // namespace fastrcnn
