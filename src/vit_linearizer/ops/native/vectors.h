// Vectors of floats as wide as the machine's registers, in the compiler's own vector types: the same text serves
// AVX-512, AVX2, NEON and whatever else GCC or Clang compile for.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

// Vectors passed through memory would cost more than the work on them.
#define VL_INLINE inline __attribute__((always_inline))

namespace vit_linearizer {

using c10::BFloat16;

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kLanes = kBytes / 4;

typedef float Floats __attribute__((vector_size(kBytes)));
typedef uint32_t Bits __attribute__((vector_size(kBytes)));
typedef int32_t Counts __attribute__((vector_size(kBytes)));
typedef uint16_t Halves __attribute__((vector_size(kBytes / 2)));

VL_INLINE Floats all(float value) { return value - Floats{}; }

VL_INLINE Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

VL_INLINE Floats load(const BFloat16* p) {
  Halves v;
  std::memcpy(&v, p, sizeof v);
#if defined(__AVX512F__)
  return (Floats)((Bits)_mm512_cvtepu16_epi32((__m256i)v) << 16);  // GCC would do this in four instructions
#else
  return (Floats)(__builtin_convertvector(v, Bits) << 16);
#endif
}

VL_INLINE void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }

// To the nearest bf16, ties to even; not a number stays so.
VL_INLINE Halves rounded(Floats v) {
#if defined(__AVX512BF16__)
  return (Halves)_mm512_cvtneps_pbh((__m512)v);
#else
  Bits bits = (Bits)v;
  Bits nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(v == v ? nearest : (nearest & 0) + 0x7fc0, Halves);
#endif
}

VL_INLINE void store(BFloat16* p, Floats v) {
  Halves h = rounded(v);
  std::memcpy(p, &h, sizeof h);
}

// 0, 1, 2 and so on.
VL_INLINE Counts lanes() {
  Counts v;
  for (int i = 0; i < kLanes; i++) v[i] = i;
  return v;
}

VL_INLINE float sum(Floats v) {
  float total = 0;
  for (int i = 0; i < kLanes; i++) total += v[i];
  return total;
}

// e^x to about two units in the last place: 2^n e^r with |r| <= ln(2) / 2. Below -87 it is as good as 0, above 88 it
// stays at e^88; not a number stays so.
VL_INLINE Floats exp(Floats x) {
  const Floats low = all(-87.0f), high = all(88.0f);
  Floats bounded = x < low ? low : x;
  bounded = bounded > high ? high : bounded;
  const Floats shift = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, kept in the lowest bits
  Floats shifted = bounded * 1.44269504f + shift;
  Floats n = shifted - shift;
  Floats r = bounded - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Floats p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 0.5f;
  p = p * (r * r) + r + 1.0f;
  Floats power = (Floats)((Bits)p + ((Bits)shifted << 23));
  return x == x ? power : x;
}

VL_INLINE Floats sigmoid(Floats x) { return 1.0f / (1.0f + exp(-x)); }

VL_INLINE Floats silu(Floats x) { return x / (1.0f + exp(-x)); }

// The same to 2e-4 of its value, a tenth of what rounding to bf16 costs; a third fewer instructions, and no division.
VL_INLINE Floats rough_silu(Floats x) {
#if defined(__AVX512F__)
  const Floats low = all(-87.0f), high = all(88.0f);
  Floats bounded = -x < low ? low : -x;
  bounded = bounded > high ? high : bounded;
  const Floats shift = all(12582912.0f);
  Floats shifted = bounded * 1.44269504f + shift;
  Floats r = bounded - (shifted - shift) * 0.69314718f;
  Floats p = (all(0.16662677f) * r + 0.50394012f) * (r * r) + r + 1.0f;
  Floats power = (Floats)((Bits)p + ((Bits)shifted << 23));
  return x * (Floats)_mm512_rcp14_ps((__m512)(1.0f + power));
#else
  return silu(x);
#endif
}

// SiLU for what is rounded to IO next.
template <class IO>
VL_INLINE Floats silu_for(Floats x) {
  return std::is_same_v<IO, BFloat16> ? rough_silu(x) : silu(x);
}

// log(1 + e^x) = max(x, 0) + log(1 + e^-|x|), the logarithm as 2 atanh(e / (e + 2)): a short series, accurate near 0 too.
VL_INLINE Floats softplus(Floats x) {
  Floats e = exp(x < all(0.0f) ? x : -x);
  Floats t = e / (e + 2.0f);
  Floats u = t * t;
  Floats series = all(2.0f / 15);
  series = series * u + 2.0f / 13;
  series = series * u + 2.0f / 11;
  series = series * u + 2.0f / 9;
  series = series * u + 2.0f / 7;
  series = series * u + 2.0f / 5;
  series = series * u + 2.0f / 3;
  series = series * u + 2.0f;
  return series * t + (x < all(0.0f) ? all(0.0f) : x);
}

}  // namespace vit_linearizer
