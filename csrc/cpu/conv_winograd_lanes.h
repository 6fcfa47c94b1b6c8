// A block of tiles of a Winograd convolution in vectors of LANES floats, ROWS tiles x 2 vectors of filters in registers.
// conv_winograd.cpp includes this once for each instruction set: templates would not take over the pragma's target.

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

// The six by six pixels of a tile, LANES channels at a time, to points[point][...][chunk][row][lane].
static void transform_input(const WinogradConv& p, const float* const pixel[36], float* points) {
  for (int64_t c = 0; c < p.channels; c += LANES, points += ROWS * LANES) {
    Vec columns[6][6], d[6], out[6];
    for (int j = 0; j < 6; ++j) {
      for (int i = 0; i < 6; ++i) d[i] = load(pixel[i * 6 + j] + c, p.channels - c);
      to_points(d, out);
      for (int i = 0; i < 6; ++i) columns[i][j] = out[i];
    }
    for (int i = 0; i < 6; ++i) {
      to_points(columns[i], out);
      for (int j = 0; j < 6; ++j) *reinterpret_cast<Vec*>(points + (i * 6 + j) * p.point_stride) = out[j];
    }
  }
}

// ROWS tiles x 2 * LANES filters at one point: product[row][filter] = sum over the channels of a * b.
static void multiply(const float* a, const float* b, int64_t chunks, float* product) {
  Vec sum[ROWS][2] = {};
  for (int64_t chunk = 0; chunk < chunks; ++chunk, a += ROWS * LANES) {
    for (int lane = 0; lane < LANES; ++lane, b += 2 * LANES) {
      const Vec b0 = *reinterpret_cast<const Vec*>(b), b1 = *reinterpret_cast<const Vec*>(b + LANES);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
        const float x = a[r * LANES + lane];
        sum[r][0] += x * b0;
        sum[r][1] += x * b1;
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
    *reinterpret_cast<Vec*>(product + r * 2 * LANES) = sum[r][0];
    *reinterpret_cast<Vec*>(product + r * 2 * LANES + LANES) = sum[r][1];
  }
}

// The products of a tile and LANES filters to its four by four pixels, what lies outside the map left out.
static void transform_output(const WinogradConv& p, const Tile& tile, const float* products, int64_t filter) {
  const int64_t n = p.filters - filter;
  Vec columns[4][6], m[6], out[4];
  for (int j = 0; j < 6; ++j) {
    for (int i = 0; i < 6; ++i) m[i] = *reinterpret_cast<const Vec*>(products + (i * 6 + j) * p.product_stride);
    from_points(m, out);
    for (int i = 0; i < 4; ++i) columns[i][j] = out[i];
  }
  const Vec bias = p.bias ? load(p.bias + filter, n) : Vec{};
  for (int64_t i = 0; i < 4 && tile.y + i < p.out_h; ++i) {
    from_points(columns[i], out);
    for (int64_t j = 0; j < 4 && tile.x + j < p.out_w; ++j) {
      Vec v = out[j] + bias;
      if (p.residual) v += load(p.residual + p.residual_pixel(tile, i, j) * p.filters + filter, n);
      if (p.relu) v = v < 0.0f ? Vec{} : v;  // NaN stays
      store(p.output + p.output_pixel(tile, i, j) * p.filters + filter, v, n);
    }
  }
}

static void convolve_block(const WinogradConv& p, int64_t first, int64_t last, float* points, float* products) {
  const int64_t blocks = (last - first + ROWS - 1) / ROWS, chunks = (p.channels + LANES - 1) / LANES;
  const int64_t panels = (p.filters + 2 * LANES - 1) / (2 * LANES);
  for (int64_t t = 0; t < blocks * ROWS; ++t) {
    const float* pixel[36];
    p.tile_pixels(first + t, first + t < last, pixel);
    transform_input(p, pixel, points + (t / ROWS * chunks * ROWS + t % ROWS) * LANES);
  }
  for (int64_t k = 0; k < 36; ++k)
    for (int64_t panel = 0; panel < panels; ++panel)
      for (int64_t block = 0; block < blocks; ++block)
        multiply(points + k * p.point_stride + block * chunks * ROWS * LANES,
                 p.weight + (k * panels + panel) * chunks * LANES * 2 * LANES, chunks,
                 products + k * p.product_stride + (block * panels + panel) * ROWS * 2 * LANES);
  for (int64_t t = 0; t < last - first; ++t) {
    const Tile tile = p.tile(first + t);
    for (int64_t filter = 0; filter < p.filters; filter += LANES) {
      const int64_t block = t / ROWS * panels + filter / (2 * LANES);
      transform_output(p, tile, products + (block * ROWS + t % ROWS) * 2 * LANES + filter % (2 * LANES), filter);
    }
  }
}
