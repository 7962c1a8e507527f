// Attention over heads of bf16 for CPUs with AVX-512, as one kernel: scores, softmax and product with the values.
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

// Heads [B, L, H, D] in bf16, one after the other.
struct Heads {
  const uint16_t* data;
  int64_t tokens, heads, channels;
  const uint16_t* row(int64_t batch, int64_t head, int64_t token) const {
    return data + ((batch * tokens + token) * heads + head) * channels;
  }
};

template <class Kind, int D>
struct Attention {
  static_assert(D % GROUP == 0, "heads of a multiple of 64 channels");
  using Weight = typename Kind::Number;
  static constexpr int PACK = Kind::PACK;
  static constexpr int WORDS = D / PACK;  // 32-bit words of a row
  static constexpr bool INT8 = PACK == 4;

  // One head's keys -> words [groups of 64 keys][WORDS][64], in 8 bits as 0 ... 255 with 128 for zero; scales [keys].
  static void pack_keys(const Heads& k, int64_t batch, int64_t head, int64_t padded, int32_t* words, float* scales) {
    alignas(64) float mean[D];
    if (INT8) {
      for (int c = 0; c < D; c += LANES) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t j = 0; j < k.tokens; j++) sum = _mm512_add_ps(sum, widen(k.row(batch, head, j) + c));
        _mm512_store_ps(mean + c, _mm512_div_ps(sum, _mm512_set1_ps(k.tokens)));
      }
    }
    alignas(64) int32_t line[WORDS];
    for (int64_t j = 0; j < padded; j++) {
      const uint16_t* row = k.row(batch, head, std::min(j, k.tokens - 1));  // padding must not raise a maximum
      if (INT8)
        scales[j] = quantize_row(row, mean, D, 128, line);
      else
        std::memcpy(line, row, sizeof line);
      int32_t* to = words + j / GROUP * WORDS * GROUP + j % GROUP;
      for (int w = 0; w < WORDS; w++) to[w * GROUP] = line[w];
    }
  }

  // One head's values -> words [keys / PACK][D]; scales [D].
  static void pack_values(const Heads& v, int64_t batch, int64_t head, int64_t padded, int32_t* words, float* scales) {
    alignas(64) float inverse[D];
    if (INT8) {
      for (int c = 0; c < D; c += LANES) {
        __m512 top = _mm512_set1_ps(1e-12f);
        for (int64_t j = 0; j < v.tokens; j++)
          top = _mm512_max_ps(top, _mm512_abs_ps(widen(v.row(batch, head, j) + c)));
        _mm512_storeu_ps(scales + c, _mm512_div_ps(top, _mm512_set1_ps(127)));
        _mm512_store_ps(inverse + c, _mm512_div_ps(_mm512_set1_ps(127), top));
      }
    }
    for (int64_t j = 0; j < padded; j += PACK)
      for (int c = 0; c < D; c += LANES) {
        __m512i word = _mm512_setzero_si512();
        for (int i = 0; i < PACK && j + i < v.tokens; i++) {
          const uint16_t* from = v.row(batch, head, j + i) + c;
          __m512i n;
          if (INT8) {
            n = _mm512_cvtps_epi32(_mm512_mul_ps(widen(from), _mm512_load_ps(inverse + c)));
            n = _mm512_and_si512(n, _mm512_set1_epi32(255));
          } else {
            n = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
          }
          word = _mm512_or_si512(word, _mm512_slli_epi32(n, i * 32 / PACK));
        }
        _mm512_store_si512(words + j / PACK * D + c, word);
      }
  }

  // A block of queries -> words [BLOCK][WORDS], their scales, and the sums of their 8-bit numbers.
  static void pack_queries(
      const Heads& q, int64_t batch, int64_t head, int64_t first, int64_t count, int32_t* words, float* scales,
      int32_t* sums) {
    for (int64_t r = 0; r < BLOCK; r++) {
      scales[r] = 1;
      sums[r] = 0;
      if (r >= count)
        std::memset(words + r * WORDS, 0, WORDS * sizeof *words);
      else if (INT8)
        scales[r] = quantize_row(q.row(batch, head, first + r), nullptr, D, 0, words + r * WORDS, sums + r);
      else
        std::memcpy(words + r * WORDS, q.row(batch, head, first + r), WORDS * sizeof *words);
    }
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
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
      for (int w = 0; w < WIDE; w++) {
        __m512 x = Kind::real(sum[r][w]);
        if (INT8) x = _mm512_mul_ps(x, _mm512_loadu_ps(scales + w * LANES));
        _mm512_store_ps(out + r * stride + w * LANES, x);
        top[r] = _mm512_max_ps(top[r], x);
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

  // out [B, L, H, D] = softmax(scale q k^T) v.
  static void run(
      const Heads& q, const Heads& k, const Heads& v, uint16_t* out, int64_t batch, float scale, int threads) {
    constexpr float LOWEST = -std::numeric_limits<float>::infinity();
    const int64_t padded = divide_up(k.tokens, GROUP) * GROUP;
    const int64_t chunk = divide_up(divide_up(padded, divide_up(padded, CHUNK)), GROUP) * GROUP;
    const int64_t heads = batch * q.heads, blocks = divide_up(q.tokens, BLOCK);
    const int64_t size = padded * WORDS;  // of a head's keys, and of its values
    const auto keys = buffer<int32_t>(heads * size), values = buffer<int32_t>(heads * size);
    const auto key_scales = buffer<float>(heads * padded), value_scales = buffer<float>(heads * D);
    const auto thresholds = buffer<float>(chunk + BLOCK);
    for (int64_t j = 0; j < chunk + BLOCK; j++)  // multiples of the golden ratio, without their whole parts
      thresholds[j] = static_cast<uint32_t>(j * 2654435769u) * 0x1p-32f * 0.999f;
    const auto scores = buffer<float>(threads * BLOCK * chunk);
    const auto weights = buffer<Weight>(threads * BLOCK * chunk);

#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < 2 * heads; i++) {
        const int64_t n = i / 2, b = n / q.heads, h = n % q.heads;
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
      for (int64_t i = 0; i < heads * blocks; i++) {
        const int64_t n = i / blocks, b = n / q.heads, h = n % q.heads, first = i % blocks * BLOCK;
        const int64_t count = std::min<int64_t>(BLOCK, q.tokens - first);
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
            sum[r] = sum[r] * keep[r] + weigh(s + r * chunk, width, k.tokens - from, factor,
                                              INT8 ? now - LOG2_TOP : now, thresholds.get() + r, p + r * chunk);
          }
          for (int r = 0; r < BLOCK; r += ROWS)
            product(p + r * chunk, chunk, values.get() + n * size + from * WORDS, value_scales.get() + n * D, width,
                    keep + r, result + r * D);
        }
        for (int r = 0; r < count; r++)
          for (int c = 0; c < D; c += LANES)
            store_bf16(out + ((b * q.tokens + first + r) * q.heads + h) * D + c,
                       _mm512_div_ps(_mm512_load_ps(result + r * D + c), _mm512_set1_ps(sum[r])));
      }
    }
  }
};

}  // namespace
}  // namespace jitexport

#endif
