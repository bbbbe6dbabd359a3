// What the core of a mixer and its derivative share: sizes, parameters, and the tokens of a chunk after the convolution.
//
//     z, xBC, dt = zxbcdt;   x, B, C = SiLU(conv(xBC));   dt = softplus(dt + dt_bias);   A = -exp(A_log)
//     y = scan(x, dt, A, B, C) + D x;   v = y SiLU(z);   out = v / sqrt(mean(v^2) + eps) * norm_weight
//
// Source: Mamba-2 (arXiv 2405.21060), one group for all heads. It must equal the plain path of `ops.mixer_core`.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <vector>

#include "products.h"

namespace vit_linearizer {

// A chunk has at most kChunk tokens. kLong is what long sequences are cut into: it suits the tiles of every machine.
constexpr int kChunk = 80, kLong = 64, kState = 64, kHead = 64, kWidth = 4;

struct Sizes {
  int64_t batch, length, lead, heads;

  int64_t tokens() const { return length - lead; }
  int64_t inner() const { return heads * kHead; }
  int64_t conv() const { return inner() + 2 * kState; }
  int64_t columns() const { return inner() + conv() + heads; }

  // Short sequences are cut into equal parts, so that none is nearly empty.
  int64_t chunk() const {
    if (tokens() > 5 * kLong) return kLong;
    const int64_t count = std::max<int64_t>(1, (tokens() + kChunk - 1) / kChunk);
    return std::max<int64_t>(1, (tokens() + count - 1) / count);
  }
  int64_t chunks() const { return (tokens() + chunk() - 1) / chunk(); }

  // Groups of heads: as many as keep all threads busy.
  int64_t groups() const {
    const int64_t threads = at::get_num_threads();
    int64_t count = 1;
    while (count < heads && batch * count % threads && batch * count < 4 * threads) count++;
    return count;
  }
};

struct Parameters {
  std::vector<float> conv_weight[kWidth], conv_bias, dt_bias, A, D, norm_weight;
  float eps;
};

Parameters read_parameters(const Sizes& sizes, const at::Tensor& conv_weight, const at::Tensor& conv_bias,
                           const at::Tensor& dt_bias, const at::Tensor& A_log, const at::Tensor& D,
                           const at::Tensor& norm_weight, double eps);

// Memory that a thread keeps from call to call: fresh pages would cost more than the arithmetic on them.
template <class T>
T* scratch(size_t which, size_t count) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::array<std::pair<std::unique_ptr<void, Free>, size_t>, 40> kept;
  const size_t bytes = (count * sizeof(T) + 4095) / 4096 * 4096;
  auto& [pointer, size] = kept[which];
  if (size < bytes) {
    pointer.reset(std::aligned_alloc(4096, bytes));
    TORCH_CHECK(pointer, "out of memory");
    size = bytes;
  }
  return static_cast<T*>(pointer.get());
}

// conv + bias of channels c and on at one token; `row` points to the rows of the kWidth - 1 tokens before it and its own.
template <class IO>
VL_INLINE Floats convolved(const Parameters& p, const IO* const* row, int64_t offset, int64_t c) {
  Floats v = load(&p.conv_bias[c]);
  for (int s = 0; s < kWidth; s++) v += load(row[s] + offset + c) * load(&p.conv_weight[s][c]);
  return v;
}

// Rows of a chunk's tokens, after those of the kWidth - 1 before; zeros stand in where there is no token.
template <class IO>
struct Rows {
  const IO* row[kChunk + kWidth];

  Rows(const Sizes& sizes, const IO* zxbcdt, const IO* nothing, int64_t start, int count) {
    for (int i = 0; i < count + kWidth - 1; i++) {
      const int64_t t = start + i - (kWidth - 1);
      row[i] = t < 0 || t >= sizes.length ? nothing : zxbcdt + t * sizes.columns();
    }
  }
  const IO* operator[](int i) const { return row[i + kWidth - 1]; }
};

// B and C of a chunk, [kChunk, kState] each, by tokens; zero behind the last one.
template <class IO>
void project(const Parameters& p, const Sizes& sizes, const Rows<IO>& rows, int tokens, float* B, float* C) {
  const int64_t inner = sizes.inner();
  for (int i = 0; i < kChunk; i++)
    for (int c = 0; c < kState; c += kLanes) {
      const bool there = i < tokens;
      store(B + i * kState + c, there ? silu_for<IO>(convolved(p, rows.row + i, inner, inner + c)) : all(0.0f));
      store(C + i * kState + c, there ? silu_for<IO>(convolved(p, rows.row + i, inner, inner + kState + c)) : all(0.0f));
    }
}

// Step sizes of a range of heads before the softplus and after it, and the log decay summed up to each token: [heads,
// kChunk]. Behind the last token steps are 0 and the sum stays.
template <class IO>
void steps(const Parameters& p, const Sizes& sizes, const Rows<IO>& rows, int tokens, int64_t first, int heads, float* raw,
           float* dt, float* decay) {
  for (int i = 0; i < tokens; i++) {
    const IO* row = rows[i] + sizes.inner() + sizes.conv() + first;
    for (int h = 0; h < heads; h++) raw[h * kChunk + i] = float(row[h]) + p.dt_bias[first + h];
  }
  for (int h = 0; h < heads; h++) {
    float *r = raw + h * kChunk, *d = dt + h * kChunk;
    double a = 0;  // differences of these sums are what counts
    std::fill(r + tokens, r + kChunk, 0.0f);
    for (int i = 0; i < kChunk; i += kLanes) store(d + i, softplus(load(r + i)));
    std::fill(d + tokens, d + kChunk, 0.0f);
    for (int i = 0; i < kChunk; i++) decay[h * kChunk + i] = a += double(d[i]) * p.A[first + h];
  }
}

inline void transpose(const float* from, int rows, int columns, float* to, int64_t stride) {
  for (int c = 0; c < columns; c++)
    for (int r = 0; r < rows; r++) to[c * stride + r] = from[r * columns + c];
}

}  // namespace vit_linearizer
