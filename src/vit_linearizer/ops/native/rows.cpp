// Work on one token at a time: RMSNorm, the gate of SwiGLU, and a block's reading order, with their derivatives. Each
// passes over memory once.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "vectors.h"

namespace vit_linearizer {
namespace {

constexpr int64_t kGrain = 16;  // rows worth a thread
// Sums over rows are taken over short stretches first: long running sums would lose digits.
constexpr int64_t kStretch = 64;

// f(pointer type tag) for the two types served.
template <class F>
void by_type(const at::Tensor& t, F f) {
  if (t.scalar_type() == at::kFloat) return f(float());
  TORCH_CHECK(t.scalar_type() == at::kBFloat16, "must be fp32 or bf16, not ", t.scalar_type());
  f(BFloat16());
}

int64_t columns_of(const at::Tensor& t, int64_t dims) {
  TORCH_CHECK(t.is_contiguous() && t.dim() >= dims && t.size(-1) % kLanes == 0,
              "must be contiguous with a multiple of ", kLanes, " columns");
  return t.size(-1);
}

at::Tensor alike(const at::Tensor& gradient, const at::Tensor& t) {
  TORCH_CHECK(gradient.sizes() == t.sizes(), "a gradient must have the shape of what it belongs to");
  return gradient.to(t.scalar_type()).contiguous();
}

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  const int64_t columns = columns_of(x, 1), rows = x.numel() / columns;
  TORCH_CHECK(weight.numel() == columns, "weight must have ", columns, " elements");
  at::Tensor factors = weight.detach().to(at::kFloat).contiguous(), out = at::empty_like(x);
  by_type(x, [&](auto type) {
    using IO = decltype(type);
    const IO* in = x.const_data_ptr<IO>();
    IO* o = out.data_ptr<IO>();
    const float* w = factors.const_data_ptr<float>();
    at::parallel_for(0, rows, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin * columns; row < end * columns; row += columns) {
        Floats total{};
        for (int64_t c = 0; c < columns; c += kLanes) total += load(in + row + c) * load(in + row + c);
        const float scale = 1 / std::sqrt(sum(total) / columns + float(eps));
        for (int64_t c = 0; c < columns; c += kLanes) store(o + row + c, load(in + row + c) * scale * load(w + c));
      }
    });
  });
  return out;
}

// Gradients of x and, in fp32, of weight.
std::tuple<at::Tensor, at::Tensor> rms_norm_backward(const at::Tensor& gout, const at::Tensor& x, const at::Tensor& weight,
                                                     double eps) {
  const int64_t columns = columns_of(x, 1), rows = x.numel() / columns;
  const at::Tensor factors = weight.detach().to(at::kFloat).contiguous(), g = alike(gout, x);
  at::Tensor gx = at::empty_like(x), gweight = at::zeros({columns}, at::kFloat);
  const int64_t stretches = (rows + kStretch - 1) / kStretch;
  std::vector<float> sums(stretches * columns);
  by_type(x, [&](auto type) {
    using IO = decltype(type);
    const IO *in = x.const_data_ptr<IO>(), *gin = g.const_data_ptr<IO>();
    IO* o = gx.data_ptr<IO>();
    const float* w = factors.const_data_ptr<float>();
    at::parallel_for(0, stretches, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin * kStretch; row < std::min(end * kStretch, rows); row++) {
        const int64_t at = row * columns;
        Floats squares{}, along{};
        for (int64_t c = 0; c < columns; c += kLanes) {
          const Floats v = load(in + at + c);
          squares += v * v;
          along += load(gin + at + c) * load(w + c) * v;
        }
        const float scale = 1 / std::sqrt(sum(squares) / columns + float(eps));
        const float dot = sum(along) * scale * scale * scale / columns;
        float* total = &sums[row / kStretch * columns];
        for (int64_t c = 0; c < columns; c += kLanes) {
          const Floats v = load(in + at + c), gv = load(gin + at + c);
          store(o + at + c, gv * load(w + c) * scale - v * dot);
          store(total + c, load(total + c) + gv * v * scale);
        }
      }
    });
  });
  for (int64_t s = 0; s < stretches; s++)
    for (int64_t c = 0; c < columns; c++) gweight.data_ptr<float>()[c] += sums[s * columns + c];
  return {gx, gweight};
}

