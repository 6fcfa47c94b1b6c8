// RPN maps -> proposals: per-level top-k, anchors, decoding, clipping and the size filter in one pass over each image
// and level. Anchors are computed where they are needed and never stored.
#include "box_math.h"

#include <algorithm>
#include <cstring>
#include <limits>

namespace fastrcnn {
namespace {

// Unsigned integers that sort as the floats do, NaN last (below -inf).
HOST_DEVICE uint32_t sortable(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  const uint32_t key = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return x == x ? key : 0u;
}

// keys[i] for the n scores of one level, anchor fastest, then x, then y.
HOST_DEVICE void make_keys_body(const float* logits, int64_t sa, int64_t sh, int64_t sw, int64_t height,
                                int64_t width, int64_t anchors, bool use_sigmoid, uint32_t* keys) {
  for (int64_t a = 0; a < anchors; ++a) {
    for (int64_t y = 0; y < height; ++y) {
      const float* row = logits + a * sa + y * sh;
      uint32_t* out = keys + y * width * anchors + a;
#pragma omp simd
      for (int64_t x = 0; x < width; ++x) {
        const float logit = row[x * sw];
        // + 0.0f makes -0.0 and 0.0 one key.
        out[x * anchors] = sortable((use_sigmoid ? sigmoid(logit) : logit) + 0.0f);
      }
    }
  }
}
SIMD_CLONES void make_keys(const float* logits, int64_t sa, int64_t sh, int64_t sw, int64_t height, int64_t width,
                           int64_t anchors, bool use_sigmoid, uint32_t* keys) {
  make_keys_body(logits, sa, sh, sw, height, width, anchors, use_sigmoid, keys);
}

// Indices of the k largest keys, descending, equal keys by index. A histogram of the leading bits leaves only the
// candidates of the last bin to sort out, so the cost is two passes over the keys.
std::vector<int64_t> top_k(const std::vector<uint32_t>& keys, int64_t k) {
  constexpr int kShift = 20;
  std::vector<int64_t> histogram(size_t{1} << (32 - kShift), 0);
  for (const uint32_t key : keys) ++histogram[key >> kShift];
  int64_t bin = static_cast<int64_t>(histogram.size()) - 1;
  for (int64_t seen = 0; bin > 0 && (seen += histogram[bin]) < k; --bin) {
  }
  std::vector<uint64_t> candidates;  // key, then the complement of the index: one number to sort by
  const uint32_t lowest = static_cast<uint32_t>(bin) << kShift;
  for (size_t i = 0; i < keys.size(); ++i)
    if (keys[i] >= lowest) candidates.push_back(static_cast<uint64_t>(keys[i]) << 32 | (~static_cast<uint32_t>(i)));
  const auto end = candidates.begin() + std::min<int64_t>(k, candidates.size());
  std::partial_sort(candidates.begin(), end, candidates.end(), std::greater<uint64_t>());
  std::vector<int64_t> indices;
  for (auto it = candidates.begin(); it != end; ++it) indices.push_back(~static_cast<uint32_t>(*it));
  return indices;
}

struct Rows {
  float* boxes;     // [K, 4]
  float* scores;    // [K]
  int64_t* levels;  // [K]
};

struct Filter {
  float height, width, min_size;
  bool score_is_logit, topk_on_logits;
};

// One image, one level: writes the surviving rows and returns how many there are.
int64_t run_level(const Tensor& logits, const Tensor& deltas, const Box<float>* base, int64_t image, int64_t level,
                  double stride_x, double stride_y, int64_t k, const DeltaCoder<float>& coder, const Filter& filter,
                  Rows rows) {
  const int64_t anchors = logits.size(1), height = logits.size(2), width = logits.size(3);
  const float* l = logits.const_data_ptr<float>() + image * logits.stride(0);
  const float* d = deltas.const_data_ptr<float>() + image * deltas.stride(0);
  const int64_t la = logits.stride(1), lh = logits.stride(2), lw = logits.stride(3);
  const int64_t dc = deltas.stride(1), dh = deltas.stride(2), dw = deltas.stride(3);
  std::vector<uint32_t> keys(anchors * height * width);
  make_keys(l, la, lh, lw, height, width, anchors, !filter.topk_on_logits, keys.data());
  int64_t count = 0;
  for (const int64_t i : top_k(keys, k)) {
    const int64_t a = i % anchors, x = i / anchors % width, y = i / anchors / width;
    const float shift_x = static_cast<float>(x * stride_x), shift_y = static_cast<float>(y * stride_y);
    const Box<float> anchor{base[a].x1 + shift_x, base[a].y1 + shift_y, base[a].x2 + shift_x, base[a].y2 + shift_y};
    const float* delta = d + 4 * a * dc + y * dh + x * dw;
    const Box<float> b =
        clip(decode(anchor, delta[0], delta[dc], delta[2 * dc], delta[3 * dc], coder), filter.height, filter.width);
    if (!(b.x2 - b.x1 > filter.min_size && b.y2 - b.y1 > filter.min_size)) continue;  // also drops NaN
    const float logit = l[a * la + y * lh + x * lw];
    memcpy(rows.boxes + count * 4, &b, sizeof(b));
    rows.scores[count] = filter.score_is_logit ? logit : sigmoid(logit);
    rows.levels[count++] = level;
  }
  return count;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> decode_proposals(
    std::vector<Tensor> cls_logits, std::vector<Tensor> bbox_deltas, std::vector<Tensor> base_anchors,
    std::vector<double> strides, const Tensor& image_sizes, int64_t nms_pre, std::vector<double> means,
    std::vector<double> stds, double wh_ratio_clip, bool symmetric_clip, double min_size, bool topk_on_logits,
    bool return_logits) {
  const int64_t levels = static_cast<int64_t>(cls_logits.size());
  STD_TORCH_CHECK(levels > 0 && static_cast<int64_t>(bbox_deltas.size()) == levels &&
                      static_cast<int64_t>(base_anchors.size()) == levels &&
                      static_cast<int64_t>(strides.size()) == 2 * levels,
                  "cls_logits, bbox_deltas, base_anchors and strides must have one entry a level");
  const int64_t batch = cls_logits[0].size(0);
  CHECK_SHAPE(image_sizes, batch, 2);
  std::vector<Tensor> logits, deltas, bases;
  std::vector<int64_t> start{0};
  const auto as_float = [](const Tensor& t) {
    return t.scalar_type() == ScalarType::Float ? t : torch::stable::to(t, ScalarType::Float);
  };
  for (int64_t i = 0; i < levels; ++i) {
    const int64_t a = cls_logits[i].size(1), h = cls_logits[i].size(2), w = cls_logits[i].size(3);
    CHECK_SHAPE(cls_logits[i], batch, a, h, w);
    CHECK_SHAPE(bbox_deltas[i], batch, 4 * a, h, w);
    CHECK_SHAPE(base_anchors[i], a, 4);
    logits.push_back(as_float(cls_logits[i]));
    deltas.push_back(as_float(bbox_deltas[i]));
    bases.push_back(contiguous_as(base_anchors[i], ScalarType::Float));
    start.push_back(start.back() + std::min(nms_pre > 0 ? nms_pre : a * h * w, a * h * w));
  }
  const Tensor sizes = contiguous_as(image_sizes, ScalarType::Float);
  const DeltaCoder<float> coder = make_coder<float>(means, stds, wh_ratio_clip, symmetric_clip);
  const int64_t total = start.back();
  Tensor boxes = empty_like_device(image_sizes, {batch, total, 4}, ScalarType::Float);
  Tensor scores = empty_like_device(image_sizes, {batch, total}, ScalarType::Float);
  Tensor level_ids = empty_like_device(image_sizes, {batch, total}, ScalarType::Long);
  Tensor counts = empty_like_device(image_sizes, {batch}, ScalarType::Long);
  const float* hw = sizes.const_data_ptr<float>();
  std::vector<int64_t> found(batch * levels);
  const auto rows_at = [&](int64_t image, int64_t row) {
    return Rows{boxes.mutable_data_ptr<float>() + (image * total + row) * 4,
                scores.mutable_data_ptr<float>() + image * total + row,
                level_ids.mutable_data_ptr<int64_t>() + image * total + row};
  };
  torch::stable::parallel_for(0, batch * levels, 1, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      const int64_t image = t % batch, level = t / batch;
      const Filter filter{hw[image * 2], hw[image * 2 + 1], static_cast<float>(min_size), return_logits,
                          topk_on_logits};
      found[t] = run_level(logits[level], deltas[level],
                           reinterpret_cast<const Box<float>*>(bases[level].const_data_ptr<float>()), image, level,
                           strides[2 * level], strides[2 * level + 1], start[level + 1] - start[level], coder, filter,
                           rows_at(image, start[level]));
    }
  });
  // Close the gaps the filter left, so that each image's valid rows come first.
  for (int64_t image = 0; image < batch; ++image) {
    int64_t row = 0;
    for (int64_t level = 0; level < levels; ++level) {
      const Rows to = rows_at(image, row), from = rows_at(image, start[level]);
      const int64_t n = found[level * batch + image];
      memmove(to.boxes, from.boxes, n * 4 * sizeof(float));
      memmove(to.scores, from.scores, n * sizeof(float));
      memmove(to.levels, from.levels, n * sizeof(int64_t));
      row += n;
    }
    const Rows rest = rows_at(image, row);
    std::fill_n(rest.boxes, (total - row) * 4, 0.0f);
    std::fill_n(rest.scores, total - row, 0.0f);
    std::fill_n(rest.levels, total - row, int64_t{-1});
    counts.mutable_data_ptr<int64_t>()[image] = row;
  }
  return {boxes, scores, level_ids, counts};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrcnn, CPU, m) { m.impl("decode_proposals", TORCH_BOX(&decode_proposals)); }

}  // namespace fastrcnn
