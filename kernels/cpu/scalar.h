// Scalar helpers that every instruction set shares: number formats and the functions that activations are made of.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "fff.h"

namespace hf_fff {

inline float bits_to_float(uint32_t bits) { float f; std::memcpy(&f, &bits, 4); return f; }
inline uint32_t float_to_bits(float f) { uint32_t bits; std::memcpy(&bits, &f, 4); return bits; }

inline float to_float(bfloat16 v) { return bits_to_float(uint32_t{v.bits} << 16); }

inline float to_float(float16 v) {
  const uint32_t sign = uint32_t(v.bits & 0x8000) << 16, rest = v.bits & 0x7fff;
  if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);       // infinity and NaN
  if (rest >= 0x0400) return bits_to_float(sign | ((rest << 13) + ((127 - 15) << 23)));     // normal
  return std::copysign(float(rest) * 0x1p-24f, bits_to_float(sign | 0x3f800000));           // subnormal and zero
}

// Rounding is to nearest, ties to even, as in torch.
inline bfloat16 to_bfloat16(float f) {
  const uint32_t bits = float_to_bits(f);
  if ((bits & 0x7fffffff) > 0x7f800000) return {uint16_t(0x7fc0)};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

inline float16 to_float16(float f) {
  const uint32_t bits = float_to_bits(f), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (rest >= 0x477ff000) return {uint16_t(sign | 0x7c00)};                                  // rounds to infinity
  if (rest < 0x38800000) {                                                                   // subnormal: let the FPU round
    const float shifted = bits_to_float(rest) + 0.5f;
    return {uint16_t(sign | (float_to_bits(shifted) - 0x3f000000))};
  }
  return {uint16_t(sign | ((rest + 0xc8000fff + (rest >> 13 & 1)) >> 13))};
}

inline float to_accumulator(float v) { return v; }
inline double to_accumulator(double v) { return v; }
inline float to_accumulator(bfloat16 v) { return to_float(v); }
inline float to_accumulator(float16 v) { return to_float(v); }

template <class T> inline T from_accumulator(accumulator_t<T> v);
template <> inline float from_accumulator<float>(float v) { return v; }
template <> inline double from_accumulator<double>(double v) { return v; }
template <> inline bfloat16 from_accumulator<bfloat16>(float v) { return to_bfloat16(v); }
template <> inline float16 from_accumulator<float16>(float v) { return to_float16(v); }

template <class T> inline void store_converted(T* to, const accumulator_t<T>* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = from_accumulator<T>(from[i]);
}

inline double erf_of(double x) { return std::erf(x); }

// erf as a ratio of polynomials on [-4, 4], where it is one up to float's rounding; no branch and no call, so loops over
// it vectorise. Largest error 4e-7 relative. A NaN stays one.
inline float erf_of(float x) {
  x = x < -4.f ? -4.f : x;
  x = x > 4.f ? 4.f : x;
  const float s = x * x;
  float p = -2.72614225801306e-10f;
  p = p * s + 2.77068142495902e-08f;
  p = p * s - 2.10102402082508e-06f;
  p = p * s - 5.69250639462346e-05f;
  p = p * s - 7.34990630326855e-04f;
  p = p * s - 2.95459980854025e-03f;
  p = p * s - 1.60960333262415e-02f;
  float q = -1.45660718464996e-05f;
  q = q * s - 2.13374055278905e-04f;
  q = q * s - 1.68282697438203e-03f;
  q = q * s - 7.37332916720468e-03f;
  q = q * s - 1.42647390514189e-02f;
  return x * p / q;
}

inline double exp_of(double x) { return std::exp(x); }

// exp for loops that vectorise: 2^n times a polynomial, without a branch or a call. Largest error 2e-7 relative between
// -87 and 87, where it stays for what lies outside. A NaN stays one.
inline float exp_of(float x) {
  x = x < -87.f ? -87.f : x;
  x = x > 87.f ? 87.f : x;
  const float shifted = x * 1.44269504f + 12582912.f;  // 1.5 * 2^23: the integer part ends up in the last bits
  const float n = shifted - 12582912.f;
  float r = x - n * 0.693145752f;  // ln 2 in two parts
  r = r - n * 1.42860677e-6f;
  float p = 1.98756915e-4f;
  p = p * r + 1.39819995e-3f;
  p = p * r + 8.33345192e-3f;
  p = p * r + 4.16657962e-2f;
  p = p * r + 1.66666655e-1f;
  p = p * r + 5.00000012e-1f;
  p = p * (r * r) + r;
  return (p + 1.f) * bits_to_float((float_to_bits(shifted) << 23) + 0x3f800000u);
}

template <class A> inline A sigmoid(A z) { return A(1) / (A(1) + exp_of(-z)); }

}  // namespace hf_fff
