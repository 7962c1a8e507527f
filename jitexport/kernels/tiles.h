// What the kernels have in common: matrix products in tiles of registers, of bf16 or of 8-bit numbers, for CPUs with
// AVX-512.

#ifndef JITEXPORT_TILES_H
#define JITEXPORT_TILES_H

#if !defined(__AVX512BW__) || !defined(__AVX512VL__) || !defined(__AVX512BF16__) || !defined(__AVX512VNNI__)
#error "jitexport's kernels need AVX-512 with BW, VL, BF16 and VNNI"
#endif

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

namespace jitexport {
namespace {

constexpr int LANES = 16;            // 32-bit numbers in a register
constexpr int WIDE = 4;              // registers side by side in a tile
constexpr int GROUP = LANES * WIDE;  // columns of a tile
constexpr int ROWS = 6;              // of a tile: 24 sums, 4 operands and a broadcast fill the 32 registers
constexpr int BLOCK = 4 * ROWS;      // rows that a thread takes at once
constexpr float LOG2_E = 1.44269504f;

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free>;
template <class T>
Buffer<T> buffer(int64_t count) {
  void* memory = std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64);
  if (memory == nullptr) throw std::bad_alloc();
  return Buffer<T>(static_cast<T*>(memory));
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline __m512 widen(const uint16_t* bf16) {
  const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bf16));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
}

inline void store_bf16(uint16_t* to, __m512 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(x));
}

inline void store_int8(void* to, __m512i x) {
  _mm_storeu_si128(static_cast<__m128i*>(to), _mm512_cvtepi32_epi8(x));
}

// 2^x by a cubic, to 1e-4: a tenth of what bf16 and 8 bits resolve.
inline __m512 power_of_two(__m512 x) {
  const __m512 fraction = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_set1_ps(0.07802175f);
  p = _mm512_fmadd_ps(p, fraction, _mm512_set1_ps(0.22606715f));
  p = _mm512_fmadd_ps(p, fraction, _mm512_set1_ps(0.69583354f));
  p = _mm512_fmadd_ps(p, fraction, _mm512_set1_ps(0.99992520f));
  return _mm512_scalef_ps(p, x);
}

// Sums of products, PACK numbers of each operand in 32 bits. Written as instructions: around the intrinsics, GCC 12
// moves the sums to the stack and back at every step.
struct BF16 {
  using Sum = __m512;
  using Number = uint16_t;
  static constexpr int PACK = 2;
  static Sum start(int32_t) { return _mm512_setzero_ps(); }
  static __m512 real(Sum sum) { return sum; }
  static void add(Sum& sum, __m512i a, __m512i b) { asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); }
};

struct Int8 {
  using Sum = __m512i;
  using Number = uint8_t;
  static constexpr int PACK = 4;
  static Sum start(int32_t value) { return _mm512_set1_epi32(value); }
  static __m512 real(Sum sum) { return _mm512_cvtepi32_ps(sum); }
  static void add(Sum& sum, __m512i u8, __m512i s8) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u8), "v"(s8)); }
};

// sum += rows [ROWS][count words, `row_stride` apart] @ columns [count words][GROUP, `column_stride` apart].
// Of 8-bit numbers, those of the rows have no sign, or with SIGNED_ROWS those of the columns.
template <class Kind, bool SIGNED_ROWS = false>
__attribute__((always_inline)) inline void multiply(
    typename Kind::Sum (&sum)[ROWS][WIDE], const void* rows, int64_t row_stride, const int32_t* columns,
    int64_t column_stride, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    __m512i column[WIDE];
#pragma GCC unroll 4
    for (int w = 0; w < WIDE; w++) column[w] = _mm512_load_si512(columns + i * column_stride + w * LANES);
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++) {
      int32_t word;
      std::memcpy(&word, static_cast<const char*>(rows) + (r * row_stride + i) * sizeof word, sizeof word);
      const __m512i row = _mm512_set1_epi32(word);
#pragma GCC unroll 4
      for (int w = 0; w < WIDE; w++)
        if constexpr (SIGNED_ROWS)
          Kind::add(sum[r][w], column[w], row);
        else
          Kind::add(sum[r][w], row, column[w]);
    }
  }
}

// Numbers 0 ... count of a row, 16 from c on by number(c), as 8-bit ones plus an offset: their scale, and their sum
// without the offset.
template <class Number>
float quantize_row(const Number& number, int64_t count, int offset, void* to, int32_t* sum = nullptr) {
  __m512 top = _mm512_set1_ps(1e-12f);
  for (int64_t c = 0; c < count; c += LANES) top = _mm512_max_ps(top, _mm512_abs_ps(number(c)));
  const float peak = _mm512_reduce_max_ps(top);
  const __m512 factor = _mm512_set1_ps(127 / peak);
  __m512i sums = _mm512_setzero_si512();
  for (int64_t c = 0; c < count; c += LANES) {
    const __m512i n = _mm512_cvtps_epi32(_mm512_mul_ps(number(c), factor));
    sums = _mm512_add_epi32(sums, n);
    store_int8(static_cast<char*>(to) + c, _mm512_add_epi32(n, _mm512_set1_epi32(offset)));
  }
  if (sum != nullptr) *sum = _mm512_reduce_add_epi32(sums);
  return peak / 127;
}

}  // namespace
}  // namespace jitexport

#endif
