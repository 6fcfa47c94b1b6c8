// Images of different sizes -> one batch, resized, normalised, padded, channels-last. Each thread resizes the columns
// of an image's row once, as they come, and makes rows of the batch from the few that it holds. A byte has 256
// normalised values in each channel: a table replaces the divisions.
#include "preprocess.h"
#include "threads.h"

namespace fastrcnn {
namespace {

// An image's row lies as pixels of three, and element e of a resized row takes in[at[e]], in[at[e] + 3] and so on.
// Integers take OpenCV's arithmetic, floats torch's.
template <class E>
HOST_DEVICE void linear_columns(const E* in, const int* at, const E* weight, int n, E* out) {
#pragma omp simd
  for (int e = 0; e < n; ++e) {
    if constexpr (std::is_same_v<E, int>) out[e] = opencv_row(in[at[e]], in[at[e] + 3], weight[e]);
    else out[e] = interpolate(in[at[e]], in[at[e] + 3], weight[e]);
  }
}
template <class E>
HOST_DEVICE void linear_rows(const E* top, const E* bottom, E weight, int n, E* out) {
#pragma omp simd
  for (int e = 0; e < n; ++e) {
    if constexpr (std::is_same_v<E, int>) out[e] = opencv_pixel(top[e], bottom[e], weight);
    else out[e] = interpolate(top[e], bottom[e], weight);
  }
}
SIMD_CLONES void linear_columns(const int* in, const int* at, const int* weight, int n, int* out) {
  linear_columns<int>(in, at, weight, n, out);
}
SIMD_CLONES void linear_columns(const float* in, const int* at, const float* weight, int n, float* out) {
  linear_columns<float>(in, at, weight, n, out);
}
SIMD_CLONES void linear_rows(const int* top, const int* bottom, int weight, int n, int* out) {
  linear_rows<int>(top, bottom, weight, n, out);
}
SIMD_CLONES void linear_rows(const float* top, const float* bottom, float weight, int n, float* out) {
  linear_rows<float>(top, bottom, weight, n, out);
}

// Pillow's: weights [taps, n]; what a window leaves over has weight zero.
SIMD_CLONES void pillow_columns(const int* in, const int* at, const int* weights, int taps, int n, int* out) {
  std::fill_n(out, n, kPillowHalf);
  for (int k = 0; k < taps; ++k) {
    const int *from = in + 3 * k, *w = weights + int64_t{k} * n;
#pragma omp simd
    for (int e = 0; e < n; ++e) out[e] += w[e] * from[at[e]];
  }
#pragma omp simd
  for (int e = 0; e < n; ++e) out[e] = pillow_byte(out[e]);
}
SIMD_CLONES void pillow_add(const int* row, int weight, int n, int* out) {
#pragma omp simd
  for (int e = 0; e < n; ++e) out[e] += weight * row[e];
}

// One image, ready to be read row by row. Elements are bytes as int, or normalised values where they are interpolated.
template <class T, class O, Resize R>
struct Plan {
  using V = Value<T, R>;
  using E = std::conditional_t<R == Resize::kInterpolate, V, int>;

  Picture<T> picture;
  const Normalization<V>* normalization;
  const Entry<T, O, R>* table;
  bool bgr;
  int taps, held;           // pixels of a window of columns; rows to hold
  std::vector<int> at;      // [3 * new_width], see above
  std::vector<E> weights;   // [3 * new_width], or Pillow's [taps, 3 * new_width]

  int channel(int c) const { return bgr ? 2 - c : c; }  // of the image, for the network's, and the other way round

  void plan_columns() {
    const Picture<T>& p = picture;
    const int n = 3 * p.new_width;
    taps = R == Resize::kPillow ? pillow_taps(p.scale_w) : 2;
    held = R == Resize::kPillow ? pillow_taps(p.scale_h) : 2;
    at.resize(n);
    weights.resize(R == Resize::kPillow ? int64_t{taps} * n : n);
    for (int x = 0; x < p.new_width; ++x) {
      int first;
      if constexpr (R == Resize::kPillow) {
        const Window w = pillow_window(x, p.width, p.scale_w);
        for (int k = 0; k < w.count; ++k) std::fill_n(weights.begin() + int64_t{k} * n + 3 * x, 3, w.weight(k));
        first = w.first;
      } else {
        const auto tap = linear_tap(x, p.width, p.scale_w, true);
        std::fill_n(weights.begin() + 3 * x, 3, tap.weight);
        first = tap.low;
      }
      for (int c = 0; c < 3; ++c) at[3 * x + c] = 3 * first + channel(c);
    }
  }
  static ResizeTap<E> linear_tap(int i, int size, double scale, bool columns) {
    if constexpr (R == Resize::kOpencv) {
      return opencv_tap(i, size, scale, columns);
    } else {
      return interpolate_tap<V>(i, size, scale);
    }
  }

