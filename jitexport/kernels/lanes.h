// Vectors of 32-bit numbers, as wide as the machine has them: what differs between AVX2 and AVX-512, and nothing else.
//
// PyTorch's own at::vec would bring more machines, but it has no sums of 8-bit or bf16 products, no pairs that swap
// and no stores of 8-bit numbers, which is half of what is below.

#ifndef JITEXPORT_LANES_H
#define JITEXPORT_LANES_H

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>

namespace jitexport {
namespace {

#if defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)

using Floats = __m512;
using Ints = __m512i;
constexpr int LANES = 16;

inline Floats all(float x) { return _mm512_set1_ps(x); }
inline Ints all(int32_t x) { return _mm512_set1_epi32(x); }
inline Floats as_floats(Ints x) { return _mm512_castsi512_ps(x); }
inline Ints as_ints(Floats x) { return _mm512_castps_si512(x); }
inline Floats to_floats(Ints x) { return _mm512_cvtepi32_ps(x); }
inline Ints nearest(Floats x) { return _mm512_cvtps_epi32(x); }
inline Ints towards_zero(Floats x) { return _mm512_cvttps_epi32(x); }

inline Floats load(const float* from) { return _mm512_loadu_ps(from); }
inline Floats load(const uint16_t* bf16) {
  const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bf16));
  return as_floats(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
}
inline Ints load_words(const void* from) { return _mm512_loadu_si512(from); }
// 8-bit numbers -> 16-bit ones, two in a word.
inline Ints load_wider(const int8_t* from) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline void store(float* to, Floats x) { _mm512_storeu_ps(to, x); }
inline void store_words(void* to, Ints x) { _mm512_storeu_si512(to, x); }
inline void store_8(void* to, Ints x) { _mm_storeu_si128(static_cast<__m128i*>(to), _mm512_cvtepi32_epi8(x)); }
inline void store_16(void* to, Ints x) { _mm256_storeu_si256(static_cast<__m256i*>(to), _mm512_cvtepi32_epi16(x)); }

inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats multiply_subtract(Floats a, Floats b, Floats c) { return _mm512_fmsub_ps(a, b, c); }
// a b - c in even lanes, a b + c in odd ones.
inline Floats multiply_alternate(Floats a, Floats b, Floats c) { return _mm512_fmaddsub_ps(a, b, c); }
inline Floats most(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats magnitude(Floats x) { return _mm512_abs_ps(x); }
inline float sum_of(Floats x) { return _mm512_reduce_add_ps(x); }
inline int32_t sum_of(Ints x) { return _mm512_reduce_add_epi32(x); }
inline float most_of(Floats x) { return _mm512_reduce_max_ps(x); }
inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Ints multiply(Ints a, Ints b) { return _mm512_mullo_epi32(a, b); }
inline Ints either(Ints a, Ints b) { return _mm512_or_si512(a, b); }
inline Ints both(Ints a, Ints b) { return _mm512_and_si512(a, b); }
inline Ints up(Ints x, int bits) { return _mm512_slli_epi32(x, bits); }
inline Ints down(Ints x, int bits) { return _mm512_srli_epi32(x, bits); }
// The first `count` lanes, others 0.
inline Floats first(Floats x, int64_t count) {
  return _mm512_maskz_mov_ps(count >= LANES ? 0xffff : (1u << std::max<int64_t>(count, 0)) - 1, x);
}
inline Ints first(Ints x, int64_t count) { return as_ints(first(as_floats(x), count)); }

inline Floats swap_pairs(Floats x) { return _mm512_permute_ps(x, 0xb1); }
// Each of the first half of the lanes' numbers twice.
inline Floats twice(const float* from) {
  const Ints order = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  return _mm512_permutexvar_ps(order, _mm512_castps256_ps512(_mm256_loadu_ps(from)));
}

// 1 / x to 14 bits.
inline Floats rough_inverse(Floats x) { return _mm512_rcp14_ps(x); }
// Powers of two may have any exponent.
inline Floats exponents(Floats x) { return x; }
// What x has above the next lower whole number; and x times two to the power of that number, for x from 1 to 2.
inline Floats fraction(Floats x) { return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
inline Floats scale_by_whole_power(Floats x, Floats power) { return _mm512_scalef_ps(x, power); }

// LANES x LANES words.
inline void transpose(Ints (&x)[LANES]) {
  Ints y[LANES];
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
    const Ints a = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88), b = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
    const Ints c = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd), d = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
    y[i] = _mm512_shuffle_i32x4(a, b, 0x88);
    y[i + 4] = _mm512_shuffle_i32x4(c, d, 0x88);
    y[i + 8] = _mm512_shuffle_i32x4(a, b, 0xdd);
    y[i + 12] = _mm512_shuffle_i32x4(c, d, 0xdd);
  }
  for (int i = 0; i < LANES; i++) x[i] = y[i];
}

#elif defined(__AVX2__) && defined(__FMA__)

using Floats = __m256;
using Ints = __m256i;
constexpr int LANES = 8;

