// Attention as one kernel: norms and rotary positions of queries and keys, scores, softmax and product with the values.
//
// Products are of fp32 or bf16 numbers, or of whole ones (8 bits, or 10 bits and a sign: see tiles.h), which are faster:
//
// - queries and keys get a scale for each token, values one for each channel; the keys' mean over the tokens is taken
//   off first, which moves all scores of a query alike (SageAttention, arXiv 2410.02367, section 4.2);
// - weights exp(score - maximum) become whole numbers up to WEIGHT_TOP. Rounded to the nearest, the many small weights of a row would all
//   become 0 and their sum be lost. So each key has a threshold of its own, evenly spread between 0 and 1, by which
//   weights are rounded up or down, and errors of neighbouring keys cancel.
//
// Keys and values are laid out once for all queries. Each thread then takes blocks of queries; the scores of a block
// stay in its cache. Long rows are split into chunks, and the sums of earlier chunks rescaled when the maximum grows
// (FlashAttention, arXiv 2205.14135, section 3.1). A mask is added to a block's scores in a pass of its own. Of a chunk
// whose keys are all hidden, weights are relative to a maximum far below, and vanish with the first key that counts.

#ifndef JITEXPORT_ATTENTION_H
#define JITEXPORT_ATTENTION_H

#include "tiles.h"

namespace jitexport {
namespace {

constexpr int64_t CHUNK = 1152;  // keys of a block's scores: 110 KB, in the second-level cache
constexpr float LOWEST = -std::numeric_limits<float>::infinity();
constexpr float LOWEST_BIAS = -1e38f;  // of a mask: with any score, and times log2(e), still a number

// Heads [B, L, H, D], and the weights [D] of their RMS norm, or none. Streams follow each other: the sequence is as long
// as all together.
template <class Number>
struct Stream {
  const Number* data;
  const Number* norm;
  int64_t tokens;
};

// Kind: of the products. Number: of queries, keys, values and result.
template <class Kind, class Number, int D>
struct Attention {
  static_assert(D % 64 == 0, "heads of a multiple of 64 channels");
  using Weight = typename Kind::Number;
  using Streams = const Stream<Number>*;
  static constexpr int PACK = Kind::PACK;
  static constexpr int WORDS = D / PACK;  // 32-bit words of a row
  static constexpr bool QUANTIZED = Kind::QUANTIZED;

  int64_t batch, tokens, heads;
  float scale;             // of the scores
  float eps;               // of the norms
  const float *cos, *sin;  // [B, rotated, D / 2] of the angles that neighbours are rotated by
  int64_t rotated;         // tokens, the first ones; 0 for none
  const float* mask;       // [B, tokens], added to the scores of keys; null for none

  const Number* row(Streams& stream, int64_t b, int64_t h, int64_t token) const {
    while (token >= stream->tokens) token -= stream++->tokens;
    return stream->data + ((b * stream->tokens + token) * heads + h) * D;
  }

