// Linear layers, of fp32, bf16 or 8-bit weights: activations are quantized where weights are, multiplied, scaled, and go
// through the activation function before they reach memory. They may lie in several buffers, each with some of the
// columns.

#ifndef JITEXPORT_LINEAR_H
#define JITEXPORT_LINEAR_H

#include "tiles.h"

namespace jitexport {
namespace {

// x / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3): GELU by the tanh approximation, as exact as the exponential.
template <bool EXACT>
Floats gelu(Floats x) {
  const Floats cubic = multiply_add(x * x, all(0.044715f), all(1.f));
  const Floats u = x * cubic * all(-2 * 0.7978845608f * LOG2_E);
  const Floats divisor = all(1.f) + power_of_two<EXACT>(u);
  if constexpr (EXACT)
    return x / divisor;
  else
    return x * rough_inverse(divisor);
}

// Columns of the activations: [rows, inputs]. Inputs and outputs come in multiples of 64.
template <class Number>
struct Part {
  const Number* data;
  int64_t inputs;
};

// Kind: of the products. Number: of the activations, the bias, and the weights where they are not quantized. Out: of the
// result.
template <class Kind, class Number, bool GELU, class Out>
struct Linear {
  using Weight = std::conditional_t<Kind::QUANTIZED, int8_t, Number>;
  int64_t rows, inputs, outputs;
  int64_t words = inputs / Kind::PACK;
  // Rows lie apart by more than their length: by a power of two, all of them would fall into the same sets of the cache.
  int64_t stride = words + LANES;

  // GROUP rows of the weights [outputs, inputs] -> packed [words][GROUP]; starts of the sums: where activations are
  // OFFSET too large, minus that times each row's sum.
  void pack(const Weight* weight, int32_t* packed, int32_t* starts) const {
    for (int n = 0; n < GROUP; n += LANES) {
      typename Kind::Sum sums = Kind::start(0);
      for (int64_t w = 0; w < words; w += LANES) {
        Ints square[LANES];
        for (int i = 0; i < LANES; i++) square[i] = Kind::weights(weight + (n + i) * inputs + w * Kind::PACK);
        transpose(square);
        for (int i = 0; i < LANES; i++) {
          if constexpr (Kind::OFFSET != 0) Kind::add(sums, all(0x01010101), square[i]);
          store_words(packed + (w + i) * GROUP + n, square[i]);
        }
      }
      if constexpr (Kind::QUANTIZED) store_words(starts + n, multiply(sums, all(-Kind::OFFSET)));
    }
  }

  // A row of the activations -> words; its scale.
  float pack_row(const Part<Number>* x, int64_t row, int32_t* to) const {
    if constexpr (Kind::QUANTIZED) {
      const auto number = [&](int64_t c) {
        const Part<Number>* part = x;
        while (c >= part->inputs) c -= part++->inputs;
        return load(part->data + row * part->inputs + c);
      };
      return quantize_row<Kind>(number, inputs, Kind::OFFSET, to);
    } else if constexpr (std::is_same_v<Number, typename Kind::Number>) {
      for (int64_t done = 0; done < inputs; done += x++->inputs)
        std::memcpy(reinterpret_cast<Number*>(to) + done, x->data + row * x->inputs, x->inputs * sizeof *x->data);
    } else {
      for (int64_t done = 0; done < inputs; done += x++->inputs)
        for (int64_t c = 0; c < x->inputs; c += LANES)
          store(reinterpret_cast<float*>(to) + done + c, load(x->data + row * x->inputs + c));
    }
    return 1;
  }

  // ROWS rows of the block, of which `count` exist, and GROUP columns.
  __attribute__((noinline)) void tile(
      const int32_t* numbers, const float* scales, const int32_t* packed, const int32_t* starts,
      const float* weight_scales, const Number* bias, int64_t count, Out* out) const {
    typename Kind::Sum sum[ROWS][WIDE];
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
      for (int w = 0; w < WIDE; w++) {
        if constexpr (Kind::QUANTIZED)
          sum[r][w] = load_words(starts + w * LANES);
        else
          sum[r][w] = Kind::start(0);
      }
    multiply<Kind>(sum, numbers, stride, packed, GROUP, words);
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++) {
      if (r >= count) break;
#pragma GCC unroll 4
      for (int w = 0; w < WIDE; w++) {
        Floats y = Kind::real(sum[r][w]);
        if constexpr (Kind::QUANTIZED) y = y * (all(scales[r]) * load(weight_scales + w * LANES));
        if (bias != nullptr) y = y + load(bias + w * LANES);
        if constexpr (GELU) y = gelu<Kind::EXACT>(y);
        store(out + r * outputs + w * LANES, y);
      }
    }
  }

  // out [rows, outputs] = act(x [rows, inputs] weight^T * weight_scales + bias), x in parts side by side; scales of
  // quantized weights only.
  void run(
      const Part<Number>* x, const Weight* weight, const float* weight_scales, const Number* bias, Out* out,
      int threads) const {
    const int64_t groups = outputs / GROUP, blocks = divide_up(rows, BLOCK);
    const auto packed = buffer<int32_t>(outputs * words), starts = buffer<int32_t>(outputs);
    const auto numbers = buffer<int32_t>(threads * BLOCK * stride);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
      for (int64_t g = 0; g < groups; g++)
        pack(weight + g * GROUP * inputs, packed.get() + g * GROUP * words, starts.get() + g * GROUP);
      int32_t* const block = numbers.get() + omp_get_thread_num() * BLOCK * stride;
      float scales[BLOCK];
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < blocks; i++) {
        const int64_t begin = i * BLOCK, count = std::min<int64_t>(BLOCK, rows - begin);
        for (int64_t r = 0; r < BLOCK; r++)
          scales[r] = pack_row(x, begin + std::min(r, count - 1), block + r * stride);
        for (int64_t g = 0; g < groups; g++)
          for (int64_t r = 0; r < count; r += ROWS)
            tile(block + r * stride, scales + r, packed.get() + g * GROUP * words, starts.get() + g * GROUP,
                 Kind::QUANTIZED ? weight_scales + g * GROUP : nullptr, bias == nullptr ? nullptr : bias + g * GROUP,
                 count - r, out + (begin + r) * outputs + g * GROUP);
      }
    }
  }
};

}  // namespace
}  // namespace jitexport

#endif
