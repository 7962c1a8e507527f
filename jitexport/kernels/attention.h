// Attention over heads of bf16 for CPUs with AVX-512, as one kernel: norms and rotary positions of queries and keys,
// scores, softmax and product with the values.
//
// Products are of bf16 numbers, or of 8-bit numbers, which are twice as fast:
//
// - queries and keys get a scale for each token, values one for each channel; the keys' mean over the tokens is taken
//   off first, which moves all scores of a query alike (SageAttention, arXiv 2410.02367, section 4.2);
// - weights exp(score - maximum) become 0 ... 255. Rounded to the nearest, the many small weights of a row would all
//   become 0 and their sum be lost. So each key has a threshold of its own, evenly spread between 0 and 1, by which
//   weights are rounded up or down, and errors of neighbouring keys cancel.
//
// Keys and values are laid out once for all queries. Each thread then takes blocks of queries; the scores of a block
// stay in its cache. Long rows are split into chunks, and the sums of earlier chunks rescaled when the maximum grows
// (FlashAttention, arXiv 2205.14135, section 3.1).

#ifndef JITEXPORT_ATTENTION_H
#define JITEXPORT_ATTENTION_H

#include "tiles.h"

namespace jitexport {
namespace {

constexpr int64_t CHUNK = 1152;        // keys of a block's scores: 110 KB, in the second-level cache
constexpr float LOG2_TOP = 7.9937876f;  // of 254.9: with a threshold of almost 1 it is still under 256

// Heads [B, L, H, D] in bf16, and the weights [D] of their RMS norm, or none. Streams follow each other: the sequence
// is as long as all together.
struct Stream {
  const uint16_t* data;
  const uint16_t* norm;
  int64_t tokens;
};

template <class Kind, int D>
struct Attention {
  static_assert(D % GROUP == 0, "heads of a multiple of 64 channels");
  using Weight = typename Kind::Number;
  static constexpr int PACK = Kind::PACK;
  static constexpr int WORDS = D / PACK;  // 32-bit words of a row
  static constexpr bool INT8 = PACK == 4;

  int64_t batch, tokens, heads;
  float scale;             // of the scores
  float eps;               // of the norms
  const float *cos, *sin;  // [B, tokens, D / 2] of the angles that neighbours are rotated by; null for none

  const uint16_t* row(const Stream*& stream, int64_t b, int64_t h, int64_t token) const {
    while (token >= stream->tokens) token -= stream++->tokens;
    return stream->data + ((b * stream->tokens + token) * heads + h) * D;
  }

