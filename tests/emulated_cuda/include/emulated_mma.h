// The tensor cores' instructions as the PTX manual defines them; the functions of csrc/cuda/mma.cuh call these.
#pragma once

namespace emulated {

// A lane reads its own row before any lane gets on: what a lane writes afterwards is not seen.
inline void load_matrices(unsigned (&r)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) fail("ldmatrix from an address that is not a multiple of 16");
  LaneValue mine;
  memcpy(&mine, row, 16);
  const Given<const void*> addresses(~0u, row);
  if (lane() % 8 == 0) {  // a matrix is read at once where its rows lie in different groups of four banks
    unsigned groups = 0;
    for (int i = 0; i < 8; ++i) groups |= 1u << reinterpret_cast<uintptr_t>(addresses[lane() + i]) / 16 % 8;
    count_conflicts(8 - std::popcount(groups));
  }
  const Given<LaneValue> rows(~0u, mine);
  for (int i = 0; i < 4; ++i) {
    unsigned words[4];
    const LaneValue of = rows[8 * i + lane() / 4];
    memcpy(words, &of, 16);
    r[i] = words[lane() % 4];
  }
}

// The numbers of 8 words, in double: 16 of half precision, or 8 of TF32, of whose low 13 bits the card knows nothing.
template <class F>
void numbers(double (&out)[32 / sizeof(F)], const unsigned (&words)[8]) {
  unsigned kept[8];
  for (int i = 0; i < 8; ++i) kept[i] = sizeof(F) == 4 ? words[i] & 0xffffe000u : words[i];
  F values[32 / sizeof(F)];
  memcpy(values, kept, 32);
  for (size_t i = 0; i < 32 / sizeof(F); ++i) out[i] = static_cast<float>(values[i]);
}

// The sum of exact products, cut towards zero to a float, as the cards do ("Numerical behavior of NVIDIA tensor cores",
// Fasi et al. 2021; their few guard bits are not modelled).
template <class F>
void multiply_add(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  struct Words {
    unsigned w[4];
  };
  struct Pair {
    unsigned w[2];
  };
  const Given<Words> of_a(~0u, {{a[0], a[1], a[2], a[3]}});
  const int g = lane() / 4, t = lane() % 4;
  constexpr int kDepth = 32 / sizeof(F);
  double row[2][kDepth], column[2][kDepth];
  for (int half = 0; half < 2; ++half) {
    unsigned words[8];
    for (int w = 0; w < 8; ++w) words[w] = of_a[4 * g + w % 4].w[half + 2 * (w / 4)];
    numbers<F>(row[half], words);
  }
  const Given<Pair> of_b(~0u, {{b[0], b[1]}});
  for (int j = 0; j < 2; ++j) {
    unsigned words[8];
    for (int w = 0; w < 8; ++w) words[w] = of_b[4 * (2 * t + j) + w % 4].w[w / 4];
    numbers<F>(column[j], words);
  }
  for (int i = 0; i < 4; ++i) {
    double sum = c[i];
    for (int k = 0; k < kDepth; ++k) sum += row[i / 2][k] * column[i % 2][k];
    c[i] = static_cast<float>(sum);
    if (std::isfinite(c[i]) && std::abs(static_cast<double>(c[i])) > std::abs(sum)) c[i] = std::nextafter(c[i], 0.f);
  }
}

inline unsigned round_to_tf32(float x) {
  const unsigned bits = std::bit_cast<unsigned>(x);
  return std::isfinite(x) ? (bits + 0x1000u) & 0xffffe000u : bits;
}

}  // namespace emulated
