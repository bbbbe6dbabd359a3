// The derivative of a mixer's core (mixer.h) with respect to its input and its parameters.
//
// The chunks of the scan are taken from the last to the first. With the symbols of mixer.cpp, L_ij = e^(a_i - a_j) for
// j <= i, G = C B^T, W = L * G * dt, w_j = e^(a_last - a_j) dt_j, R the gradient of the state behind the chunk, and g for
// gradients of what follows them:
//
//     gx = W^T gy + (w B) R + D gy                    gW = gy x^T (j <= i)          gG = sum over heads of gW * L * dt
//     gC = sum over heads of e^a (gy S^T) + gG B      gB = sum over heads of w (x R^T) + gG^T C
//     R' = e^a_last R + (e^a C)^T gy
//     ga_i = sum_j (gW * W)_ij - sum_k (gW * W)_ki + e^a_i C_i . (gy S^T)_i - w_i B_i . (x R^T)_i,  and at the last token
//            also sum_j w_j B_j . (x R^T)_j + e^a_last (S . R)
//     gdt_j = sum_i (gW * L * G)_ij + e^(a_last - a_j) B_j . (x R^T)_j + A sum_{i >= j} ga_i
//
// What the forward pass keeps is y, the states between chunks and the scale of the norm; the rest is computed again.

#include "mixer.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