  // A query or key as attention takes it: normalised, then rotated.
  void load(const Stream* stream, int64_t b, int64_t h, int64_t token, float* to) const {
    const uint16_t* from = row(stream, b, h, token);
    __m512 x[D / LANES], squares = _mm512_setzero_ps();
#pragma GCC unroll 8
    for (int i = 0; i < D / LANES; i++) {
      x[i] = widen(from + i * LANES);
      squares = _mm512_fmadd_ps(x[i], x[i], squares);
    }
    if (stream->norm != nullptr) {
      const __m512 factor = _mm512_set1_ps(1 / std::sqrt(_mm512_reduce_add_ps(squares) / D + eps));
#pragma GCC unroll 8
      for (int i = 0; i < D / LANES; i++)
        x[i] = _mm512_mul_ps(x[i], _mm512_mul_ps(factor, widen(stream->norm + i * LANES)));
    }
    if (cos != nullptr) {
      const int64_t at = (b * tokens + token) * (D / 2);
#pragma GCC unroll 8
      for (int i = 0; i < D / LANES; i++) {  // (a, b) -> (a cos - b sin, b cos + a sin)
        const __m512 swapped = _mm512_permute_ps(x[i], 0xb1);
        x[i] = _mm512_fmaddsub_ps(x[i], twice(cos + at + i * LANES / 2),
                                  _mm512_mul_ps(swapped, twice(sin + at + i * LANES / 2)));
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < D / LANES; i++) _mm512_store_ps(to + i * LANES, x[i]);
  }

  // Each of 8 numbers twice.
  static __m512 twice(const float* from) {
    const __m512i order = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    return _mm512_permutexvar_ps(order, _mm512_castps256_ps512(_mm256_loadu_ps(from)));
  }

  // One head's keys -> words [groups of 64 keys][WORDS][64], in 8 bits as 0 ... 255 with 128 for zero; scales [keys].
  void pack_keys(const Stream* k, int64_t b, int64_t h, int64_t padded, int32_t* words, float* scales) const {
    alignas(64) float x[D], mean[D] = {};
    if (INT8) {
      for (int64_t j = 0; j < tokens; j++) {
        load(k, b, h, j, x);
        for (int c = 0; c < D; c++) mean[c] += x[c];
      }
      for (int c = 0; c < D; c++) mean[c] /= tokens;
    }
    alignas(64) int32_t line[WORDS];
    for (int64_t j = 0; j < padded; j++) {
      load(k, b, h, std::min(j, tokens - 1), x);  // padding must not raise a maximum
      if (INT8) {
        for (int c = 0; c < D; c++) x[c] -= mean[c];
        scales[j] = quantize_row([&](int64_t c) { return _mm512_load_ps(x + c); }, D, 128, line);
      } else {
        narrow(x, line);
      }
      int32_t* to = words + j / GROUP * WORDS * GROUP + j % GROUP;
      for (int w = 0; w < WORDS; w++) to[w * GROUP] = line[w];
    }
  }

  // One head's values -> words [keys / PACK][D]; scales [D].
  void pack_values(const Stream* v, int64_t b, int64_t h, int64_t padded, int32_t* words, float* scales) const {
    alignas(64) float top[D], inverse[D];
    if (INT8) {
      std::fill_n(top, D, 1e-12f);
      for (int64_t j = 0; j < tokens; j++) {
        const Stream* stream = v;
        const uint16_t* from = row(stream, b, h, j);
        for (int c = 0; c < D; c += LANES)
          _mm512_store_ps(top + c, _mm512_max_ps(_mm512_load_ps(top + c), _mm512_abs_ps(widen(from + c))));
      }
      for (int c = 0; c < D; c++) {
        scales[c] = top[c] / 127;
        inverse[c] = 127 / top[c];
      }
    }
    for (int64_t j = 0; j < padded; j += PACK) {
      __m512i word[D / LANES] = {};
      for (int i = 0; i < PACK && j + i < tokens; i++) {
        const Stream* stream = v;
        const uint16_t* from = row(stream, b, h, j + i);
#pragma GCC unroll 8
        for (int c = 0; c < D / LANES; c++) {
          __m512i n;
          if (INT8) {
            n = _mm512_cvtps_epi32(_mm512_mul_ps(widen(from + c * LANES), _mm512_load_ps(inverse + c * LANES)));
            n = _mm512_and_si512(n, _mm512_set1_epi32(255));
          } else {
            n = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + c * LANES)));
          }
          word[c] = _mm512_or_si512(word[c], _mm512_slli_epi32(n, i * 32 / PACK));
        }
      }
#pragma GCC unroll 8
      for (int c = 0; c < D / LANES; c++) _mm512_store_si512(words + j / PACK * D + c * LANES, word[c]);
    }
  }

  // A block of queries -> words [BLOCK][WORDS], their scales, and the sums of their 8-bit numbers.
  void pack_queries(
      const Stream* q, int64_t b, int64_t h, int64_t first, int64_t count, int32_t* words, float* scales,
      int32_t* sums) const {
    alignas(64) float x[D] = {};
    for (int64_t r = 0; r < BLOCK; r++) {
      scales[r] = 1;
      sums[r] = 0;
      if (r < count)
        load(q, b, h, first + r, x);
      else
        std::fill_n(x, D, 0.f);
      if (INT8)
        scales[r] = quantize_row([&](int64_t c) { return _mm512_load_ps(x + c); }, D, 0, words + r * WORDS, sums + r);
      else
        narrow(x, words + r * WORDS);
    }
  }

  static void narrow(const float* x, int32_t* bf16) {
    for (int c = 0; c < D; c += LANES) store_bf16(reinterpret_cast<uint16_t*>(bf16) + c, _mm512_load_ps(x + c));
  }

