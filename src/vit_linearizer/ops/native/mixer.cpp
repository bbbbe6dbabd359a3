// The core of a Mamba-2 mixer in one pass over the tokens; the equations stand in mixer.h.
//
// The scan takes chunks of tokens. With a_i the log decay summed up to token i of a chunk and S the state before it,
//
//     y_i = [e^a_i C_i | M_i] [S; x],   M_ij = e^(a_i - a_j) dt_j (C_i . B_j) for j <= i, plus D at j = i
//     S'  = e^a_last S + (e^(a_last - a_j) dt_j B_j)^T x
//
// so a chunk costs each head two products of small matrices; C B^T is shared by all heads. A thread takes a range of
// heads and walks over the tokens with their states in its cache. Nothing is transposed or expanded in memory.

#include "mixer.h"

#include <torch/library.h>

namespace vit_linearizer {

// `count` elements, `stride` apart, as floats.
static std::vector<float> floats(const at::Tensor& t, int64_t count, const char* name, int64_t start = 0,
                                 int64_t stride = 1) {
  TORCH_CHECK(t.numel() >= start + (count - 1) * stride + 1 && t.device().is_cpu(), name, " is too small, or not on the CPU");
  std::vector<float> values(count);
  const at::Tensor flat = t.is_contiguous() ? t : t.contiguous();
  if (flat.scalar_type() == at::kFloat) {
    for (int64_t i = 0; i < count; i++) values[i] = flat.const_data_ptr<float>()[start + i * stride];
  } else if (flat.scalar_type() == at::kBFloat16) {
    for (int64_t i = 0; i < count; i++) values[i] = flat.const_data_ptr<BFloat16>()[start + i * stride];
  } else {
    return floats(flat.to(at::kFloat), count, name, start, stride);
  }
  return values;
}

Parameters read_parameters(const Sizes& sizes, const at::Tensor& conv_weight, const at::Tensor& conv_bias,
                           const at::Tensor& dt_bias, const at::Tensor& A_log, const at::Tensor& D,
                           const at::Tensor& norm_weight, double eps) {
  Parameters p;
  TORCH_CHECK(conv_weight.numel() == sizes.conv() * kWidth, "the convolution must see ", kWidth, " tokens");
  for (int s = 0; s < kWidth; s++) p.conv_weight[s] = floats(conv_weight, sizes.conv(), "conv_weight", s, kWidth);
  p.conv_bias = floats(conv_bias, sizes.conv(), "conv_bias");
  p.dt_bias = floats(dt_bias, sizes.heads, "dt_bias");
  p.A = floats(A_log, sizes.heads, "A_log");
  for (float& a : p.A) a = -std::exp(a);
  p.D = floats(D, sizes.heads, "D");
  p.norm_weight = floats(norm_weight, sizes.inner(), "norm_weight");
  p.eps = eps;
  return p;
}

namespace {

// What the derivative wants kept; nothing is where it is null.
template <class IO>
struct Kept {
  IO* y = nullptr;          // [batch, tokens, inner]: before the gate
  float* states = nullptr;  // [batch, chunks - 1, heads, kState, kHead]: before all chunks but the first
  float* scale = nullptr;   // [batch, tokens]: of the norm
};

// One sequence, a range of heads: gated outputs before their norm, and for each token the sum of their squares.
template <class IO, class Operand>
void scan(const Parameters& p, const Sizes& sizes, const IO* zxbcdt, int64_t first, int heads, float* state, bool fresh,
          IO* out, float* squares, IO* kept_y, float* kept_states) {
  using T = typename Operand::Type;
  const int64_t inner = sizes.inner(), wide = int64_t(heads) * kHead, chunk = sizes.chunk();
  constexpr int kBoth = kState + kChunk;
  float* y = scratch<float>(0, kChunk * wide);
  T* right = scratch<T>(1, heads * kBoth * kHead);  // for each head [S; x]
  T* left = scratch<T>(2, kChunk * kBoth);          // [e^a C | M]
  T* into = scratch<T>(3, kState * kChunk);         // (e^(a_last - a) dt B)^T
  T* C = scratch<T>(4, kChunk * kState);
  T* B_pairs = scratch<T>(5, kState * kChunk);
  float* B_rows = scratch<float>(6, kChunk * kState);
  float* B_columns = scratch<float>(7, kState * kChunk);
  float* C_rows = scratch<float>(8, kChunk * kState);
  float* gram = scratch<float>(9, kChunk * kChunk);
  float* raw = scratch<float>(10, heads * kChunk);
  float* dt = scratch<float>(11, heads * kChunk);
  float* decay = scratch<float>(12, heads * kChunk);
  IO* nothing = scratch<IO>(13, sizes.columns());
  std::fill(nothing, nothing + sizes.columns(), IO(0));
  alignas(64) float from_start[kChunk], weight[kChunk];

  for (int64_t start = sizes.lead; start < sizes.length; start += chunk) {
    const int tokens = std::min<int64_t>(chunk, sizes.length - start), even = (tokens + 1) / 2 * 2;
    const bool carried = !fresh || start > sizes.lead, last_chunk = start + chunk >= sizes.length;
    const Rows<IO> rows(sizes, zxbcdt, nothing, start, even);

    project(p, sizes, rows, tokens, B_rows, C_rows);
    transpose(B_rows, kChunk, kState, B_columns, kChunk);
    for (int i = 0; i < tokens * kState; i += kLanes) store(C + i, load(C_rows + i));
    for (int n = 0; n < kState; n += 2)
      for (int c = 0; c < kChunk; c += kLanes) {
        const float* b = B_columns + n * kChunk + c;
        Operand::template put_pair<kChunk>(B_pairs, n, c, load(b), load(b + kChunk));
      }
    Operand::template multiply<kChunk>(tokens, kState, C, kState, B_pairs, gram, kChunk, false);

    steps(p, sizes, rows, tokens, first, heads, raw, dt, decay);

    for (int i = 0; i < even; i += 2)
      for (int64_t c = 0; c < wide; c += kLanes) {
        Floats one = silu_for<IO>(convolved(p, rows.row + i, inner, first * kHead + c)), two = all(0.0f);
        if (i + 1 < tokens) two = silu_for<IO>(convolved(p, rows.row + i + 1, inner, first * kHead + c));
        T* x = right + c / kHead * kBoth * kHead + kState * kHead;
        Operand::template put_pair<kHead>(x, i, c % kHead, one, two);
      }

    for (int h = 0; h < heads; h++) {
      const float *a = decay + h * kChunk, *d = dt + h * kChunk;
      float* S = state + h * kState * kHead;
      T* operand = right + h * kBoth * kHead;
      const Floats last = all(a[kChunk - 1]);
      const float skip = p.D[first + h];
      for (int i = 0; i < kChunk; i += kLanes) {
        store(from_start + i, exp(load(a + i)));
        store(weight + i, exp(last - load(a + i)) * load(d + i));
      }
      if (carried) {
        for (int n = 0; n < kState; n += 2)
          for (int c = 0; c < kHead; c += kLanes)
            Operand::template put_pair<kHead>(operand, n, c, load(S + n * kHead + c), load(S + (n + 1) * kHead + c));
        if (kept_states) {
          const int64_t k = (start - sizes.lead) / chunk - 1;
          std::copy(S, S + kState * kHead, kept_states + (k * sizes.heads + first + h) * kState * kHead);
        }
      }
      for (int i = 0; i < tokens; i++) {
        T* row = left + i * kBoth;
        const Floats a_i = all(a[i]), from = all(from_start[i]);
        if (carried)
          for (int n = 0; n < kState; n += kLanes) store(row + n, from * load(C_rows + i * kState + n));
        for (int j = 0; j < even; j += kLanes) {
          Floats m = all(0.0f);
          if (j <= i) m = exp(a_i - load(a + j)) * load(d + j) * load(gram + i * kChunk + j);
          if (j <= i && j + kLanes > i) {
            m = lanes() <= i - j ? m : all(0.0f);
            m += lanes() == i - j ? all(skip) : all(0.0f);
          }
          store(row + kState + j, m);
        }
      }
      const int without = carried ? 0 : kState;
      Operand::template multiply<kHead>(tokens, kState + even - without, left + without, kBoth, operand + without * kHead,
                                        y + h * kHead, wide, false, kState - without);
      if (last_chunk && fresh) continue;  // nobody asks for the state behind it
      const Floats whole = all(from_start[kChunk - 1]);
      for (int n = 0; n < kState; n++) {
        for (int j = 0; j < kChunk; j += kLanes)
          store(into + n * kChunk + j, load(weight + j) * load(B_columns + n * kChunk + j));
        for (int c = n * kHead; c < (n + 1) * kHead; c += kLanes) store(S + c, carried ? load(S + c) * whole : all(0.0f));
      }
      Operand::template multiply<kHead>(kState, even, into, kChunk, operand + kState * kHead, S, kHead, true);
    }

    for (int i = 0; i < tokens; i++) {
      const int64_t t = start - sizes.lead + i;
      const IO* z = rows[i] + first * kHead;
      IO* o = out + t * inner + first * kHead;
      Floats total = all(0.0f);
      for (int64_t c = 0; c < wide; c += kLanes) {
        Floats v = load(y + i * wide + c);
        if (kept_y) store(kept_y + t * inner + first * kHead + c, v);
        v = v * silu_for<IO>(load(z + c));
        store(o + c, v);
        total += v * v;
      }
      squares[t] = sum(total);
    }
  }
  Operand::finish();
}

template <class IO, class Operand>
void run(const Parameters& p, const Sizes& sizes, const at::Tensor& zxbcdt, float* state, bool fresh, at::Tensor& out,
         const Kept<IO>& kept) {
  const int64_t tokens = sizes.tokens(), inner = sizes.inner(), groups = sizes.groups();
  std::vector<float> squares(sizes.batch * groups * tokens);
  const IO* in = zxbcdt.const_data_ptr<IO>();
  IO* o = out.data_ptr<IO>();
  at::parallel_for(0, sizes.batch * groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) {
      const int64_t b = task / groups, g = task % groups;
      const int64_t first = g * sizes.heads / groups, next = (g + 1) * sizes.heads / groups;
      float* kept_states = kept.states ? kept.states + b * (sizes.chunks() - 1) * sizes.heads * kState * kHead : nullptr;
      scan<IO, Operand>(p, sizes, in + b * sizes.length * sizes.columns(), first, next - first,
                        state + (b * sizes.heads + first) * kState * kHead, fresh, o + b * tokens * inner,
                        squares.data() + task * tokens, kept.y ? kept.y + b * tokens * inner : nullptr, kept_states);
    }
  });
  at::parallel_for(0, sizes.batch * tokens, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      float total = 0;
      for (int64_t g = 0; g < groups; g++) total += squares[(row / tokens * groups + g) * tokens + row % tokens];
      const float scale = 1 / std::sqrt(total / inner + p.eps);
      if (kept.scale) kept.scale[row] = scale;
      IO* v = o + row * inner;
      for (int64_t c = 0; c < inner; c += kLanes) store(v + c, load(v + c) * scale * load(&p.norm_weight[c]));
    }
  });
}