namespace vit_linearizer {
namespace {

// Sums over one sequence: what becomes gradients of parameters once all sequences are added up.
struct Sums {
  std::vector<float> dt_bias, A, D, norm_weight;
  explicit Sums(const Sizes& s) : dt_bias(s.heads), A(s.heads), D(s.heads), norm_weight(s.inner()) {}
};

template <class IO>
struct Tensors {
  const IO *zxbcdt, *out, *y, *gout;  // of one sequence
  const float *states, *scale;
  IO* gzxbcdt;  // z and dt come out final, x as the gradient behind the convolution
  float* gBC;   // [tokens, 2 kState], likewise, of this range of heads
};

template <class IO>
void scan_backward(const Parameters& p, const Sizes& sizes, const Tensors<IO>& t, int64_t first, int heads, Sums& sums) {
  const int64_t inner = sizes.inner(), columns = sizes.columns(), wide = int64_t(heads) * kHead, chunk = sizes.chunk();
  float* x = scratch<float>(20, heads * kChunk * kHead);   // for each head
  float* gy = scratch<float>(21, heads * kChunk * kHead);  // for each head
  float* R = scratch<float>(22, heads * kState * kHead);
  float* x_turned = scratch<float>(23, kHead * kChunk);
  float* gy_turned = scratch<float>(24, kHead * kChunk);
  float* B = scratch<float>(6, kChunk * kState);
  float* B_turned = scratch<float>(7, kState * kChunk);
  float* C = scratch<float>(8, kChunk * kState);
  float* C_turned = scratch<float>(25, kState * kChunk);
  float* gram = scratch<float>(9, kChunk * kChunk);
  float* raw = scratch<float>(10, heads * kChunk);
  float* dt = scratch<float>(11, heads * kChunk);
  float* decay = scratch<float>(12, heads * kChunk);
  float* W = scratch<float>(26, kChunk * kChunk);
  float* gW = scratch<float>(27, kChunk * kChunk);
  float* gG = scratch<float>(28, kChunk * kChunk);
  float* gx = scratch<float>(29, kChunk * kHead);
  float* wB = scratch<float>(30, kChunk * kState);
  float* eC = scratch<float>(31, kState * kChunk);
  float* product = scratch<float>(32, kState * kChunk);
  float* gB_turned = scratch<float>(33, kState * kChunk);
  float* gC_turned = scratch<float>(34, kState * kChunk);
  float* gB = scratch<float>(35, kChunk * kState);
  float* gC = scratch<float>(36, kChunk * kState);
  IO* nothing = scratch<IO>(13, columns);
  std::fill(nothing, nothing + columns, IO(0));
  alignas(64) float from_start[kChunk], to_end[kChunk], ga[kChunk], gdt[kChunk], own[kChunk], out_of[kChunk], into[kChunk];

  for (int64_t k = sizes.chunks() - 1; k >= 0; k--) {
    const int64_t start = k * chunk;
    const int tokens = std::min<int64_t>(chunk, sizes.length - start);
    const bool first_chunk = k == 0, last_chunk = k == sizes.chunks() - 1;
    const Rows<IO> rows(sizes, t.zxbcdt, nothing, start, tokens);

    project(p, sizes, rows, tokens, B, C);
    transpose(B, kChunk, kState, B_turned, kChunk);
    transpose(C, kChunk, kState, C_turned, kChunk);
    Single::multiply<kChunk>(tokens, kState, C, kState, B_turned, gram, kChunk, false);
    steps(p, sizes, rows, tokens, first, heads, raw, dt, decay);
    std::fill(gG, gG + kChunk * kChunk, 0.0f);
    std::fill(gB_turned, gB_turned + kState * kChunk, 0.0f);
    std::fill(gC_turned, gC_turned + kState * kChunk, 0.0f);

    // Through the norm and the gate; x again.
    for (int i = 0; i < kChunk; i++) {
      const int64_t row = start + i, at = row * inner + first * kHead;
      float dot = 0, scale = 0;
      if (i < tokens) {
        Floats total = all(0.0f);
        for (int64_t c = 0; c < inner; c += kLanes) total += load(t.gout + row * inner + c) * load(t.out + row * inner + c);
        scale = t.scale[row];
        dot = sum(total) * scale * scale / inner;
      }
      for (int64_t c = 0; c < wide; c += kLanes) {
        const int64_t place = c / kHead * kChunk * kHead + i * kHead + c % kHead;
        if (i >= tokens) {
          store(x + place, all(0.0f));
          store(gy + place, all(0.0f));
          continue;
        }
        const Floats z = load(rows[i] + first * kHead + c), y = load(t.y + at + c), gout = load(t.gout + at + c);
        const Floats s = sigmoid(z), gate = z * s, v = y * gate;
        const Floats gv = gout * load(&p.norm_weight[first * kHead + c]) * scale - v * dot;
        float* gweight = &sums.norm_weight[first * kHead + c];
        store(gweight, load(gweight) + gout * v * scale);
        store(t.gzxbcdt + row * columns + first * kHead + c, gv * y * s * (1.0f + z * (1.0f - s)));
        store(gy + place, gv * gate);
        store(x + place, silu(convolved(p, rows.row + i, inner, first * kHead + c)));
      }
    }

    for (int h = 0; h < heads; h++) {
      const float *a = decay + h * kChunk, *d = dt + h * kChunk, *xh = x + h * kChunk * kHead, *gyh = gy + h * kChunk * kHead;
      const float* S = first_chunk ? nullptr : t.states + ((k - 1) * sizes.heads + first + h) * kState * kHead;
      float* Rh = R + h * kState * kHead;
      const Floats last = all(a[kChunk - 1]);
      const float whole = std::exp(a[kChunk - 1]), skip = p.D[first + h];
      for (int i = 0; i < kChunk; i += kLanes) {
        store(from_start + i, exp(load(a + i)));
        store(to_end + i, exp(last - load(a + i)));
        for (float* g : {ga, gdt, own, out_of, into}) store(g + i, all(0.0f));
      }
      transpose(xh, kChunk, kHead, x_turned, kChunk);
      Single::multiply<kChunk>(tokens, kHead, gyh, kHead, x_turned, gW, kChunk, false);
      for (int i = 0; i < tokens; i++) {
        Floats along = all(0.0f);
        for (int j = 0; j < kChunk; j += kLanes) {
          const int at = i * kChunk + j;
          Floats L = all(0.0f);
          if (j <= i) L = exp(all(a[i]) - load(a + j));
          if (j + kLanes > i)
            for (int n = 0; n < kLanes; n++) L[n] = j + n > i ? 0.0f : L[n];
          const Floats G = load(gram + at), g = load(gW + at), step = load(d + j);
          store(W + at, L * G * step);
          store(gG + at, load(gG + at) + g * L * step);
          Floats both = g * L * G;
          if (j <= i && i < j + kLanes) {  // e^0 moves with no decay: left in, it would cancel but for rounding
            own[i] = both[i - j];
            both[i - j] = 0;
          }
          store(gdt + j, load(gdt + j) + both);
          along += both * step;
        }
        ga[i] = sum(along);
      }
      for (int i = 0; i < kChunk; i += kLanes) {
        store(ga + i, load(ga + i) - load(gdt + i) * load(d + i));
        store(gdt + i, load(gdt + i) + load(own + i));
      }

      Single::multiply<kHead, true>(tokens, tokens, W, kChunk, gyh, gx, kHead, false);
      if (!last_chunk) {
        for (int j = 0; j < tokens; j++)
          for (int n = 0; n < kState; n += kLanes)
            store(wB + j * kState + n, load(B + j * kState + n) * (to_end[j] * d[j]));
        Single::multiply<kHead>(tokens, kState, wB, kState, Rh, gx, kHead, true);
        Single::multiply<kChunk>(kState, kHead, Rh, kHead, x_turned, product, kChunk, false);
        for (int n = 0; n < kState; n++)
          for (int j = 0; j < kChunk; j += kLanes) {
            const int at = n * kChunk + j;
            store(into + j, load(into + j) + load(B_turned + at) * load(product + at));
            store(gB_turned + at, load(gB_turned + at) + load(to_end + j) * load(d + j) * load(product + at));
          }
        Floats total = all(0.0f);
        for (int j = 0; j < kChunk; j += kLanes) {
          const Floats g = load(to_end + j) * load(into + j);
          store(gdt + j, load(gdt + j) + g);
          store(ga + j, load(ga + j) - g * load(d + j));
          total += g * load(d + j);
        }
        ga[tokens - 1] += sum(total);
      }
      if (!first_chunk) {
        transpose(gyh, kChunk, kHead, gy_turned, kChunk);
        Single::multiply<kChunk>(kState, kHead, S, kHead, gy_turned, product, kChunk, false);
        for (int n = 0; n < kState; n++)
          for (int i = 0; i < kChunk; i += kLanes) {
            const int at = n * kChunk + i;
            store(eC + at, load(from_start + i) * load(C_turned + at));
            store(gC_turned + at, load(gC_turned + at) + load(from_start + i) * load(product + at));
            store(out_of + i, load(out_of + i) + load(eC + at) * load(product + at));
          }
        for (int i = 0; i < kChunk; i += kLanes) store(ga + i, load(ga + i) + load(out_of + i));
        Floats total = all(0.0f);
        for (int n = 0; n < kState * kHead; n += kLanes) {
          const Floats r = last_chunk ? all(0.0f) : load(Rh + n) * whole;
          total += r * load(S + n);
          store(Rh + n, r);
        }
        ga[tokens - 1] += sum(total);
        Single::multiply<kHead>(kState, tokens, eC, kChunk, gyh, Rh, kHead, true);
      }

      Floats through = all(0.0f);
      for (int i = 0; i < tokens; i++)
        for (int c = 0; c < kHead; c += kLanes) {
          const Floats g = load(gyh + i * kHead + c);
          through += g * load(xh + i * kHead + c);
          store(t.gzxbcdt + (start + i) * columns + inner + (first + h) * kHead + c, load(gx + i * kHead + c) + g * skip);
        }
      sums.D[first + h] += sum(through);
      float later = 0, gA = 0, gbias = 0;
      for (int i = tokens - 1; i >= 0; i--) {
        later += ga[i];
        gA += later * d[i];
        const float graw = (gdt[i] + p.A[first + h] * later) / (1 + std::exp(-raw[h * kChunk + i]));
        gbias += graw;
        t.gzxbcdt[(start + i) * columns + inner + sizes.conv() + first + h] = graw;
      }
      sums.A[first + h] += gA;
      sums.dt_bias[first + h] += gbias;
    }

    transpose(gB_turned, kState, kChunk, gB, kState);
    transpose(gC_turned, kState, kChunk, gC, kState);
    Single::multiply<kState>(tokens, tokens, gG, kChunk, B, gC, kState, true);
    Single::multiply<kState, true>(tokens, tokens, gG, kChunk, C, gB, kState, true);
    for (int i = 0; i < tokens; i++) {
      float* row = t.gBC + (start + i) * 2 * kState;
      std::copy(gB + i * kState, gB + (i + 1) * kState, row);
      std::copy(gC + i * kState, gC + (i + 1) * kState, row + kState);
    }
  }
}

// Through the convolution, kLanes channels of all sequences: what stands in gzxbcdt as gradient behind it is replaced by
// the one before it, from the last token to the first. Channels of B and C come from gBC, summed over groups of heads.
template <class IO>
void conv_backward(const Parameters& p, const Sizes& sizes, const IO* zxbcdt, IO* gzxbcdt, const float* gBC, int64_t groups,
                   int64_t c, float* gweight, float* gbias) {
  const int64_t columns = sizes.columns(), inner = sizes.inner(), channel = inner + c;
  const float* weight[kWidth];
  for (int s = 0; s < kWidth; s++) weight[s] = &p.conv_weight[s][c];
  Floats gw[kWidth], gb = all(0.0f);
  for (Floats& g : gw) g = all(0.0f);
  for (int64_t b = 0; b < sizes.batch; b++) {
    const IO* in = zxbcdt + b * sizes.length * columns + channel;
    IO* out = gzxbcdt + b * sizes.length * columns + channel;
    Floats later[kWidth - 1];  // gradients before the SiLU of the tokens behind
    for (Floats& g : later) g = all(0.0f);
    for (int64_t t = sizes.length - 1; t >= 0; t--) {
      Floats taps[kWidth], v = load(&p.conv_bias[c]);
      for (int s = 0; s < kWidth; s++) {
        const int64_t from = t - (kWidth - 1) + s;
        taps[s] = from < 0 ? all(0.0f) : load(in + from * columns);
        v += taps[s] * load(weight[s]);
      }
      Floats g = all(0.0f);
      if (c < inner) {
        g = load(out + t * columns);
      } else {
        for (int64_t k = 0; k < groups; k++)
          g += load(gBC + (((b * groups + k) * sizes.length) + t) * 2 * kState + c - inner);
      }
      const Floats s = sigmoid(v);
      g = g * s * (1.0f + v * (1.0f - s));
      gb += g;
      for (int k = 0; k < kWidth; k++) gw[k] += g * taps[k];
      Floats total = g * load(weight[kWidth - 1]);
      for (int k = 0; k < kWidth - 1; k++) total += later[k] * load(weight[kWidth - 2 - k]);
      store(out + t * columns, total);
      for (int k = kWidth - 2; k > 0; k--) later[k] = later[k - 1];
      later[0] = g;
    }
  }
  for (int s = 0; s < kWidth; s++)
    for (int k = 0; k < kLanes; k++) gweight[(c + k) * kWidth + s] = gw[s][k];
  store(gbias + c, gb);
}

template <class IO>
void run(const Parameters& p, const Sizes& sizes, const at::Tensor& zxbcdt, const at::Tensor& out, const at::Tensor& y,
         const at::Tensor& states, const at::Tensor& scale, const at::Tensor& gout, at::Tensor& gzxbcdt, float* gweight,
         float* gbias, std::vector<Sums>& sums) {
  const int64_t length = sizes.length, inner = sizes.inner(), groups = sizes.groups();
  at::Tensor gBC = at::empty({sizes.batch * groups, length, 2 * kState}, at::kFloat);
  at::parallel_for(0, sizes.batch * groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) {
      const int64_t b = task / groups, g = task % groups;
      const int64_t first = g * sizes.heads / groups, next = (g + 1) * sizes.heads / groups;
      const Tensors<IO> t{zxbcdt.const_data_ptr<IO>() + b * length * sizes.columns(),
                          out.const_data_ptr<IO>() + b * length * inner,
                          y.const_data_ptr<IO>() + b * length * inner,
                          gout.const_data_ptr<IO>() + b * length * inner,
                          states.const_data_ptr<float>() + b * (sizes.chunks() - 1) * sizes.heads * kState * kHead,
                          scale.const_data_ptr<float>() + b * length,
                          gzxbcdt.data_ptr<IO>() + b * length * sizes.columns(),
                          gBC.data_ptr<float>() + task * length * 2 * kState};
      scan_backward<IO>(p, sizes, t, first, next - first, sums[b]);
    }
  });
  at::parallel_for(0, sizes.conv() / kLanes, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block++)
      conv_backward<IO>(p, sizes, zxbcdt.const_data_ptr<IO>(), gzxbcdt.data_ptr<IO>(), gBC.const_data_ptr<float>(), groups,
                        block * kLanes, gweight, gbias);
  });
}