  // Scores of ROWS queries and GROUP keys, without the queries' scales -> out [ROWS][stride], and their maxima.
  __attribute__((noinline)) static void score(
      const int32_t* queries, const int32_t* sums, const int32_t* keys, const float* scales, int64_t stride,
      float* out, __m512* top) {
    typename Kind::Sum sum[ROWS][WIDE];
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
      for (int w = 0; w < WIDE; w++) sum[r][w] = Kind::start(-128 * sums[r]);  // keys are 128 too large
    multiply<Kind, true>(sum, queries, WORDS, keys, GROUP, WORDS);
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++) {
      __m512 most = top[r];
#pragma GCC unroll 4
      for (int w = 0; w < WIDE; w++) {
        __m512 x = Kind::real(sum[r][w]);
        if (INT8) x = _mm512_mul_ps(x, _mm512_loadu_ps(scales + w * LANES));
        _mm512_store_ps(out + r * stride + w * LANES, x);
        most = _mm512_max_ps(most, x);
      }
      top[r] = most;
    }
  }

  // 16 weights, those of a mask, others 0; added to their sum.
  static void weigh16(
      __mmask16 real, __m512 exponent, const float* thresholds, typename Kind::Sum& sum, Weight* weights) {
    const __m512 weight = power_of_two(exponent);
    if constexpr (INT8) {
      const __m512i n = _mm512_maskz_cvttps_epi32(real, _mm512_add_ps(weight, _mm512_loadu_ps(thresholds)));
      store_int8(weights, n);
      sum = _mm512_add_epi32(sum, n);
    } else {
      const __m512 kept = _mm512_maskz_mov_ps(real, weight);
      store_bf16(weights, kept);
      sum = _mm512_add_ps(sum, kept);
    }
  }

  // weights [count] = 2^(factor scores - shift) up to key `valid`, 0 from there; returns their sum.
  __attribute__((noinline)) static float weigh(
      const float* scores, int64_t count, int64_t valid, float factor, float shift, const float* thresholds,
      Weight* weights) {
    const __m512 a = _mm512_set1_ps(factor), b = _mm512_set1_ps(shift);
    typename Kind::Sum sum = Kind::start(0);
    int64_t j = 0;
    for (; j + LANES <= std::min(count, valid); j += LANES)
      weigh16(0xffff, _mm512_fmsub_ps(_mm512_load_ps(scores + j), a, b), thresholds + j, sum, weights + j);
    for (; j < count; j += LANES) {
      const __mmask16 real = valid > j ? (1u << (valid - j)) - 1 : 0;
      weigh16(real, _mm512_fmsub_ps(_mm512_load_ps(scores + j), a, b), thresholds + j, sum, weights + j);
    }
    if constexpr (INT8)
      return _mm512_reduce_add_epi32(sum);
    else
      return _mm512_reduce_add_ps(sum);
  }

  // out [ROWS][D] = keep * out + weights [ROWS][stride] @ values, over `count` keys.
  __attribute__((noinline)) static void product(
      const Weight* weights, int64_t stride, const int32_t* values, const float* scales, int64_t count,
      const float* keep, float* out) {
    for (int c = 0; c < D; c += GROUP) {
      typename Kind::Sum sum[ROWS][WIDE];
#pragma GCC unroll 6
      for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int w = 0; w < WIDE; w++) sum[r][w] = Kind::start(0);
      multiply<Kind>(sum, weights, stride / PACK, values + c, D, count / PACK);
#pragma GCC unroll 6
      for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int w = 0; w < WIDE; w++) {
          float* to = out + r * D + c + w * LANES;
          __m512 x = Kind::real(sum[r][w]);
          if (INT8) x = _mm512_mul_ps(x, _mm512_loadu_ps(scales + c + w * LANES));
          _mm512_store_ps(to, _mm512_fmadd_ps(_mm512_load_ps(to), _mm512_set1_ps(keep[r]), x));
        }
    }
  }

  // out [B, tokens, H, D] = softmax(scale q k^T) v, of queries, keys and values in streams of the same lengths.
  void run(const Stream* q, const Stream* k, const Stream* v, uint16_t* out, int threads) const {
    constexpr float LOWEST = -std::numeric_limits<float>::infinity();
    const int64_t padded = divide_up(tokens, GROUP) * GROUP;
    const int64_t chunk = divide_up(divide_up(padded, divide_up(padded, CHUNK)), GROUP) * GROUP;
    const int64_t all = batch * heads, blocks = divide_up(tokens, BLOCK);
    const int64_t size = padded * WORDS;  // of a head's keys, and of its values
    const auto keys = buffer<int32_t>(all * size), values = buffer<int32_t>(all * size);
    const auto key_scales = buffer<float>(all * padded), value_scales = buffer<float>(all * D);
    const auto thresholds = buffer<float>(chunk + BLOCK);
    for (int64_t j = 0; j < chunk + BLOCK; j++)  // multiples of the golden ratio, without their whole parts
      thresholds[j] = static_cast<uint32_t>(j * 2654435769u) * 0x1p-32f * 0.999f;
    const auto scores = buffer<float>(threads * BLOCK * chunk);
    const auto weights = buffer<Weight>(threads * BLOCK * chunk);

#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < 2 * all; i++) {
        const int64_t n = i / 2, b = n / heads, h = n % heads;
        if (i % 2 == 0)
          pack_keys(k, b, h, padded, keys.get() + n * size, key_scales.get() + n * padded);
        else
          pack_values(v, b, h, padded, values.get() + n * size, value_scales.get() + n * D);
      }
      float* const s = scores.get() + omp_get_thread_num() * BLOCK * chunk;
      Weight* const p = weights.get() + omp_get_thread_num() * BLOCK * chunk;
      alignas(64) int32_t queries[BLOCK * WORDS];
      alignas(64) float result[BLOCK * D];
      float query_scales[BLOCK], sum[BLOCK], most[BLOCK], keep[BLOCK];
      int32_t query_sums[BLOCK];
      __m512 top[BLOCK];