void run_by_type(const Parameters& p, const Sizes& sizes, const at::Tensor& zxbcdt, float* state, bool fresh,
                 at::Tensor& out, at::Tensor* y, at::Tensor* states, at::Tensor* scale) {
  float* kept_states = states ? states->data_ptr<float>() : nullptr;
  float* kept_scale = scale ? scale->data_ptr<float>() : nullptr;
  if (zxbcdt.scalar_type() == at::kFloat) {
    run<float, Single>(p, sizes, zxbcdt, state, fresh, out, {y ? y->data_ptr<float>() : nullptr, kept_states, kept_scale});
    return;
  }
  const Kept<BFloat16> kept{y ? y->data_ptr<BFloat16>() : nullptr, kept_states, kept_scale};
#if defined(VIT_LINEARIZER_HALF_PRODUCTS)
  if (Half::works()) return run<BFloat16, Half>(p, sizes, zxbcdt, state, fresh, out, kept);
#endif
  run<BFloat16, Single>(p, sizes, zxbcdt, state, fresh, out, kept);
}

Sizes read_sizes(const at::Tensor& zxbcdt, const at::Tensor& D, int64_t lead) {
  TORCH_CHECK(zxbcdt.dim() == 3 && zxbcdt.is_contiguous(), "zxbcdt must be contiguous [batch, tokens, columns]");
  TORCH_CHECK(zxbcdt.scalar_type() == at::kFloat || zxbcdt.scalar_type() == at::kBFloat16, "zxbcdt must be fp32 or bf16");
  const Sizes sizes{zxbcdt.size(0), zxbcdt.size(1), lead, D.numel()};
  TORCH_CHECK(zxbcdt.size(2) == sizes.columns(), "zxbcdt must have ", sizes.columns(), " columns");
  TORCH_CHECK(lead >= 0 && lead <= sizes.length, "lead must lie within the tokens");
  return sizes;
}

}  // namespace

