// RPN maps -> proposals: per-level top-k, anchors, decoding, clipping and the size filter in one pass over each image
// and level. Anchors are computed where they are needed and never stored.
#include "box_math.h"

#include <algorithm>
#include <functional>
#include <utility>

namespace fastrcnn {
namespace {

// Unsigned integers that sort as the floats do, NaN last (below -inf).
HOST_DEVICE uint32_t sortable(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  const uint32_t key = bits >> 31 ? ~bits : bits | uint32_t{1} << 31;
  return x == x ? key : 0u;
}
HOST_DEVICE uint64_t sortable(double x) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof(bits));
  const uint64_t key = bits >> 63 ? ~bits : bits | uint64_t{1} << 63;
  return x == x ? key : 0u;
}
template <class T>
using Key = decltype(sortable(T()));

// One level's maps and how to step through them.
template <class T>
struct Level {
  const T *logits, *deltas;  // of one image
  int64_t anchors, height, width;
  int64_t la, lh, lw, dc, dh, dw;  // strides of the two maps
  const Box<T>* base;
  T stride_x, stride_y;
};

// keys[i] for the scores of one level, anchor fastest, then x, then y.
template <class T>
HOST_DEVICE void make_keys_body(const Level<T>& l, bool use_sigmoid, Key<T>* keys) {
  for (int64_t a = 0; a < l.anchors; ++a) {
    for (int64_t y = 0; y < l.height; ++y) {
      const T* row = l.logits + a * l.la + y * l.lh;
      Key<T>* out = keys + y * l.width * l.anchors + a;
#pragma omp simd
      for (int64_t x = 0; x < l.width; ++x) {
        const T logit = row[x * l.lw];
        // + 0 makes -0.0 and 0.0 one key.
        out[x * l.anchors] = sortable((use_sigmoid ? sigmoid(logit) : logit) + T(0));
      }
    }
  }
}
SIMD_CLONES void make_keys(const Level<float>& l, bool use_sigmoid, uint32_t* keys) {
  make_keys_body(l, use_sigmoid, keys);
}
void make_keys(const Level<double>& l, bool use_sigmoid, uint64_t* keys) { make_keys_body(l, use_sigmoid, keys); }

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

struct Filter {
  double min_size;
  bool topk_on_logits, return_logits;
};
template <class T>
struct Rows {
  T *boxes, *scores;  // [K, 4], [K]
  int64_t* levels;    // [K]
};

// One image, one level: writes the surviving rows and returns how many there are.
template <class T>
int64_t run_level(const Level<T>& l, int64_t level, T image_height, T image_width, int64_t k,
                  const DeltaCoder<T>& coder, const Filter& filter, Rows<T> rows) {
  std::vector<Key<T>> keys(l.anchors * l.height * l.width);
  make_keys(l, !filter.topk_on_logits, keys.data());
  const T min_size = static_cast<T>(filter.min_size);
  int64_t count = 0;
  for (const int64_t i : top_k(keys, k)) {
    const int64_t a = i % l.anchors, x = i / l.anchors % l.width, y = i / l.anchors / l.width;
    const T sx = static_cast<T>(x) * l.stride_x, sy = static_cast<T>(y) * l.stride_y;
    const Box<T> anchor{l.base[a].x1 + sx, l.base[a].y1 + sy, l.base[a].x2 + sx, l.base[a].y2 + sy};
    const T* d = l.deltas + 4 * a * l.dc + y * l.dh + x * l.dw;
    const Box<T> b = clip(decode(anchor, d[0], d[l.dc], d[2 * l.dc], d[3 * l.dc], coder), image_height, image_width);
    if (!(b.x2 - b.x1 > min_size && b.y2 - b.y1 > min_size)) continue;  // also drops NaN
    const T logit = l.logits[a * l.la + y * l.lh + x * l.lw];
    memcpy(rows.boxes + count * 4, &b, sizeof(b));
    rows.scores[count] = filter.return_logits ? logit : sigmoid(logit);
    rows.levels[count++] = level;
  }
  return count;
}