  // A query or key as attention takes it: normalised, then rotated.
  void ready(Streams stream, int64_t b, int64_t h, int64_t token, float* to) const {
    const Number* from = row(stream, b, h, token);
    Floats x[D / LANES], squares = all(0.f);
#pragma GCC unroll 8
    for (int i = 0; i < D / LANES; i++) {
      x[i] = load(from + i * LANES);
      squares = multiply_add(x[i], x[i], squares);
    }
    if (stream->norm != nullptr) {
      const Floats factor = all(1 / std::sqrt(sum_of(squares) / D + eps));
#pragma GCC unroll 8
      for (int i = 0; i < D / LANES; i++)
        x[i] = x[i] * (factor * load(stream->norm + i * LANES));
    }
    if (token < rotated) {
      const int64_t at = (b * rotated + token) * (D / 2);
#pragma GCC unroll 8
      for (int i = 0; i < D / LANES; i++) {  // (a, b) -> (a cos - b sin, b cos + a sin)
        const Floats across = swap_pairs(x[i]) * twice(sin + at + i * LANES / 2);
        x[i] = multiply_alternate(x[i], twice(cos + at + i * LANES / 2), across);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < D / LANES; i++) store(to + i * LANES, x[i]);
  }

  // One head's keys -> words [groups of keys][WORDS][GROUP], quantized ones OFFSET too large; scales [keys].
  void pack_keys(Streams k, int64_t b, int64_t h, int64_t padded, int32_t* words, float* scales) const {
    alignas(64) float x[D], mean[D] = {};
    if constexpr (QUANTIZED) {
      for (int64_t j = 0; j < tokens; j++) {
        ready(k, b, h, j, x);
        for (int c = 0; c < D; c++) mean[c] += x[c];
      }
      for (int c = 0; c < D; c++) mean[c] /= tokens;
    }
    alignas(64) int32_t line[WORDS];
    for (int64_t j = 0; j < padded; j++) {
      ready(k, b, h, std::min(j, tokens - 1), x);  // padding must not raise a maximum
      if constexpr (QUANTIZED) {
        for (int c = 0; c < D; c++) x[c] -= mean[c];
        scales[j] = quantize_row<Kind>([&](int64_t c) { return load(x + c); }, D, Kind::OFFSET, line);
      } else {
        narrow(x, line);
      }
      int32_t* to = words + j / GROUP * WORDS * GROUP + j % GROUP;
      for (int w = 0; w < WORDS; w++) to[w * GROUP] = line[w];
    }
  }

  // One head's values -> words [keys / PACK][D]; scales [D].
  void pack_values(Streams v, int64_t b, int64_t h, int64_t padded, int32_t* words, float* scales) const {
    alignas(64) float top[D], inverse[D];
    if constexpr (QUANTIZED) {
      std::fill_n(top, D, 1e-12f);
      for (int64_t j = 0; j < tokens; j++) {
        Streams stream = v;
        const Number* from = row(stream, b, h, j);
        for (int c = 0; c < D; c += LANES) store(top + c, most(load(top + c), magnitude(load(from + c))));
      }
      for (int c = 0; c < D; c++) {
        scales[c] = top[c] / Kind::TOP;
        inverse[c] = Kind::TOP / top[c];
      }
    }
    for (int64_t j = 0; j < padded; j += PACK) {
      Ints word[D / LANES] = {};
      for (int i = 0; i < PACK && j + i < tokens; i++) {
        Streams stream = v;
        const Number* from = row(stream, b, h, j + i);
#pragma GCC unroll 8
        for (int c = 0; c < D / LANES; c++) {
          const Floats x = load(from + c * LANES);
          Ints n = as_ints(x);
          if constexpr (QUANTIZED)
            n = both(nearest(x * load(inverse + c * LANES)), all(PACK == 4 ? 0xff : 0xffff));
          else if constexpr (PACK == 2)
            n = down(n, 16);
          word[c] = either(word[c], up(n, i * 32 / PACK));
        }
      }
#pragma GCC unroll 8
      for (int c = 0; c < D / LANES; c++) store_words(words + j / PACK * D + c * LANES, word[c]);
    }
  }

  // A block of queries -> words [BLOCK][WORDS], their scales, and the sums of their 8-bit numbers.
  void pack_queries(
      Streams q, int64_t b, int64_t h, int64_t first, int64_t count, int32_t* words, float* scales,
      int32_t* sums) const {
    alignas(64) float x[D] = {};
    for (int64_t r = 0; r < BLOCK; r++) {
      scales[r] = 1;
      sums[r] = 0;
      if (r < count)
        ready(q, b, h, first + r, x);
      else
        std::fill_n(x, D, 0.f);
      if constexpr (QUANTIZED)
        scales[r] = quantize_row<Kind>([&](int64_t c) { return load(x + c); }, D, 0, words + r * WORDS, sums + r);
      else
        narrow(x, words + r * WORDS);
    }
  }

  static void narrow(const float* x, int32_t* words) {
    for (int c = 0; c < D; c += LANES) store(reinterpret_cast<Weight*>(words) + c, load(x + c));
  }

  // Scores of ROWS queries and GROUP keys, without the queries' scales -> out [ROWS][stride], and their maxima.
  __attribute__((noinline)) static void score(
      const int32_t* queries, const int32_t* sums, const int32_t* keys, const float* scales, int64_t stride,
      float* out, Floats* top) {
    typename Kind::Sum sum[ROWS][WIDE];
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
      for (int w = 0; w < WIDE; w++) sum[r][w] = Kind::start(-Kind::OFFSET * sums[r]);  // keys are that too large
    multiply<Kind, true>(sum, queries, WORDS, keys, GROUP, WORDS);
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++) {
      Floats highest = top[r];
#pragma GCC unroll 4
      for (int w = 0; w < WIDE; w++) {
        Floats x = Kind::real(sum[r][w]);
        if constexpr (QUANTIZED) x = x * load(scales + w * LANES);
        store(out + r * stride + w * LANES, x);
        highest = most(highest, x);
      }
      top[r] = highest;
    }
  }

  // The mask -> biases [B][padded] of exponents to the base 2; padding gets the last key's.
  void pack_mask(int64_t padded, float* biases) const {
    for (int64_t b = 0; b < batch; b++)
      for (int64_t j = 0; j < padded; j++)
        biases[b * padded + j] = std::max(mask[b * tokens + std::min(j, tokens - 1)], LOWEST_BIAS) * LOG2_E;
  }

  // scores [count] become factor scores + biases; returns their maximum.
  __attribute__((noinline)) static float add_biases(float* scores, int64_t count, float factor, const float* biases) {
    Floats highest = all(LOWEST);
    for (int64_t j = 0; j < count; j += LANES) {
      const Floats x = multiply_add(load(scores + j), all(factor), load(biases + j));
      store(scores + j, x);
      highest = most(highest, x);
    }
    return most_of(highest);
  }

  // LANES weights, the first `real` ones, others 0; added to their sum.
  template <bool WHOLE>
  static void weigh_lanes(
      int64_t real, Floats exponent, const float* thresholds, typename Kind::Sum& sum, Weight* weights) {
    const Floats weight = power_of_two<Kind::EXACT>(exponent);
    if constexpr (QUANTIZED) {
      Ints n = towards_zero(weight + load(thresholds));
      if constexpr (!WHOLE) n = first(n, real);
      Kind::store(weights, n);
      sum = add(sum, n);
    } else {
      const Floats kept = WHOLE ? weight : first(weight, real);
      store(weights, kept);
      sum = sum + kept;
    }
  }