// See `ops.native.operators.mixer_core`.
at::Tensor mixer_core(const at::Tensor& zxbcdt, const at::Tensor& conv_weight, const at::Tensor& conv_bias,
                      const at::Tensor& dt_bias, const at::Tensor& A_log, const at::Tensor& D,
                      const at::Tensor& norm_weight, double eps) {
  const Sizes sizes = read_sizes(zxbcdt, D, 0);
  const Parameters p = read_parameters(sizes, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, eps);
  at::Tensor state = at::empty({sizes.batch, sizes.heads, kState, kHead}, at::kFloat);
  at::Tensor out = at::empty({sizes.batch, sizes.length, sizes.inner()}, zxbcdt.options());
  run_by_type(p, sizes, zxbcdt, state.data_ptr<float>(), true, out, nullptr, nullptr, nullptr);
  return out;
}

// The same for the next part of a sequence, whose first `lead` tokens have been seen before.
at::Tensor mixer_core_carrying(const at::Tensor& zxbcdt, const at::Tensor& conv_weight, const at::Tensor& conv_bias,
                               const at::Tensor& dt_bias, const at::Tensor& A_log, const at::Tensor& D,
                               const at::Tensor& norm_weight, double eps, at::Tensor state, int64_t lead) {
  const Sizes sizes = read_sizes(zxbcdt, D, lead);
  const Parameters p = read_parameters(sizes, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, eps);
  TORCH_CHECK(state.scalar_type() == at::kFloat && state.is_contiguous() &&
                  state.numel() == sizes.batch * sizes.heads * kState * kHead,
              "state must be contiguous fp32 [batch, heads, 64, 64]");
  at::Tensor out = at::empty({sizes.batch, sizes.tokens(), sizes.inner()}, zxbcdt.options());
  run_by_type(p, sizes, zxbcdt, state.data_ptr<float>(), false, out, nullptr, nullptr, nullptr);
  return out;
}