inline Floats all(float x) { return _mm256_set1_ps(x); }
inline Ints all(int32_t x) { return _mm256_set1_epi32(x); }
inline Floats as_floats(Ints x) { return _mm256_castsi256_ps(x); }
inline Ints as_ints(Floats x) { return _mm256_castps_si256(x); }
inline Floats to_floats(Ints x) { return _mm256_cvtepi32_ps(x); }
inline Ints nearest(Floats x) { return _mm256_cvtps_epi32(x); }
inline Ints towards_zero(Floats x) { return _mm256_cvttps_epi32(x); }

inline Floats load(const float* from) { return _mm256_loadu_ps(from); }
inline Floats load(const uint16_t* bf16) {
  const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bf16));
  return as_floats(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16));
}
inline Ints load_words(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
inline Ints load_wider(const int8_t* from) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline void store(float* to, Floats x) { _mm256_storeu_ps(to, x); }
inline void store_words(void* to, Ints x) { _mm256_storeu_si256(static_cast<__m256i*>(to), x); }
inline __m128i lower_halves(Ints x) {
  x = _mm256_and_si256(x, _mm256_set1_epi32(0xffff));
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(x, x), 0x08));
}
inline void store_8(void* to, Ints x) {
  const __m128i words = _mm_and_si128(lower_halves(x), _mm_set1_epi16(255));
  _mm_storel_epi64(static_cast<__m128i*>(to), _mm_packus_epi16(words, words));
}
inline void store_16(void* to, Ints x) { _mm_storeu_si128(static_cast<__m128i*>(to), lower_halves(x)); }

inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats multiply_subtract(Floats a, Floats b, Floats c) { return _mm256_fmsub_ps(a, b, c); }
inline Floats multiply_alternate(Floats a, Floats b, Floats c) { return _mm256_fmaddsub_ps(a, b, c); }
inline Floats most(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Floats magnitude(Floats x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.f), x); }
inline float sum_of(Floats x) {
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
inline int32_t sum_of(Ints x) {
  __m128i y = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  y = _mm_add_epi32(y, _mm_shuffle_epi32(y, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(y, _mm_shuffle_epi32(y, 0xb1)));
}
inline float most_of(Floats x) {
  __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}
inline Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
inline Ints multiply(Ints a, Ints b) { return _mm256_mullo_epi32(a, b); }
inline Ints either(Ints a, Ints b) { return _mm256_or_si256(a, b); }
inline Ints both(Ints a, Ints b) { return _mm256_and_si256(a, b); }
inline Ints up(Ints x, int bits) { return _mm256_slli_epi32(x, bits); }
inline Ints down(Ints x, int bits) { return _mm256_srli_epi32(x, bits); }
inline Ints first(Ints x, int64_t count) {
  const Ints lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return both(x, _mm256_cmpgt_epi32(all(static_cast<int32_t>(std::min<int64_t>(count, LANES))), lane));
}
inline Floats first(Floats x, int64_t count) { return as_floats(first(as_ints(x), count)); }

inline Floats swap_pairs(Floats x) { return _mm256_permute_ps(x, 0xb1); }
inline Floats twice(const float* from) {
  const Ints order = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
  return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(from)), order);
}

// 1 / x to 12 bits.
inline Floats rough_inverse(Floats x) { return _mm256_rcp_ps(x); }
// To where a power of two is a number, which is as good as 0 or infinite; not a number stays that.
inline Floats exponents(Floats x) { return _mm256_min_ps(all(126.f), _mm256_max_ps(all(-126.f), x)); }
inline Floats fraction(Floats x) { return x - _mm256_floor_ps(x); }
inline Floats scale_by_whole_power(Floats x, Floats power) {
  return as_floats(add(as_ints(x), up(nearest(_mm256_floor_ps(power)), 23)));
}

inline void transpose(Ints (&x)[LANES]) {
  Ints y[LANES];
  for (int i = 0; i < LANES; i += 2) {  // pairs of words
    y[i] = _mm256_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm256_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < LANES; i += 4) {  // squares of four
    x[i] = _mm256_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm256_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm256_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm256_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
  for (int i = 0; i < 4; i++) {  // squares of squares
    y[i] = _mm256_permute2x128_si256(x[i], x[i + 4], 0x20);
    y[i + 4] = _mm256_permute2x128_si256(x[i], x[i + 4], 0x31);
  }
  for (int i = 0; i < LANES; i++) x[i] = y[i];
}

#else
#error "jitexport's kernels need AVX2 with FMA, or AVX-512 with BW, DQ and VL"
#endif

// To the nearest, ties to even.
inline void store(uint16_t* bf16, Floats x) {
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(bf16), (__m256i)_mm512_cvtneps_pbh(x));
#else
  const Ints bits = as_ints(x), odd = both(down(bits, 16), all(1));
  store_16(bf16, down(add(bits, add(odd, all(0x7fff))), 16));
#endif
}

}  // namespace
}  // namespace jitexport

#endif
