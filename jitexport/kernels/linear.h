// Linear layers for CPUs with AVX-512, of bf16 or 8-bit weights: activations are quantized where weights are,
// multiplied, scaled, and go through the activation function before they reach memory. They may lie in several
// buffers, each with some of the columns.

#ifndef JITEXPORT_LINEAR_H
#define JITEXPORT_LINEAR_H

#include <type_traits>

#include "tiles.h"

namespace jitexport {
namespace {

// x / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3): GELU by the tanh approximation, to 1e-4 like the exponential.
inline __m512 gelu(__m512 x) {
  const __m512 cubic = _mm512_fmadd_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(0.044715f), _mm512_set1_ps(1));
  const __m512 u = _mm512_mul_ps(_mm512_mul_ps(x, cubic), _mm512_set1_ps(-2 * 0.7978845608f * LOG2_E));
  return _mm512_mul_ps(x, _mm512_rcp14_ps(_mm512_add_ps(_mm512_set1_ps(1), power_of_two(u))));
}

inline void store(uint16_t* to, __m512 x) { store_bf16(to, x); }
inline void store(float* to, __m512 x) { _mm512_storeu_ps(to, x); }

// 16 x 16 words.
inline void transpose(__m512i (&x)[LANES]) {
  __m512i y[LANES];
  for (int i = 0; i < LANES; i += 2) {  // pairs of words
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < LANES; i += 4) {  // squares of four
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
  for (int i = 0; i < 4; i++) {  // squares of squares
    const __m512i a = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88), b = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
    const __m512i c = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd), d = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
    y[i] = _mm512_shuffle_i32x4(a, b, 0x88);
    y[i + 4] = _mm512_shuffle_i32x4(c, d, 0x88);
    y[i + 8] = _mm512_shuffle_i32x4(a, b, 0xdd);
    y[i + 12] = _mm512_shuffle_i32x4(c, d, 0xdd);
  }
  for (int i = 0; i < LANES; i++) x[i] = y[i];
}

// Columns of the activations: [rows, inputs] in bf16. Inputs and outputs come in multiples of GROUP.
struct Part {
  const uint16_t* data;
  int64_t inputs;
};

template <class Kind, bool GELU, class Out>
struct Linear {
  static constexpr bool INT8 = Kind::PACK == 4;
  using Weight = std::conditional_t<INT8, int8_t, uint16_t>;
  int64_t rows, inputs, outputs;
  int64_t words = inputs / Kind::PACK;

  // GROUP rows of the weights [outputs, inputs] -> packed [words][GROUP]; starts of the sums: in 8 bits -128 times each
  // row's sum, because activations are 128 too large.
  void pack(const Weight* weight, int32_t* packed, int32_t* starts) const {
    for (int n = 0; n < GROUP; n += LANES) {
      __m512i sums = _mm512_setzero_si512();
      for (int64_t w = 0; w < words; w += LANES) {
        __m512i square[LANES];
        for (int i = 0; i < LANES; i++) square[i] = _mm512_loadu_si512(weight + (n + i) * inputs + w * Kind::PACK);
        transpose(square);
        for (int i = 0; i < LANES; i++) {
          if constexpr (INT8) Kind::add(sums, _mm512_set1_epi8(1), square[i]);
          _mm512_store_si512(packed + (w + i) * GROUP + n, square[i]);
        }
      }
      _mm512_store_si512(starts + n, _mm512_mullo_epi32(sums, _mm512_set1_epi32(-128)));
    }
  }

  // A row of the activations -> words; its scale.
  float pack_row(const Part* x, int64_t row, int32_t* to) const {
    if constexpr (INT8) {
      const auto number = [&](int64_t c) {
        const Part* part = x;
        while (c >= part->inputs) c -= part++->inputs;
        return widen(part->data + row * part->inputs + c);
      };
      return quantize_row(number, inputs, 128, to);
    } else {
      for (int64_t done = 0; done < inputs; done += x++->inputs)
        std::memcpy(reinterpret_cast<uint16_t*>(to) + done, x->data + row * x->inputs, x->inputs * sizeof *x->data);
      return 1;
    }
  }

  // ROWS rows of the block, of which `count` exist, and GROUP columns.
  __attribute__((noinline)) void tile(
      const int32_t* numbers, const float* scales, const int32_t* packed, const int32_t* starts,
      const float* weight_scales, const uint16_t* bias, int64_t count, Out* out) const {
    typename Kind::Sum sum[ROWS][WIDE];
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
      for (int w = 0; w < WIDE; w++) {
        if constexpr (INT8)
          sum[r][w] = _mm512_load_si512(starts + w * LANES);
        else
          sum[r][w] = Kind::start(0);
      }
    multiply<Kind>(sum, numbers, words, packed, GROUP, words);
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++) {
      if (r >= count) break;
#pragma GCC unroll 4
      for (int w = 0; w < WIDE; w++) {
        __m512 y = Kind::real(sum[r][w]);
        if (INT8) {
          const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(scales[r]), _mm512_loadu_ps(weight_scales + w * LANES));
          y = _mm512_mul_ps(y, scale);
        }
        if (bias != nullptr) y = _mm512_add_ps(y, widen(bias + w * LANES));
        store(out + r * outputs + w * LANES, GELU ? gelu(y) : y);
      }
    }
  }

  // out [rows, outputs] = act(x [rows, inputs] weight^T * weight_scales + bias), x in parts side by side; scales in 8
  // bits only.
  void run(
      const Part* x, const Weight* weight, const float* weight_scales, const uint16_t* bias, Out* out,
      int threads) const {
    const int64_t groups = outputs / GROUP, blocks = divide_up(rows, BLOCK);
    const auto packed = buffer<int32_t>(outputs * words), starts = buffer<int32_t>(outputs);
    const auto numbers = buffer<int32_t>(threads * BLOCK * words);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
      for (int64_t g = 0; g < groups; g++)
        pack(weight + g * GROUP * inputs, packed.get() + g * GROUP * words, starts.get() + g * GROUP);
      int32_t* const block = numbers.get() + omp_get_thread_num() * BLOCK * words;
      float scales[BLOCK];
#pragma omp for schedule(static)
      for (int64_t i = 0; i < blocks; i++) {
        const int64_t first = i * BLOCK, count = std::min<int64_t>(BLOCK, rows - first);
        for (int64_t r = 0; r < BLOCK; r++)
          scales[r] = pack_row(x, first + std::min(r, count - 1), block + r * words);
        for (int64_t g = 0; g < groups; g++)
          for (int r = 0; r < count; r += ROWS)
            tile(block + r * words, scales + r, packed.get() + g * GROUP * words, starts.get() + g * GROUP,
                 INT8 ? weight_scales + g * GROUP : nullptr, bias == nullptr ? nullptr : bias + g * GROUP, count - r,
                 out + (first + r) * outputs + g * GROUP);
      }
    }
  }
};

}  // namespace
}  // namespace jitexport

#endif