  void load(int y, E* in) const {
    const T* row = picture.data + y * picture.row;
    for (int x = 0; x < picture.width; ++x)
      for (int c = 0; c < 3; ++c) {
        const T v = row[x * picture.column + c * picture.channel];
        if constexpr (R != Resize::kInterpolate) {
          in[3 * x + c] = as_byte(v);
        } else if constexpr (std::is_same_v<T, uint8_t>) {
          in[3 * x + c] = table[256 * channel(c) + v];
        } else {
          in[3 * x + c] = normalization->of_unit(v, channel(c));
        }
      }
    // A column on the border is its own neighbour; windows need no more than something to multiply by zero.
    std::copy_n(in + 3 * (picture.width - 1), 3, in + 3 * picture.width);
  }

  // Rows [first, last) of the batch; `out` is the image's first.
  void fill(int first, int last, int64_t width, O* out) const {
    const Picture<T>& p = picture;
    const int n = 3 * p.new_width;
    std::vector<E> in(3 * (int64_t{p.width} + taps)), rows_held(int64_t{held} * n), values(n);
    std::vector<int> number(held, -1);
    const auto row_of = [&](int y) -> const E* {
      E* row = rows_held.data() + int64_t{y % held} * n;
      if (number[y % held] == y) return row;
      number[y % held] = y;
      load(y, in.data());
      if constexpr (R == Resize::kPillow) {
        pillow_columns(in.data(), at.data(), weights.data(), taps, n, row);
      } else {
        linear_columns(in.data(), at.data(), weights.data(), n, row);
      }
      return row;
    };
    for (int y = first; y < last; ++y) {
      O* to = out + y * width * 3;
      const int made = y < p.new_height ? n : 0;
      std::fill(to + made, to + width * 3, static_cast<O>(0.0f));
      if (made == 0) continue;
      if constexpr (R == Resize::kPillow) {
        const Window w = pillow_window(y, p.height, p.scale_h);
        std::fill(values.begin(), values.end(), kPillowHalf);
        for (int k = 0; k < w.count; ++k) pillow_add(row_of(w.first + k), w.weight(k), n, values.data());
      } else {
        const auto tap = linear_tap(y, p.height, p.scale_h, false);
        const E* top = row_of(tap.low);
        linear_rows(top, row_of(tap.high), tap.weight, n, values.data());
      }
      for (int x = 0; x < p.new_width; ++x)
        for (int c = 0; c < 3; ++c) {
          const E v = values[3 * x + c];
          if constexpr (R == Resize::kInterpolate) {
            to[3 * x + c] = static_cast<O>(v);
          } else {
            to[3 * x + c] = table[256 * c + (R == Resize::kPillow ? pillow_byte(v) : v)];
          }
        }
    }
  }
};

template <class T, class O, Resize R>
void run(const std::vector<Picture<T>>& pictures, const Normalization<Value<T, R>>& n, bool bgr, Tensor& out) {
  const int64_t height = out.size(2), width = out.size(3), count = static_cast<int64_t>(pictures.size());
  std::vector<Entry<T, O, R>> table(3 * 256);
  for (int i = 0; i < 3 * 256; ++i) table[i] = table_entry<T, O, R>(n, i);
  std::vector<Plan<T, O, R>> plans;
  for (const Picture<T>& p : pictures) plans.push_back({p, &n, table.data(), bgr, 0, 0, {}, {}});
  O* data = out.mutable_data_ptr<O>();
  for (auto& plan : plans) plan.plan_columns();
  share(count * height, 32, threads_for(count * height * width, 1 << 19), [&](int64_t first, int64_t last, int64_t) {
    while (first < last) {
      const int64_t i = first / height, begin = first % height, end = std::min(height, begin + last - first);
      plans[i].fill(static_cast<int>(begin), static_cast<int>(end), width,
                    data + pictures[i].index * height * width * 3);
      first += end - begin;
    }
  });
}

Tensor preprocess(std::vector<Tensor> images, std::vector<int64_t> sizes, int64_t height, int64_t width,
                  std::vector<double> mean, std::vector<double> std, std::string resize, bool bgr, ScalarType dtype) {
  const Resize rule = check_preprocess(images, sizes, height, width, mean, std, resize);
  return preprocess_images(images, sizes, height, width, mean, std, rule, dtype,
                           [bgr](auto kind, const auto& pictures, const auto& n, Tensor& out) {
                             using K = decltype(kind);
                             run<typename K::T, typename K::O, K::R>(pictures, n, bgr, out);
                           });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastrcnn, CPU, m) { m.impl("preprocess", TORCH_BOX(&preprocess)); }

}  // namespace fastrcnn