at::Tensor silu_mul(const at::Tensor& gate, const at::Tensor& x) {
  TORCH_CHECK(x.sizes() == gate.sizes() && x.scalar_type() == gate.scalar_type() && x.is_contiguous(), "must be alike");
  const int64_t columns = columns_of(gate, 1);
  at::Tensor out = at::empty_like(gate);
  by_type(gate, [&](auto type) {
    using IO = decltype(type);
    const IO *g = gate.const_data_ptr<IO>(), *v = x.const_data_ptr<IO>();
    IO* o = out.data_ptr<IO>();
    at::parallel_for(0, gate.numel() / columns, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * columns; i < end * columns; i += kLanes) store(o + i, silu_for<IO>(load(g + i)) * load(v + i));
    });
  });
  return out;
}

// Gradients of gate and x.
std::tuple<at::Tensor, at::Tensor> silu_mul_backward(const at::Tensor& gout, const at::Tensor& gate, const at::Tensor& x) {
  const int64_t columns = columns_of(gate, 1);
  const at::Tensor gin = alike(gout, gate);
  at::Tensor ggate = at::empty_like(gate), gx = at::empty_like(x);
  by_type(gate, [&](auto type) {
    using IO = decltype(type);
    const IO *a = gate.const_data_ptr<IO>(), *b = x.const_data_ptr<IO>(), *g = gin.const_data_ptr<IO>();
    IO *ga = ggate.data_ptr<IO>(), *gb = gx.data_ptr<IO>();
    at::parallel_for(0, gate.numel() / columns, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * columns; i < end * columns; i += kLanes) {
        const Floats v = load(a + i), s = sigmoid(v), go = load(g + i);
        store(gb + i, go * v * s);
        store(ga + i, go * load(b + i) * s * (1.0f + v * (1.0f - s)));
      }
    });
  });
  return {ggate, gx};
}

// Row t of a sequence whose rows but the last are reversed, or not.
int64_t place(int64_t t, int64_t length, bool flip) { return flip && t < length - 1 ? length - 2 - t : t; }

at::Tensor to_reading_order(const at::Tensor& x, bool flip) {
  const int64_t columns = columns_of(x, 3), batch = x.size(0), length = x.size(1);
  at::Tensor out = at::empty({batch, length + 1, columns}, x.options());
  const int64_t stretches = (length + kStretch - 1) / kStretch;
  std::vector<float> sums(batch * stretches * columns);
  by_type(x, [&](auto type) {
    using IO = decltype(type);
    const IO* in = x.const_data_ptr<IO>();
    IO* o = out.data_ptr<IO>();
    at::parallel_for(0, batch * stretches, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; task++) {
        const int64_t b = task / stretches, first = task % stretches * kStretch;
        float* total = &sums[task * columns];
        for (int64_t t = first; t < std::min(first + kStretch, length); t++) {
          const IO* row = in + (b * length + t) * columns;
          std::memcpy(o + (b * (length + 1) + 1 + place(t, length, flip)) * columns, row, columns * sizeof(IO));
          for (int64_t c = 0; c < columns; c += kLanes) store(total + c, load(total + c) + load(row + c));
        }
      }
    });
    for (int64_t b = 0; b < batch; b++)
      for (int64_t c = 0; c < columns; c += kLanes) {
        Floats total{};
        for (int64_t s = 0; s < stretches; s++) total += load(&sums[(b * stretches + s) * columns + c]);
        store(o + b * (length + 1) * columns + c, total / float(length));
      }
  });
  return out;
}