#pragma omp for schedule(static)
      for (int64_t i = 0; i < all * blocks; i++) {
        const int64_t n = i / blocks, b = n / heads, h = n % heads, first = i % blocks * BLOCK;
        const int64_t count = std::min<int64_t>(BLOCK, tokens - first);
        pack_queries(q, b, h, first, count, queries, query_scales, query_sums);
        std::fill_n(result, BLOCK * D, 0.f);
        std::fill_n(sum, BLOCK, 0.f);
        std::fill_n(most, BLOCK, LOWEST);
        for (int64_t from = 0; from < padded; from += chunk) {
          const int64_t width = std::min(chunk, padded - from);
          std::fill_n(top, BLOCK, _mm512_set1_ps(LOWEST));
          for (int64_t g = 0; g < width; g += GROUP)
            for (int r = 0; r < BLOCK; r += ROWS)
              score(queries + r * WORDS, query_sums + r, keys.get() + n * size + (from + g) * WORDS,
                    key_scales.get() + n * padded + from + g, chunk, s + r * chunk + g, top + r);
          for (int r = 0; r < BLOCK; r++) {
            const float factor = query_scales[r] * scale * LOG2_E;
            const float now = std::max(most[r], _mm512_reduce_max_ps(top[r]) * factor);
            keep[r] = std::exp2(most[r] - now);
            most[r] = now;
            sum[r] = sum[r] * keep[r] + weigh(s + r * chunk, width, tokens - from, factor,
                                              INT8 ? now - LOG2_TOP : now, thresholds.get() + r, p + r * chunk);
          }
          for (int r = 0; r < BLOCK; r += ROWS)
            product(p + r * chunk, chunk, values.get() + n * size + from * WORDS, value_scales.get() + n * D, width,
                    keep + r, result + r * D);
        }
        for (int r = 0; r < count; r++)
          for (int c = 0; c < D; c += LANES)
            store_bf16(out + ((b * tokens + first + r) * heads + h) * D + c,
                       _mm512_div_ps(_mm512_load_ps(result + r * D + c), _mm512_set1_ps(sum[r])));
      }
    }
  }
};

}  // namespace
}  // namespace jitexport

#endif
