// What the kernels have in common: matrix products in tiles of registers, of fp32, bf16 or integer numbers, for CPUs
// with AVX2 or AVX-512.

#ifndef JITEXPORT_TILES_H
#define JITEXPORT_TILES_H

#include "lanes.h"

namespace jitexport {
namespace {

constexpr int WIDE = LANES / 4;      // registers side by side in a tile
constexpr int GROUP = LANES * WIDE;  // columns of a tile
constexpr int ROWS = 6;              // of a tile: its sums, WIDE operands and a broadcast fill the 16 or 32 registers
constexpr int BLOCK = 4 * ROWS;      // rows that a thread takes at once, when it is free: cores may be shared with others
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

// 2^x by a polynomial: to 1e-7, or to 1e-4, a tenth of what bf16 and 8 bits resolve.
template <bool EXACT>
Floats power_of_two(Floats x) {
  x = exponents(x);
  const Floats f = fraction(x);
  Floats p;
  if constexpr (EXACT) {
    p = multiply_add(all(0.00187757659f), f, all(0.00898934066f));
    p = multiply_add(p, f, all(0.0558263172f));
    p = multiply_add(p, f, all(0.240153618f));
    p = multiply_add(p, f, all(0.693153073f));
    p = multiply_add(p, f, all(0.999999925f));
  } else {
    p = multiply_add(all(0.07802175f), f, all(0.22606715f));
    p = multiply_add(p, f, all(0.69583354f));
    p = multiply_add(p, f, all(0.99992520f));
  }
  return scale_by_whole_power(p, x);
}

// Kinds of products: sums of PACK numbers of each operand in a 32-bit word. `add` is written as instructions: around
// the intrinsics, GCC 12 moves the sums to the stack and back at every step.
//
// Number: of the rows. Those of quantized kinds reach from -TOP to TOP, plus OFFSET on the one side of the product
// that must not have a sign; weights of attention reach up to WEIGHT_TOP, so that no sum of a chunk overflows.

struct RealSums {
  using Sum = Floats;
  static constexpr int OFFSET = 0;
  static constexpr bool QUANTIZED = false;
  static Sum start(int32_t) { return all(0.f); }
  static Floats real(Sum sum) { return sum; }
};

struct WholeSums {
  using Sum = Ints;
  static constexpr bool QUANTIZED = true, EXACT = false;
  static Sum start(int32_t value) { return all(value); }
  static Floats real(Sum sum) { return to_floats(sum); }
};

struct F32 : RealSums {
  using Number = float;
  static constexpr int PACK = 1;
  static constexpr bool EXACT = true;
  static void add(Sum& sum, Ints a, Ints b) { asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); }
  static Ints weights(const float* from) { return load_words(from); }
  static Ints weights(const uint16_t* from) { return as_ints(load(from)); }
};

#ifdef __AVX512BF16__
struct BF16 : RealSums {
  using Number = uint16_t;
  static constexpr int PACK = 2;
  static constexpr bool EXACT = false;
  static void add(Sum& sum, Ints a, Ints b) { asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); }
  static Ints weights(const uint16_t* from) { return load_words(from); }
};
#endif

#if defined(__AVX512VNNI__) || (defined(__AVXVNNI__) && !defined(__AVX512BW__))
struct Int8 : WholeSums {
  using Number = uint8_t;
  static constexpr int PACK = 4, TOP = 127, OFFSET = 128;
  static constexpr float LOG2_WEIGHT_TOP = 7.9937876f;  // of 254.9: with a threshold of almost 1 it is still under 256
#ifdef __AVX512VNNI__
  static void add(Sum& sum, Ints u8, Ints s8) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u8), "v"(s8)); }
#else
  static void add(Sum& sum, Ints u8, Ints s8) { asm("{vex} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(u8), "x"(s8)); }
#endif
  static Ints weights(const int8_t* from) { return load_words(from); }
  static void store(void* to, Ints x) { store_8(to, x); }
};
#endif

// 8-bit weights where nothing sums 8-bit products: as 16-bit numbers, whose sums cannot saturate. The activations then
// have 10 bits and a sign: 1023 * 127 * 16,384 inputs still fit into 32 bits.
struct Int16 : WholeSums {
  using Number = int16_t;
  static constexpr int PACK = 2, TOP = 1023, OFFSET = 0;
  static constexpr float LOG2_WEIGHT_TOP = 10.8289298f;  // of 1819: times 1023 and 1152 keys under 2^31
  static void add(Sum& sum, Ints a, Ints b) {
    Ints products;
    asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+v"(sum), "=&v"(products) : "v"(a), "v"(b));
  }
  static Ints weights(const int8_t* from) { return load_wider(from); }
  static void store(void* to, Ints x) { store_16(to, x); }
};

// What this machine multiplies quantized numbers by, and those of a type that are not.
#if defined(__AVX512VNNI__) || (defined(__AVXVNNI__) && !defined(__AVX512BW__))
using Quantized = Int8;
#else
using Quantized = Int16;
#endif
#ifdef __AVX512BF16__
template <class Number>
using Plain = std::conditional_t<std::is_same_v<Number, float>, F32, BF16>;
#else
template <class Number>
using Plain = F32;
#endif

// sum += rows [ROWS][count words, `row_stride` apart] @ columns [count words][GROUP, `column_stride` apart].
// Of 8-bit numbers, those of the rows have no sign, or with SIGNED_ROWS those of the columns.
template <class Kind, bool SIGNED_ROWS = false>
__attribute__((always_inline)) inline void multiply(
    typename Kind::Sum (&sum)[ROWS][WIDE], const void* rows, int64_t row_stride, const int32_t* columns,
    int64_t column_stride, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    Ints column[WIDE];
#pragma GCC unroll 4
    for (int w = 0; w < WIDE; w++) column[w] = load_words(columns + i * column_stride + w * LANES);
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++) {
      int32_t word;
      std::memcpy(&word, static_cast<const char*>(rows) + (r * row_stride + i) * sizeof word, sizeof word);
      const Ints row = all(word);
#pragma GCC unroll 4
      for (int w = 0; w < WIDE; w++)
        if constexpr (SIGNED_ROWS)
          Kind::add(sum[r][w], column[w], row);
        else
          Kind::add(sum[r][w], row, column[w]);
    }
  }
}

// Numbers 0 ... count of a row, LANES from c on by number(c), as a kind's whole numbers plus an offset: their scale,
// and their sum without the offset.
template <class Kind, class Number>
float quantize_row(const Number& number, int64_t count, int offset, void* to, int32_t* sum = nullptr) {
  Floats top = all(1e-12f);
  for (int64_t c = 0; c < count; c += LANES) top = most(top, magnitude(number(c)));
  const float peak = most_of(top);
  const Floats factor = all(Kind::TOP / peak);
  Ints sums = all(0);
  for (int64_t c = 0; c < count; c += LANES) {
    const Ints n = nearest(number(c) * factor);
    sums = add(sums, n);
    Kind::store(static_cast<char*>(to) + c * 4 / Kind::PACK, add(n, all(offset)));
  }
  if (sum != nullptr) *sum = sum_of(sums);
  return peak / Kind::TOP;
}

}  // namespace
}  // namespace jitexport

#endif
