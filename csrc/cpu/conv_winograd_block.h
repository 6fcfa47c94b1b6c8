// A block of tiles of a Winograd convolution, ROWS tiles x 2 vectors of filters in registers. conv_winograd.cpp includes this
// once for each instruction set, behind conv_winograd_lanes.h.

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
  const int64_t blocks = (last - first + ROWS - 1) / ROWS, chunks = (p.input.channels + LANES - 1) / LANES;
  const int64_t panels = (p.filters + 2 * LANES - 1) / (2 * LANES);
  for (int64_t t = 0; t < blocks * ROWS; ++t) {
    const float* pixel[36];
    const Tile tile = p.tiles.at(first + t);
    p.input.window<6>(tile.image, tile.y - p.padding_h, tile.x - p.padding_w, first + t < last, pixel);
    float* const row = points + (t / ROWS * chunks * ROWS + t % ROWS) * LANES;
    transform_input(pixel, p.input.channels, row, ROWS * LANES, p.point_stride);
  }
  for (int64_t k = 0; k < 36; ++k)
    for (int64_t panel = 0; panel < panels; ++panel)
      for (int64_t block = 0; block < blocks; ++block)
        multiply(points + k * p.point_stride + block * chunks * ROWS * LANES,
                 p.weight + (k * panels + panel) * chunks * LANES * 2 * LANES, chunks,
                 products + k * p.product_stride + (block * panels + panel) * ROWS * 2 * LANES);
  for (int64_t t = 0; t < last - first; ++t) {
    const Tile tile = p.tiles.at(first + t);
    for (int64_t filter = 0; filter < p.filters; filter += LANES) {
      const int64_t block = t / ROWS * panels + filter / (2 * LANES);
      transform_output(p, tile, products + (block * ROWS + t % ROWS) * 2 * LANES + filter % (2 * LANES), filter);
    }
  }
}
