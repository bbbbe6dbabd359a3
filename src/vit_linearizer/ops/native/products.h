// Products of small matrices, the building blocks of a chunk. Right factors have a fixed number of columns, so that a row of
// theirs is a fixed number of vectors.
//
// An operand says in which type factors are kept and how the right one is laid out:
//   Single  floats, rows one after the other, multiplied by the kernel below;
//   Half    bf16, rows in interleaved pairs, multiplied by oneDNN (AMX tiles or AVX-512 dot products). Sums are fp32.
#pragma once

#include <algorithm>

#include "vectors.h"

#if defined(__AVX512BF16__)
#include <ATen/Context.h>
#include <ATen/native/CPUBlas.h>

#include <exception>

#define VIT_LINEARIZER_HALF_PRODUCTS
#endif

namespace vit_linearizer {

// Registers hold kTall rows times kWide vectors of a result.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTall = 6, kWide = 4;  // 32 registers
#else
constexpr int kTall = 6, kWide = 2;  // 16 registers
#endif

template <int rows, int wide, bool turned>
VL_INLINE void multiply_tile(int depth, const float* A, int64_t lda, const float* B, int64_t ldb, float* C, int64_t ldc,
                             bool add) {
  Floats c[rows][wide];
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < wide; j++) c[i][j] = add ? load(C + i * ldc + j * kLanes) : all(0.0f);
  for (int k = 0; k < depth; k++) {
    Floats b[wide];
    for (int j = 0; j < wide; j++) b[j] = load(B + k * ldb + j * kLanes);
    for (int i = 0; i < rows; i++)
      for (int j = 0; j < wide; j++) c[i][j] += A[turned ? k * lda + i : i * lda + k] * b[j];
  }
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < wide; j++) store(C + i * ldc + j * kLanes, c[i][j]);
}

template <int columns, int rows, bool turned>
void multiply_rows(int depth, const float* A, int64_t lda, const float* B, float* C, int64_t ldc, bool add) {
  constexpr int vectors = columns / kLanes, rest = vectors % kWide;
  int v = 0;
  for (; v + kWide <= vectors; v += kWide)
    multiply_tile<rows, kWide, turned>(depth, A, lda, B + v * kLanes, columns, C + v * kLanes, ldc, add);
  if constexpr (rest > 0)
    multiply_tile<rows, rest, turned>(depth, A, lda, B + v * kLanes, columns, C + v * kLanes, ldc, add);
}

struct Single {
  using Type = float;

  // Rows k and k + 1 of a right factor, columns c and on.
  template <int columns>
  static VL_INLINE void put_pair(float* B, int k, int c, Floats first, Floats second) {
    store(B + k * columns + c, first);
    store(B + (k + 1) * columns + c, second);
  }

  // C = A B, or C += A B; A is stored with its rows as columns where it is turned. Row i of A is zero from column
  // `diagonal` + i + 1 on.
  template <int columns, bool turned = false>
  static void multiply(int rows, int depth, const float* A, int64_t lda, const float* B, float* C, int64_t ldc, bool add,
                       int diagonal = 1 << 20) {
    const int64_t step = turned ? 1 : lda;
    int i = 0;
    for (; i + kTall <= rows; i += kTall)
      multiply_rows<columns, kTall, turned>(std::min(depth, diagonal + i + kTall), A + i * step, lda, B, C + i * ldc, ldc,
                                            add);
    const float* a = A + i * step;
    float* c = C + i * ldc;
    switch (rows - i) {
      case 1: return multiply_rows<columns, 1, turned>(depth, a, lda, B, c, ldc, add);
      case 2: return multiply_rows<columns, 2, turned>(depth, a, lda, B, c, ldc, add);
      case 3: return multiply_rows<columns, 3, turned>(depth, a, lda, B, c, ldc, add);
      case 4: return multiply_rows<columns, 4, turned>(depth, a, lda, B, c, ldc, add);
      case 5: return multiply_rows<columns, 5, turned>(depth, a, lda, B, c, ldc, add);
    }
  }

  static void finish() {}
};

#if defined(VIT_LINEARIZER_HALF_PRODUCTS)
struct Half {
  using Type = BFloat16;

  template <int columns>
  static VL_INLINE void put_pair(BFloat16* B, int k, int c, Floats first, Floats second) {
    const __m512i in_pairs = (__m512i)(lanes() | ((lanes() + kLanes) << 16));
    const __m512i both = _mm512_permutexvar_epi16(in_pairs, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
    std::memcpy(B + k * columns + 2 * c, &both, sizeof both);
  }

  template <int columns>
  static void multiply(int rows, int depth, const BFloat16* A, int64_t lda, const BFloat16* B, float* C, int64_t ldc,
                       bool add, int = 0) {
    at::native::cpublas::brgemm(rows, columns, depth, lda, columns, ldc, add, A, B, C, /*is_vnni=*/true);
  }

  // The CPU can, but oneDNN may have been switched off or kept to fewer instructions.
  static bool works() {
    static const bool tried = [] {
      alignas(64) BFloat16 a[2 * kTall] = {}, b[2 * 64] = {};
      alignas(64) float c[64] = {};
      try {
        at::native::cpublas::brgemm(1, 64, 2, 2, 64, 64, false, a, b, c, true);
        at::native::cpublas::brgemm_release(true);
      } catch (const std::exception&) {
        return false;
      }
      return true;
    }();
    return tried && at::globalContext().userEnabledMkldnn();
  }

  // Gives tile registers back to whoever multiplies next.
  static void finish() { at::native::cpublas::brgemm_release(/*is_vnni=*/true); }
};
#endif

}  // namespace vit_linearizer
