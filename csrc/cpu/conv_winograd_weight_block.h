// The weight of a Winograd convolution to its points and back, and the sums of its gradient. conv_winograd_weight.cpp
// includes this once for each instruction set, behind conv_winograd_lanes.h.

// G g: the three taps to the six points.
HOST_DEVICE void taps_to_points(const Vec g[3], Vec out[6]) {
  const Vec even1 = -2 / 3.0f * g[0] - 1 / 3.0f * g[2], odd1 = -2 / 3.0f * kPoint1 * g[1];
  const Vec even2 = 1 / 6.0f * g[0] + 1 / 3.0f * g[2], odd2 = 1 / 3.0f * kPoint1 * g[1];
  out[0] = g[0];
  out[1] = even1 + odd1, out[2] = even1 - odd1;
  out[3] = even2 + odd2, out[4] = even2 - odd2;
  out[5] = g[2];
}

// G^T s: six points to three taps.
HOST_DEVICE void points_to_taps(const Vec s[6], Vec out[3]) {
  const Vec even1 = s[1] + s[2], odd1 = s[1] - s[2], even2 = s[3] + s[4], odd2 = s[3] - s[4];
  out[0] = (s[0] - 2 / 3.0f * even1) + 1 / 6.0f * even2;
  out[1] = kPoint1 * (1 / 3.0f * odd2 - 2 / 3.0f * odd1);
  out[2] = (s[5] - 1 / 3.0f * even1) + 1 / 3.0f * even2;
}

// A y: four pixels to the six points.
HOST_DEVICE void pixels_to_points(const Vec y[4], Vec out[6]) {
  const Vec even1 = y[0] + 0.5f * y[2], odd1 = kPoint1 * (y[1] + 0.5f * y[3]);
  const Vec even2 = y[0] + 2.0f * y[2], odd2 = kPoint2 * (y[1] + 2.0f * y[3]);
  out[0] = y[0];
  out[1] = even1 + odd1, out[2] = even1 - odd1;
  out[3] = even2 + odd2, out[4] = even2 - odd2;
  out[5] = y[3];
}

// LANES channels from `channel` on and a panel of 2 * LANES filters, to points[point][channel][filter].
static void pack(const Taps& w, int64_t filter, int64_t channel, float* points, int64_t point_stride) {
  for (int64_t c = channel; c < channel + LANES; ++c, points += 2 * LANES)
    for (int half = 0; half < 2; ++half) {
      const int64_t first = filter + half * LANES;
      float taps[9][LANES] = {};
      if (c < w.channels)
        for (int64_t f = 0; f < LANES && first + f < w.filters; ++f)
          for (int64_t k = 0; k < 9; ++k) taps[k][f] = w.data[w.at(first + f, c, k)];
      Vec columns[6][3], g[3], out[6];
      for (int j = 0; j < 3; ++j) {
        for (int i = 0; i < 3; ++i) g[i] = load(taps[i * 3 + j], LANES);
        taps_to_points(g, out);
        for (int i = 0; i < 6; ++i) columns[i][j] = out[i];
      }
      for (int i = 0; i < 6; ++i) {
        taps_to_points(columns[i], out);
        for (int j = 0; j < 6; ++j) store(points + (i * 6 + j) * point_stride + half * LANES, out[j], LANES);
      }
    }
}

// What `pack` made, read back: taps from the sums of their gradient at the points.
static void unpack(const Taps& w, int64_t filter, int64_t channel, const float* sums, int64_t point_stride) {
  for (int64_t c = channel; c < std::min<int64_t>(channel + LANES, w.channels); ++c, sums += 2 * LANES)
    for (int half = 0; half < 2; ++half) {
      const int64_t first = filter + half * LANES;
      Vec columns[3][6], s[6], out[3];
      for (int j = 0; j < 6; ++j) {
        for (int i = 0; i < 6; ++i) s[i] = load(sums + (i * 6 + j) * point_stride + half * LANES, LANES);
        points_to_taps(s, out);
        for (int i = 0; i < 3; ++i) columns[i][j] = out[i];
      }
      float taps[9][LANES];
      for (int i = 0; i < 3; ++i) {
        points_to_taps(columns[i], out);
        for (int j = 0; j < 3; ++j) store(taps[i * 3 + j], out[j], LANES);
      }
      for (int64_t f = 0; f < LANES && first + f < w.filters; ++f)
        for (int64_t k = 0; k < 9; ++k) w.data[w.at(first + f, c, k)] = taps[k][f];
    }
}

// The four by four pixels of a tile of the output's gradient, to points[point][panel][lane] with these strides.
static void transform_gradient(const float* const pixel[16], int64_t filters, float* points, int64_t panel_stride,
                               int64_t point_stride) {
  for (int64_t f = 0; f < filters; f += LANES) {
    float* const at = points + f / (2 * LANES) * panel_stride + f % (2 * LANES);
    Vec columns[6][4], y[4], out[6];
    for (int j = 0; j < 4; ++j) {
      for (int i = 0; i < 4; ++i) y[i] = load(pixel[i * 4 + j] + f, filters - f);
      pixels_to_points(y, out);
      for (int i = 0; i < 6; ++i) columns[i][j] = out[i];
    }
    for (int i = 0; i < 6; ++i) {
      pixels_to_points(columns[i], out);
      for (int j = 0; j < 6; ++j) store(at + (i * 6 + j) * point_stride, out[j], LANES);
    }
  }
}

// LANES channels x a panel of filters at one point: sum[channel][filter] (+)= over the tiles, input * gradient.
static void accumulate(const float* input, const float* gradient, int64_t tiles, bool first, float* sum) {
  constexpr int kRows = LANES / 2;
  for (int half = 0; half < 2; ++half, sum += kRows * 2 * LANES) {
    Vec own[kRows][2] = {};
#pragma GCC unroll 8
    for (int r = 0; !first && r < kRows; ++r)
      own[r][0] = load(sum + r * 2 * LANES, LANES), own[r][1] = load(sum + r * 2 * LANES + LANES, LANES);
    for (int64_t t = 0; t < tiles; ++t) {
      const Vec b0 = load(gradient + t * 2 * LANES, LANES), b1 = load(gradient + t * 2 * LANES + LANES, LANES);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const float x = input[t * LANES + half * kRows + r];
        own[r][0] += x * b0;
        own[r][1] += x * b1;
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
      store(sum + r * 2 * LANES, own[r][0], LANES), store(sum + r * 2 * LANES + LANES, own[r][1], LANES);
  }
}
