// A number that changes with the contents of a tensor, computed as fast as memory is read.
//
// Every lane takes in its words one by one, h = (h ^ word) * odd, folded: for a given h a permutation of words and for a
// given word one of h. So a change of one word of a lane always shows, and any other goes unseen once in 2^64 times.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "vectors.h"

namespace vit_linearizer {
namespace {

typedef uint64_t Words __attribute__((vector_size(kBytes)));

constexpr int kWords = kBytes / 8;
constexpr int kChains = 512 / kBytes;  // 64 lanes on every machine, in vectors that do not wait for each other
constexpr int64_t kStep = kChains * kBytes;
constexpr int64_t kStretch = 128 * kStep;  // bytes that one thread takes at a time
constexpr uint64_t kOdd = 0x9e3779b97f4a7c15;

template <class T>
VL_INLINE T mixed(T h, T word) {
  h = (h ^ word) * kOdd;
  return h ^ (h >> 32);
}

uint64_t of_stretch(const char* bytes, int64_t count) {
  Words h[kChains];
  for (int c = 0; c < kChains; c++)
    for (int w = 0; w < kWords; w++) h[c][w] = uint64_t(c * kWords + w);
  for (int64_t at = 0; at < count; at += kStep) {
    char last[kStep] = {};
    const char* from = bytes + at;
    if (count - at < kStep) from = static_cast<const char*>(std::memcpy(last, from, count - at));
    for (int c = 0; c < kChains; c++) {
      Words words;
      std::memcpy(&words, from + c * kBytes, kBytes);
      h[c] = mixed(h[c], words);
    }
  }
  uint64_t total = uint64_t(count);
  for (int c = 0; c < kChains; c++)
    for (int w = 0; w < kWords; w++) total = mixed(total, uint64_t(h[c][w]));
  return total;
}

int64_t fingerprint(const at::Tensor& t) {
  TORCH_CHECK(t.is_contiguous(), "must be contiguous");
  const char* bytes = static_cast<const char*>(t.const_data_ptr());
  const int64_t count = t.nbytes(), stretches = (count + kStretch - 1) / kStretch;
  std::vector<uint64_t> parts(stretches);
  at::parallel_for(0, stretches, 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; s++)
      parts[s] = of_stretch(bytes + s * kStretch, std::min(kStretch, count - s * kStretch));
  });
  uint64_t total = 0;
  for (uint64_t part : parts) total = mixed(total, part);
  return int64_t(total);
}

}  // namespace

TORCH_LIBRARY_IMPL(vit_linearizer_native, CPU, library) { library.impl("fingerprint", &fingerprint); }

}  // namespace vit_linearizer
