// RPN maps -> proposals, all images and levels in one set of launches and without a word to the host: the candidates of
// each segment (an image's level) are selected, then one block a segment sorts, decodes, clips and filters them, and a
// last kernel closes the gaps between the levels. Anchors are computed where they are needed and never stored.
#include "radix_select.cuh"
#include "sort.cuh"

#include <torch/csrc/stable/accelerator.h>

#include <type_traits>

namespace fastrcnn {
namespace {

constexpr int kThreads = 512;

// Ascending, in shared memory; size is a power of two. Pairs not more than a warp's width apart lie within the 64
// entries that are this warp's alone, so between such steps a warp barrier is enough.
__device__ void bitonic_sort(uint64_t* values, int size) {
  for (int run = 2; run <= size; run *= 2) {
    for (int apart = run / 2; apart > 0; apart /= 2) {
      for (int pair = threadIdx.x; pair < size / 2; pair += kThreads) {
        const int i = 2 * pair - (pair & (apart - 1));
        const uint64_t a = values[i], b = values[i + apart];
        if ((a > b) == ((i & run) == 0)) values[i] = b, values[i + apart] = a;
      }
      const int next = apart > 1 ? apart / 2 : run;
      if (apart > kWarp || next > kWarp) {
        __syncthreads();
      } else {
        __syncwarp();
      }
    }
  }
}

// One group: its candidates in order, decoded, clipped and filtered; those that stay go to the front of its rows.
// They come in `order`, or, where that is null, are `selected` and sorted here. What limits it are the sort's barriers.
template <class T, class F>
__global__ void __launch_bounds__(kThreads)
    propose_kernel(const __grid_constant__ Plan<T, F> plan, const __grid_constant__ ProposalRules<T> rules,
                   const T* image_sizes, const uint64_t* selected, const uint32_t* order, AlignedBox<T>* boxes,
                   T* scores, int* kept) {
  extern __shared__ uint64_t sorted[];
  const Shape& shape = plan.shape;
  const Place p = locate(shape, shape.group);
  const int first = p.part * kGroup, rows = min(shape.count[p.level] - first, kGroup);
  const int64_t row = static_cast<int64_t>(p.image) * shape.row[shape.levels] + shape.row[p.level] + first;
  if (order == nullptr) {
    int size = 2;
    while (size < rows) size *= 2;
    for (int j = threadIdx.x; j < size; j += kThreads) sorted[j] = j < rows ? selected[row + j] : ~uint64_t{0};
    __syncthreads();
    bitonic_sort(sorted, size);
  }
  int count = 0;
  for (int slab = 0; slab < rows; slab += kThreads) {
    const int j = slab + threadIdx.x;
    Box<T> box{};
    T score{};
    bool keep = false;
    if (j < rows) {
      const uint32_t i = order == nullptr ? static_cast<uint32_t>(sorted[j]) : order[row + j];
      keep = propose(plan.level[p.level], p.image, i, image_sizes + p.image * 2, rules, box, score);
    }
    const Sums sums = block_sums<kThreads>(keep);
    if (keep) {
      boxes[row + count + sums.before] = {box};
      scores[row + count + sums.before] = score;
    }
    count += sums.all;
  }
  if (threadIdx.x == 0) kept[blockIdx.x] = count;
}

// One group's rows to their final place. Each group also fills as many rows at the image's end as it has left empty.
template <class T>
__global__ void __launch_bounds__(kThreads)
    place_kernel(const __grid_constant__ Shape shape, const AlignedBox<T>* from_boxes, const T* from_scores,
                 const int* kept, AlignedBox<T>* boxes, T* scores, int64_t* levels, int64_t* counts) {
  const Place p = locate(shape, shape.group);
  const int groups = shape.group[shape.levels], group = shape.group[p.level] + p.part, total = shape.row[shape.levels];
  int sum = 0;
  for (int g = threadIdx.x; g < group; g += kThreads) sum += kept[static_cast<int64_t>(p.image) * groups + g];
  const int before = block_sums<kThreads>(sum).all, own = kept[blockIdx.x];
  const int begin = shape.row[p.level] + p.part * kGroup, rows = min(shape.row[p.level + 1] - begin, kGroup);
  const int64_t image = static_cast<int64_t>(p.image) * total;
  const int end = total - (begin - before);  // behind it the groups before fill
  for (int j = threadIdx.x; j < rows; j += kThreads) {
    const bool valid = j < own;
    const int64_t from = image + begin + j, to = image + (valid ? before + j : end - 1 - (j - own));
    boxes[to] = valid ? from_boxes[from] : AlignedBox<T>{};
    scores[to] = valid ? from_scores[from] : T(0);
    levels[to] = valid ? p.level : -1;
  }
  if (group == groups - 1 && threadIdx.x == 0) counts[p.image] = before + own;
}

// For sort_lists, whose lists are the images: one level's keys, ascending and so complemented, ...
template <class T, class F>
struct LevelKey {
  Level<T, F> level;
  bool use_sigmoid;
  __device__ Key<T> operator()(int image, int i) const {
    return ~rank_key(static_cast<T>(level.logits[level.logit(image, i)]), use_sigmoid);
  }
};
// ... or those of its selected candidates, which hold the index too; ...
struct SelectedKey {
  const uint64_t* selected;  // of this level
  int64_t total;
  __device__ uint64_t operator()(int image, int i) const { return selected[image * total + i]; }
};
// ... and where the candidates go.
struct ToOrder {
  uint32_t* order;           // of this level
  const uint64_t* selected;  // null: i is the candidate
  int64_t total;
  int count;
  __device__ void operator()(int image, int place, int i) const {
    if (place < count) order[image * total + place] = selected == nullptr ? i : selected[image * total + i];
  }
};

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;
template <class T, class F>
Outputs run(const ProposalInputs& in, const ProposalRules<T>& rules) {
  const int64_t batch = in.sizes.size(0), total = in.start.back();
  Tensor boxes = empty_like_device(in.sizes, {batch, total, 4}, in.dtype);
  Tensor scores = empty_like_device(in.sizes, {batch, total}, in.dtype);
  Tensor levels = empty_like_device(in.sizes, {batch, total}, ScalarType::Long);
  Tensor counts = empty_like_device(in.sizes, {batch}, ScalarType::Long);
  const cudaStream_t stream = current_stream(in.sizes);
  if (batch * total == 0) {
    if (batch > 0)
      STD_CUDA_CHECK(cudaMemsetAsync(counts.mutable_data_ptr<int64_t>(), 0, batch * sizeof(int64_t), stream));
    return {boxes, scores, levels, counts};
  }
  Plan<T, F> plan{make_shape(in), {}};
  const Shape& shape = plan.shape;
  int most = 0;
  bool drops = false;
  for (int l = 0; l < shape.levels; ++l) {
    plan.level[l] = make_level<T, F>(in, l);
    most = std::max(most, shape.count[l]);
    drops = drops || shape.count[l] < shape.size[l];
  }
  const bool use_sigmoid = !rules.topk_on_logits;

  // The select is for 32-bit keys; doubles, and levels that are kept whole, are sorted as they are.
  Tensor selected;
  const uint64_t* candidates = nullptr;
  if constexpr (std::is_same_v<T, float>) {
    if (drops) {
      selected = empty_like_device(in.sizes, {batch, total}, ScalarType::Long);
      select(plan, batch, use_sigmoid, selected, stream);
      candidates = reinterpret_cast<const uint64_t*>(selected.const_data_ptr<int64_t>());
    }
  }
  const bool sort_in_block = candidates != nullptr && most <= kGroup;
  int shared_bytes = 2 * sizeof(uint64_t);
  while (sort_in_block && shared_bytes < most * static_cast<int>(sizeof(uint64_t))) shared_bytes *= 2;
  Tensor order = empty_like_device(in.sizes, {sort_in_block ? 0 : batch * total}, ScalarType::Int);
  auto* ordered = reinterpret_cast<uint32_t*>(order.mutable_data_ptr<int>());
  for (int l = 0; l < shape.levels && !sort_in_block; ++l) {
    if (shape.count[l] == 0) continue;
    const uint64_t* own = candidates == nullptr ? nullptr : candidates + shape.row[l];
    const ToOrder to{ordered + shape.row[l], own, total, shape.count[l]};
    if (own != nullptr) {
      sort_lists(batch, shape.count[l], in.sizes, SelectedKey{own, total}, to);
    } else {
      sort_lists(batch, shape.size[l], in.sizes, LevelKey<T, F>{plan.level[l], use_sigmoid}, to);
    }
  }

  const int64_t groups = batch * shape.group[shape.levels];
  Tensor rows = empty_like_device(in.sizes, {batch * total * 5}, in.dtype);  // boxes, then scores
  Tensor kept = empty_like_device(in.sizes, {groups}, ScalarType::Int);
  auto* row_boxes = reinterpret_cast<AlignedBox<T>*>(rows.template mutable_data_ptr<T>());
  T* row_scores = rows.template mutable_data_ptr<T>() + batch * total * 4;
  propose_kernel<T, F><<<groups, kThreads, shared_bytes, stream>>>(
      plan, rules, in.sizes.const_data_ptr<T>(), candidates, sort_in_block ? nullptr : ordered, row_boxes, row_scores,
      kept.mutable_data_ptr<int>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  place_kernel<T><<<groups, kThreads, 0, stream>>>(
      shape, row_boxes, row_scores, kept.const_data_ptr<int>(),
      reinterpret_cast<AlignedBox<T>*>(boxes.template mutable_data_ptr<T>()), scores.template mutable_data_ptr<T>(),
      levels.mutable_data_ptr<int64_t>(), counts.mutable_data_ptr<int64_t>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {boxes, scores, levels, counts};
}

Outputs decode_proposals(std::vector<Tensor> cls_logits, std::vector<Tensor> bbox_deltas,
                         std::vector<Tensor> base_anchors, std::vector<double> strides, const Tensor& image_sizes,
                         int64_t nms_pre, std::vector<double> means, std::vector<double> stds, double wh_ratio_clip,
                         bool symmetric_clip, double min_size, bool topk_on_logits, bool return_logits,
                         std::optional<std::vector<int64_t>> batch_shape) {
  const torch::stable::accelerator::DeviceGuard guard(image_sizes.get_device_index());
  CHECK_ARGUMENT(cls_logits.size() <= kMaxLevels, "cls_logits: at most ", kMaxLevels, " levels, got ", cls_logits.size());
  const ProposalInputs in =
      make_proposal_inputs(cls_logits, bbox_deltas, base_anchors, strides, image_sizes, nms_pre,
                           batch_shape.value_or(std::vector<int64_t>{}), /*convert=*/false);
  Outputs out;
  dispatch_features(in.map_dtype, [&](auto t, auto f) {
    using T = decltype(t);
    out = run<T, decltype(f)>(in, make_proposal_rules<T>(means, stds, wh_ratio_clip, symmetric_clip, min_size,
                                                         topk_on_logits, return_logits));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrcnn, CUDA, m) { m.impl("decode_proposals", TORCH_BOX(&decode_proposals)); }

}  // namespace fastrcnn
