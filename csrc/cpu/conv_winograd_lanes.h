// Winograd's transforms of pixels in vectors of LANES floats. What uses them includes this once for each instruction set:
// templates would not take over the pragma's target.

typedef float Vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

// The first n channels, zeros behind them.
HOST_DEVICE Vec load(const float* p, int64_t n) {
  if (n >= LANES) return *reinterpret_cast<const Vec*>(p);
  Vec v = {};
  memcpy(&v, p, n * sizeof(float));
  return v;
}
HOST_DEVICE void store(float* p, Vec v, int64_t n) {
  if (n >= LANES)
    *reinterpret_cast<Vec*>(p) = v;
  else
    memcpy(p, &v, n * sizeof(float));
}

// B^T d: six pixels to the six points.
HOST_DEVICE void to_points(const Vec d[6], Vec out[6]) {
  const Vec even1 = d[4] - 2.0f * d[2], odd1 = kPoint1 * (d[3] - 2.0f * d[1]);
  const Vec even2 = d[4] - 0.5f * d[2], odd2 = kPoint2 * (d[3] - 0.5f * d[1]);
  out[0] = (d[0] + d[4]) - 2.5f * d[2];
  out[1] = even1 + odd1, out[2] = even1 - odd1;
  out[3] = even2 + odd2, out[4] = even2 - odd2;
  out[5] = (d[1] + d[5]) - 2.5f * d[3];
}

// A^T m: six points to four pixels.
HOST_DEVICE void from_points(const Vec m[6], Vec out[4]) {
  const Vec even1 = m[1] + m[2], odd1 = kPoint1 * (m[1] - m[2]);
  const Vec even2 = m[3] + m[4], odd2 = kPoint2 * (m[3] - m[4]);
  out[0] = (m[0] + even1) + even2;
  out[1] = odd1 + odd2;
  out[2] = 0.5f * even1 + 2.0f * even2;
  out[3] = (0.5f * odd1 + 2.0f * odd2) + m[5];
}

// The six by six pixels of a tile, LANES channels at a time, to points[point][chunk][lane] with these strides.
static void transform_input(const float* const pixel[36], int64_t channels, float* points, int64_t chunk_stride,
                            int64_t point_stride) {
  for (int64_t c = 0; c < channels; c += LANES, points += chunk_stride) {
    Vec columns[6][6], d[6], out[6];
    for (int j = 0; j < 6; ++j) {
      for (int i = 0; i < 6; ++i) d[i] = load(pixel[i * 6 + j] + c, channels - c);
      to_points(d, out);
      for (int i = 0; i < 6; ++i) columns[i][j] = out[i];
    }
    for (int i = 0; i < 6; ++i) {
      to_points(columns[i], out);
      for (int j = 0; j < 6; ++j) *reinterpret_cast<Vec*>(points + (i * 6 + j) * point_stride) = out[j];
    }
  }
}