// Gradients of zxbcdt, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight; those of parameters in fp32.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> mixer_core_backward(
    const at::Tensor& gout, const at::Tensor& zxbcdt, const at::Tensor& conv_weight, const at::Tensor& conv_bias,
    const at::Tensor& dt_bias, const at::Tensor& A_log, const at::Tensor& D, const at::Tensor& norm_weight, double eps,
    const at::Tensor& out, const at::Tensor& y, const at::Tensor& states, const at::Tensor& scale) {
  const Sizes sizes{zxbcdt.size(0), zxbcdt.size(1), 0, D.numel()};
  const Parameters p = read_parameters(sizes, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, eps);
  const at::Tensor g = gout.to(zxbcdt.scalar_type()).contiguous();
  at::Tensor gzxbcdt = at::empty_like(zxbcdt);
  at::Tensor gweight = at::empty(conv_weight.sizes(), at::kFloat), gbias = at::empty({sizes.conv()}, at::kFloat);
  at::Tensor gdt_bias = at::zeros({sizes.heads}, at::kFloat), gA_log = at::zeros({sizes.heads}, at::kFloat),
             gD = at::zeros({sizes.heads}, at::kFloat), gnorm = at::zeros({sizes.inner()}, at::kFloat);
  std::vector<Sums> sums(sizes.batch, Sums(sizes));
  float *gw = gweight.data_ptr<float>(), *gb = gbias.data_ptr<float>();
  if (zxbcdt.scalar_type() == at::kFloat)
    run<float>(p, sizes, zxbcdt, out, y, states, scale, g, gzxbcdt, gw, gb, sums);
  else
    run<BFloat16>(p, sizes, zxbcdt, out, y, states, scale, g, gzxbcdt, gw, gb, sums);
  for (const Sums& s : sums) {
    for (int64_t h = 0; h < sizes.heads; h++) {
      gdt_bias.data_ptr<float>()[h] += s.dt_bias[h];
      gA_log.data_ptr<float>()[h] += s.A[h] * p.A[h];
      gD.data_ptr<float>()[h] += s.D[h];
    }
    for (int64_t c = 0; c < sizes.inner(); c++) gnorm.data_ptr<float>()[c] += s.norm_weight[c];
  }
  return {gzxbcdt, gweight, gbias, gdt_bias, gA_log, gD, gnorm};
}

}  // namespace

TORCH_LIBRARY_IMPL(vit_linearizer_native, CPU, library) { library.impl("mixer_core_backward", &mixer_core_backward); }

}  // namespace vit_linearizer