// The same, and what its derivative needs: y, states, scale as in `Kept`.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> mixer_core_keeping(
    const at::Tensor& zxbcdt, const at::Tensor& conv_weight, const at::Tensor& conv_bias, const at::Tensor& dt_bias,
    const at::Tensor& A_log, const at::Tensor& D, const at::Tensor& norm_weight, double eps) {
  const Sizes sizes = read_sizes(zxbcdt, D, 0);
  const Parameters p = read_parameters(sizes, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, eps);
  at::Tensor state = at::empty({sizes.batch, sizes.heads, kState, kHead}, at::kFloat);
  at::Tensor out = at::empty({sizes.batch, sizes.length, sizes.inner()}, zxbcdt.options());
  at::Tensor y = at::empty(out.sizes(), out.options());
  at::Tensor states = at::empty({sizes.batch, sizes.chunks() - 1, sizes.heads, kState, kHead}, at::kFloat);
  at::Tensor scale = at::empty({sizes.batch, sizes.length}, at::kFloat);
  run_by_type(p, sizes, zxbcdt, state.data_ptr<float>(), true, out, &y, &states, &scale);
  return {out, y, states, scale};
}

TORCH_LIBRARY_IMPL(vit_linearizer_native, CPU, library) {
  library.impl("mixer_core", &mixer_core);
  library.impl("mixer_core_carrying", &mixer_core_carrying);
  library.impl("mixer_core_keeping", &mixer_core_keeping);
}

}  // namespace vit_linearizer