struct Inputs {
  std::vector<Tensor> logits, deltas, bases;
  std::vector<double> strides;  // x, y of each level
  std::vector<int64_t> start;   // first output row of each level, and the total
  Tensor sizes;
};

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;
template <class T>
Outputs run(const Inputs& in, ScalarType dtype, const DeltaCoder<T>& coder, const Filter& filter) {
  const int64_t levels = static_cast<int64_t>(in.logits.size()), batch = in.sizes.size(0), total = in.start.back();
  Tensor boxes = empty_like_device(in.sizes, {batch, total, 4}, dtype);
  Tensor scores = empty_like_device(in.sizes, {batch, total}, dtype);
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
  torch::stable::parallel_for(0, batch * levels, 1, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      const int64_t image = t % batch, i = t / batch;
      const Tensor &x = in.logits[i], &d = in.deltas[i];
      const Level<T> level{x.const_data_ptr<T>() + image * x.stride(0), d.const_data_ptr<T>() + image * d.stride(0),
                           x.size(1), x.size(2), x.size(3), x.stride(1), x.stride(2), x.stride(3), d.stride(1),
                           d.stride(2), d.stride(3), reinterpret_cast<const Box<T>*>(in.bases[i].const_data_ptr<T>()),
                           static_cast<T>(in.strides[2 * i]), static_cast<T>(in.strides[2 * i + 1])};
      found[t] = run_level(level, i, hw[image * 2], hw[image * 2 + 1], in.start[i + 1] - in.start[i], coder, filter,
                           rows_at(image, in.start[i]));
    }
  });
  // Close the gaps the filter left, so that each image's valid rows come first.
  for (int64_t image = 0; image < batch; ++image) {
    int64_t row = 0;
    for (int64_t i = 0; i < levels; ++i) {
      const Rows<T> to = rows_at(image, row), from = rows_at(image, in.start[i]);
      const int64_t n = found[i * batch + image];
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
                         bool symmetric_clip, double min_size, bool topk_on_logits, bool return_logits) {
  const size_t levels = cls_logits.size();
  STD_TORCH_CHECK(levels > 0 && bbox_deltas.size() == levels && base_anchors.size() == levels &&
                      strides.size() == 2 * levels,
                  "cls_logits, bbox_deltas, base_anchors and strides must have one entry a level");
  const int64_t batch = cls_logits[0].size(0);
  CHECK_SHAPE(image_sizes, batch, 2);
  const ScalarType dtype = coordinate_type(cls_logits[0]);
  Inputs in{{}, {}, {}, strides, {0}, contiguous_as(image_sizes, dtype)};
  const auto cast = [dtype](const Tensor& t) { return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype); };
  for (size_t i = 0; i < levels; ++i) {
    const int64_t a = cls_logits[i].size(1), h = cls_logits[i].size(2), w = cls_logits[i].size(3);
    CHECK_SHAPE(cls_logits[i], batch, a, h, w);
    CHECK_SHAPE(bbox_deltas[i], batch, 4 * a, h, w);
    CHECK_SHAPE(base_anchors[i], a, 4);
    in.logits.push_back(cast(cls_logits[i]));
    in.deltas.push_back(cast(bbox_deltas[i]));
    in.bases.push_back(contiguous_as(base_anchors[i], dtype));
    in.start.push_back(in.start.back() + std::min(nms_pre > 0 ? nms_pre : a * h * w, a * h * w));
  }
  const Filter filter{min_size, topk_on_logits, return_logits};
  return dtype == ScalarType::Double
             ? run<double>(in, dtype, make_coder<double>(means, stds, wh_ratio_clip, symmetric_clip), filter)
             : run<float>(in, dtype, make_coder<float>(means, stds, wh_ratio_clip, symmetric_clip), filter);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrcnn, CPU, m) { m.impl("decode_proposals", TORCH_BOX(&decode_proposals)); }

}  // namespace fastrcnn
