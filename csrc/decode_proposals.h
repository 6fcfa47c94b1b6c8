// What the CPU and CUDA kernels of decode_proposals share: what a candidate is ranked by, what becomes of it, and the
// check of the arguments. Candidates of a level count y, x, anchor: number i is anchor i % A of cell i / A.
#pragma once

#include "decode_boxes.h"

#include <algorithm>

namespace fastrcnn {

template <class T>
using Key = decltype(sortable(T()));

// The greater key is taken first. -inf counts as the lowest number, and + 0 makes -0.0 and 0.0 one key.
template <class T>
HOST_DEVICE Key<T> rank_key(T logit, bool use_sigmoid) {
  return sortable(max_(use_sigmoid ? sigmoid(logit) : logit, std::numeric_limits<T>::lowest()) + T(0));
}

// One level's maps and how to step through them: strides of the image, of the anchor or channel, of y and of x.
template <class T, class F>
struct Level {
  const F *logits, *deltas;
  const Box<T>* base;
  int anchors, height, width;
  int64_t lb, la, lh, lw, db, dc, dh, dw;
  T stride_x, stride_y;

  HOST_DEVICE uint32_t size() const { return static_cast<uint32_t>(anchors) * height * width; }
  HOST_DEVICE int64_t logit(int64_t image, uint32_t i) const {
    const uint32_t cell = i / anchors, a = i % anchors, y = cell / width, x = cell % width;
    return image * lb + a * la + y * lh + x * lw;
  }
};

template <class T>
struct ProposalRules {
  DeltaCoder<T> coder;
  T min_size;
  bool topk_on_logits, return_logits;
};

// Candidate i of an image of (height, width) hw: its clipped box and its score, and whether it is large enough to stay.
template <class T, class F>
HOST_DEVICE bool propose(const Level<T, F>& l, int64_t image, uint32_t i, const T* hw, const ProposalRules<T>& rules,
                         Box<T>& box, T& score) {
  const uint32_t cell = i / l.anchors, a = i % l.anchors, y = cell / l.width, x = cell % l.width;
  const T sx = static_cast<T>(x) * l.stride_x, sy = static_cast<T>(y) * l.stride_y;
  const Box<T> base = l.base[a], anchor{base.x1 + sx, base.y1 + sy, base.x2 + sx, base.y2 + sy};
  const F* d = l.deltas + image * l.db + 4 * a * l.dc + y * l.dh + x * l.dw;
  const T deltas[4] = {static_cast<T>(d[0]), static_cast<T>(d[l.dc]), static_cast<T>(d[2 * l.dc]),
                       static_cast<T>(d[3 * l.dc])};
  const T logit = static_cast<T>(l.logits[l.logit(image, i)]);
  box = decode_one(anchor, deltas, hw, rules.coder);
  score = rules.return_logits ? logit : sigmoid(logit);
  return box.x2 - box.x1 > rules.min_size && box.y2 - box.y1 > rules.min_size;  // also drops NaN
}

// The arguments, checked. Hidden, as the stable Tensor is: the struct never leaves the library.
struct __attribute__((visibility("hidden"))) ProposalInputs {
  ScalarType dtype, map_dtype;  // of boxes and scores; of the maps
  std::vector<Tensor> logits, deltas, bases;
  std::vector<double> strides;  // x, y of each level
  std::vector<int64_t> start;   // first output row of each level, and the total
  Tensor sizes;                 // [B, 2]
};

// With `convert`, or where their dtypes differ, the maps become `dtype`.
inline ProposalInputs make_proposal_inputs(const std::vector<Tensor>& cls_logits,
                                           const std::vector<Tensor>& bbox_deltas,
                                           const std::vector<Tensor>& base_anchors, const std::vector<double>& strides,
                                           const Tensor& image_sizes, int64_t nms_pre,
                                           const std::vector<int64_t>& batch_shape, bool convert) {
  const size_t levels = cls_logits.size();
  CHECK_ARGUMENT(levels > 0 && bbox_deltas.size() == levels && base_anchors.size() == levels &&
                     strides.size() == (batch_shape.empty() ? 2 * levels : 0) && (batch_shape.empty() || batch_shape.size() == 2),
                 "cls_logits, bbox_deltas, base_anchors and strides must have one entry a level");
  const int64_t batch = cls_logits[0].size(0);
  CHECK_SHAPE(image_sizes, batch, 2);
  const ScalarType dtype = coordinate_type(cls_logits[0]), own = cls_logits[0].scalar_type();
  const auto same = [own](const Tensor& t) { return t.scalar_type() == own; };
  convert = convert || !std::all_of(cls_logits.begin(), cls_logits.end(), same) ||
            !std::all_of(bbox_deltas.begin(), bbox_deltas.end(), same);
  ProposalInputs in{dtype, convert ? dtype : own, {}, {}, {}, strides, {0},
                    contiguous_as(image_sizes, dtype)};
  const auto cast = [&in](const Tensor& t) {
    return t.scalar_type() == in.map_dtype ? t : torch::stable::to(t, in.map_dtype);
  };
  for (size_t i = 0; i < levels; ++i) {
    const int64_t a = cls_logits[i].size(1), h = cls_logits[i].size(2), w = cls_logits[i].size(3), n = a * h * w;
    CHECK_SHAPE(cls_logits[i], batch, a, h, w);
    CHECK_SHAPE(bbox_deltas[i], batch, 4 * a, h, w);
    CHECK_SHAPE(base_anchors[i], a, 4);
    CHECK_ARGUMENT(n < int64_t{1} << 31, "cls_logits: a level must have fewer than 2^31 anchors");
    for (size_t k = batch_shape.size(); k > 0; --k)  // width / w, then height / h
      in.strides.push_back(static_cast<double>(batch_shape[k - 1] / std::max<int64_t>(k == 2 ? w : h, 1)));
    in.logits.push_back(cast(cls_logits[i]));
    in.deltas.push_back(cast(bbox_deltas[i]));
    in.bases.push_back(contiguous_as(base_anchors[i], dtype));
    in.start.push_back(in.start.back() + std::min(nms_pre > 0 ? nms_pre : n, n));
  }
  return in;
}

template <class T, class F>
Level<T, F> make_level(const ProposalInputs& in, size_t i) {
  const Tensor &x = in.logits[i], &d = in.deltas[i];
  const auto number = [](int64_t n) { return as_int("cls_logits: a size", n); };
  const auto* base = reinterpret_cast<const Box<T>*>(in.bases[i].const_data_ptr<T>());
  return {x.const_data_ptr<F>(), d.const_data_ptr<F>(), base, number(x.size(1)), number(x.size(2)), number(x.size(3)),
          x.stride(0), x.stride(1), x.stride(2), x.stride(3), d.stride(0), d.stride(1), d.stride(2), d.stride(3),
          static_cast<T>(in.strides[2 * i]), static_cast<T>(in.strides[2 * i + 1])};
}

template <class T>
ProposalRules<T> make_proposal_rules(const std::vector<double>& means, const std::vector<double>& stds,
                                     double wh_ratio_clip, bool symmetric_clip, double min_size, bool topk_on_logits,
                                     bool return_logits) {
  return {make_coder<T>(means, stds, wh_ratio_clip, symmetric_clip), static_cast<T>(min_size), topk_on_logits,
          return_logits};
}

}  // namespace fastrcnn