at::Tensor add_from_reading_order(const at::Tensor& x, const at::Tensor& mixed, bool flip) {
  const int64_t columns = columns_of(x, 3), batch = x.size(0), length = x.size(1);
  TORCH_CHECK(mixed.is_contiguous() && mixed.dim() == 3 && mixed.size(0) == batch && mixed.size(1) == length + 1 &&
                  mixed.size(2) == columns,
              "mixed must be contiguous, with one more token than x");
  at::Tensor out = at::empty(x.sizes(), x.options().dtype(c10::promoteTypes(x.scalar_type(), mixed.scalar_type())));
  by_type(x, [&](auto x_type) {
    by_type(mixed, [&](auto mixed_type) {
      by_type(out, [&](auto out_type) {
        const auto* in = x.const_data_ptr<decltype(x_type)>();
        const auto* m = mixed.const_data_ptr<decltype(mixed_type)>();
        auto* o = out.data_ptr<decltype(out_type)>();
        at::parallel_for(0, batch * length, kGrain, [&](int64_t begin, int64_t end) {
          for (int64_t row = begin; row < end; row++) {
            const int64_t b = row / length, t = row % length;
            const auto* from = m + (b * (length + 1) + 1 + place(t, length, flip)) * columns;
            for (int64_t c = 0; c < columns; c += kLanes)
              store(o + row * columns + c, load(in + row * columns + c) + load(from + c));
          }
        });
      });
    });
  });
  return out;
}

at::Tensor to_reading_order_backward(const at::Tensor& gout, bool flip) {
  const int64_t columns = columns_of(gout, 3), batch = gout.size(0), length = gout.size(1) - 1;
  at::Tensor gx = at::empty({batch, length, columns}, gout.options());
  by_type(gout, [&](auto type) {
    using IO = decltype(type);
    const IO* g = gout.const_data_ptr<IO>();
    IO* o = gx.data_ptr<IO>();
    at::parallel_for(0, batch * length, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row++) {
        const IO* mean = g + row / length * (length + 1) * columns;
        const IO* from = mean + (1 + place(row % length, length, flip)) * columns;
        for (int64_t c = 0; c < columns; c += kLanes)
          store(o + row * columns + c, load(from + c) + load(mean + c) / float(length));
      }
    });
  });
  return gx;
}

// The gradient of mixed; that of x is the one that comes in.
at::Tensor add_from_reading_order_backward(const at::Tensor& gout, bool flip) {
  const int64_t columns = columns_of(gout, 3), batch = gout.size(0), length = gout.size(1);
  at::Tensor gmixed = at::empty({batch, length + 1, columns}, gout.options());
  by_type(gout, [&](auto type) {
    using IO = decltype(type);
    const IO* g = gout.const_data_ptr<IO>();
    IO* o = gmixed.data_ptr<IO>();
    at::parallel_for(0, batch * length, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row++) {
        const int64_t first = row / length * (length + 1), t = row % length;
        std::memcpy(o + (first + 1 + place(t, length, flip)) * columns, g + row * columns, columns * sizeof(IO));
        if (t == 0) std::fill(o + first * columns, o + (first + 1) * columns, IO(0));
      }
    });
  });
  return gmixed;
}

}  // namespace

TORCH_LIBRARY_IMPL(vit_linearizer_native, CPU, library) {
  library.impl("rms_norm", &rms_norm);
  library.impl("rms_norm_backward", &rms_norm_backward);
  library.impl("silu_mul", &silu_mul);
  library.impl("silu_mul_backward", &silu_mul_backward);
  library.impl("to_reading_order", &to_reading_order);
  library.impl("to_reading_order_backward", &to_reading_order_backward);
  library.impl("add_from_reading_order", &add_from_reading_order);
  library.impl("add_from_reading_order_backward", &add_from_reading_order_backward);
}

}  // namespace vit_linearizer
