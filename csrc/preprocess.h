// What the CPU and CUDA kernels of preprocess share beside their arithmetic: the check of the arguments and the choice
// of types and rule.
#pragma once

#include "preprocess_math.h"

#include <algorithm>

namespace fastrcnn {

// The rule's ratio of sizes; torch rounds it to the type it interpolates in.
template <class V>
double size_ratio(Resize rule, int64_t old, int64_t now) {
  if (rule == Resize::kOpencv) return 1.0 / (static_cast<double>(now) / static_cast<double>(old));
  if (rule == Resize::kPillow) return static_cast<double>(old) / static_cast<double>(now);
  return static_cast<V>(old) / static_cast<V>(now);
}

template <class T, Resize R>
Picture<T> make_picture(const Tensor& image, int64_t index, int64_t new_height, int64_t new_width) {
  using V = Value<T, R>;
  const auto number = [](int64_t n) { return as_int("images: a size", n); };
  return {image.const_data_ptr<T>(), image.stride(0), image.stride(1), image.stride(2),
          size_ratio<V>(R, image.size(1), new_height), size_ratio<V>(R, image.size(2), new_width),
          number(image.size(1)), number(image.size(2)), number(new_height), number(new_width), number(index)};
}

inline Resize check_preprocess(const std::vector<Tensor>& images, const std::vector<int64_t>& sizes, int64_t height,
                               int64_t width, const std::vector<double>& mean, const std::vector<double>& std,
                               const std::string& resize) {
  constexpr int64_t kMost = int64_t{1} << 24;  // pixels of a side, so that a float holds every coordinate
  CHECK_ARGUMENT(!images.empty() && sizes.size() == 2 * images.size(), "sizes must have two numbers an image");
  CHECK_ARGUMENT(mean.size() == 3 && std.size() == 3, "mean and std must have three numbers each");
  CHECK_ARGUMENT(height < kMost && width < kMost, "batch_size is too large");
  const Resize rule = resize == "opencv"        ? Resize::kOpencv
                      : resize == "interpolate" ? Resize::kInterpolate
                                                : Resize::kPillow;
  CHECK_ARGUMENT(rule != Resize::kPillow || resize == "pillow", "unknown resize rule ", resize);
  for (size_t i = 0; i < images.size(); ++i) {
    const int64_t h = images[i].size(1), w = images[i].size(2);
    CHECK_SHAPE(images[i], 3, h, w);
    CHECK_ARGUMENT(h > 0 && w > 0 && h < kMost && w < kMost, "images must have from 1 to 2^24 rows and columns");
    CHECK_ARGUMENT(sizes[2 * i] > 0 && sizes[2 * i + 1] > 0 && sizes[2 * i] <= height && sizes[2 * i + 1] <= width,
                   "sizes must be positive and fit batch_size");
    const ScalarType t = images[i].scalar_type();
    CHECK_ARGUMENT(t == ScalarType::Byte || t == ScalarType::Float ||
                       (t == ScalarType::Double && rule == Resize::kInterpolate),
                   "images must be uint8 or float32, or float64 where they are interpolated");
  }
  return rule;
}

// What a kernel is compiled for: an image of T, a batch of O, a rule.
template <class T_, class O_, Resize R_>
struct Kind {
  using T = T_;
  using O = O_;
  using V = Value<T, R_>;
  static constexpr Resize R = R_;
};

template <class T, Resize R, class Run>
void run_images(const std::vector<Tensor>& images, ScalarType type, const std::vector<int64_t>& sizes,
                const std::vector<double>& mean, const std::vector<double>& std, Tensor& out, Run& run) {
  using V = Value<T, R>;
  std::vector<Picture<T>> pictures;
  for (size_t i = 0; i < images.size(); ++i)
    if (images[i].scalar_type() == type)
      pictures.push_back(make_picture<T, R>(images[i], i, sizes[2 * i], sizes[2 * i + 1]));
  if (pictures.empty()) return;
  Normalization<V> n;
  for (int c = 0; c < 3; ++c) n.mean[c] = static_cast<V>(mean[c]), n.std[c] = static_cast<V>(std[c]);
  const ScalarType dtype = out.scalar_type();
  if (dtype == ScalarType::Double) return run(Kind<T, double, R>(), pictures, n, out);
  if (dtype == ScalarType::Float) return run(Kind<T, float, R>(), pictures, n, out);
  if (dtype == ScalarType::BFloat16) return run(Kind<T, BFloat16, R>(), pictures, n, out);
  CHECK_ARGUMENT(dtype == ScalarType::Half, "dtype must be float64, float32, float16 or bfloat16");
  run(Kind<T, Half, R>(), pictures, n, out);
}

// Allocates the batch and calls run(Kind, pictures, normalization, batch) for the images of each type.
template <class Run>
Tensor preprocess_images(const std::vector<Tensor>& images, const std::vector<int64_t>& sizes, int64_t height,
                         int64_t width, const std::vector<double>& mean, const std::vector<double>& std, Resize rule,
                         ScalarType dtype, Run run) {
  const int64_t batch = static_cast<int64_t>(images.size());
  Tensor out = empty_like_device(images[0], {batch, 3, height, width}, dtype, MemoryFormat::ChannelsLast);
  const auto with = [&](auto r) {
    constexpr Resize R = decltype(r)::value;
    run_images<uint8_t, R>(images, ScalarType::Byte, sizes, mean, std, out, run);
    run_images<float, R>(images, ScalarType::Float, sizes, mean, std, out, run);
    if constexpr (R == Resize::kInterpolate)
      run_images<double, R>(images, ScalarType::Double, sizes, mean, std, out, run);
  };
  if (rule == Resize::kOpencv) with(std::integral_constant<Resize, Resize::kOpencv>());
  if (rule == Resize::kInterpolate) with(std::integral_constant<Resize, Resize::kInterpolate>());
  if (rule == Resize::kPillow) with(std::integral_constant<Resize, Resize::kPillow>());
  return out;
}

}  // namespace fastrcnn