  // weights [count] = 2^(factor scores - shift) up to key `valid`, 0 from there; returns their sum.
  __attribute__((noinline)) static float weigh(
      const float* scores, int64_t count, int64_t valid, float factor, float shift, const float* thresholds,
      Weight* weights) {
    const Floats a = all(factor), b = all(shift);
    typename Kind::Sum sum = Kind::start(0);
    int64_t j = 0;
    for (; j + LANES <= std::min(count, valid); j += LANES)
      weigh_lanes<true>(LANES, multiply_subtract(load(scores + j), a, b), thresholds + j, sum, weights + j);
    for (; j < count; j += LANES)
      weigh_lanes<false>(valid - j, multiply_subtract(load(scores + j), a, b), thresholds + j, sum, weights + j);
    return sum_of(sum);
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
          Floats x = Kind::real(sum[r][w]);
          if constexpr (QUANTIZED) x = x * load(scales + c + w * LANES);
          store(to, multiply_add(load(to), all(keep[r]), x));
        }
    }
  }

  // out [B, tokens, H, D] = softmax(scale q k^T + mask) v, of queries, keys and values in streams of the same lengths.
  void run(Streams q, Streams k, Streams v, Number* out, int threads) const {
    const int64_t padded = divide_up(tokens, GROUP) * GROUP;
    const int64_t chunk = divide_up(divide_up(padded, divide_up(padded, CHUNK)), GROUP) * GROUP;
    const int64_t every = batch * heads, blocks = divide_up(tokens, BLOCK);
    const int64_t size = padded * WORDS;  // of a head's keys, and of its values
    const auto keys = buffer<int32_t>(every * size), values = buffer<int32_t>(every * size);
    const auto key_scales = buffer<float>(every * padded), value_scales = buffer<float>(every * D);
    const auto thresholds = buffer<float>(chunk + BLOCK);
    for (int64_t j = 0; j < chunk + BLOCK; j++)  // multiples of the golden ratio, without their whole parts
      thresholds[j] = static_cast<uint32_t>(j * 2654435769u) * 0x1p-32f * 0.999f;
    const auto scores = buffer<float>(threads * BLOCK * chunk);
    const auto weights = buffer<Weight>(threads * BLOCK * chunk);
    const auto biases = buffer<float>(mask != nullptr ? batch * padded : 1);
    if (mask != nullptr) pack_mask(padded, biases.get());

#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < 2 * every; i++) {
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
      float query_scales[BLOCK], sum[BLOCK], highest[BLOCK], keep[BLOCK];
      int32_t query_sums[BLOCK];
      Floats top[BLOCK];
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < every * blocks; i++) {
        const int64_t n = i / blocks, b = n / heads, h = n % heads, begin = i % blocks * BLOCK;
        const int64_t count = std::min<int64_t>(BLOCK, tokens - begin);
        pack_queries(q, b, h, begin, count, queries, query_scales, query_sums);
        std::fill_n(result, BLOCK * D, 0.f);
        std::fill_n(sum, BLOCK, 0.f);
        std::fill_n(highest, BLOCK, LOWEST);
        for (int64_t from = 0; from < padded; from += chunk) {
          const int64_t width = std::min(chunk, padded - from);
          std::fill_n(top, BLOCK, all(LOWEST));
          for (int64_t g = 0; g < width; g += GROUP)
            for (int r = 0; r < BLOCK; r += ROWS)
              score(queries + r * WORDS, query_sums + r, keys.get() + n * size + (from + g) * WORDS,
                    key_scales.get() + n * padded + from + g, chunk, s + r * chunk + g, top + r);
          for (int r = 0; r < BLOCK; r++) {
            float factor = query_scales[r] * scale * LOG2_E, peak = most_of(top[r]) * factor;
            if (mask != nullptr) {
              peak = add_biases(s + r * chunk, width, factor, biases.get() + b * padded + from);
              factor = 1;
            }
            const float now = std::max(highest[r], peak);
            float shift = now;
            if constexpr (QUANTIZED) shift -= Kind::LOG2_WEIGHT_TOP;
            keep[r] = std::exp2(highest[r] - now);
            highest[r] = now;
            sum[r] = sum[r] * keep[r] + weigh(s + r * chunk, width, tokens - from, factor, shift,
                                              thresholds.get() + r, p + r * chunk);
          }
          for (int r = 0; r < BLOCK; r += ROWS)
            product(p + r * chunk, chunk, values.get() + n * size + from * WORDS, value_scales.get() + n * D, width,
                    keep + r, result + r * D);
        }
        for (int r = 0; r < count; r++)
          for (int c = 0; c < D; c += LANES)
            store(out + ((b * tokens + begin + r) * heads + h) * D + c, load(result + r * D + c) / all(sum[r]));
      }
    }
  }
};

}  // namespace
}  // namespace jitexport

#endif
