#include "tiles.h"

#include <algorithm>
#include <vector>

#include "../scalar.h"
#include "instruction_set.h"
#include "math.h"

namespace spo {
namespace {

SPO_INLINE bool is_identity(const LogitTransform& f) {
  return f.bias == nullptr && f.scale == 1.0f && f.softcap == 0.0f;
}

SPO_INLINE void to_logits(const float* x, float* z, int64_t n, const LogitTransform& f) {
  const float scale = f.scale;
  if (f.bias != nullptr) {
    const float* bias = f.bias;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) z[i] = (x[i] + bias[i]) * scale;
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) z[i] = x[i] * scale;
  }
  if (f.softcap != 0.0f) {
    const float cap = f.softcap, inverse = inverse_cap(f);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) z[i] = cap * tanh_of<CpuMath>(z[i] * inverse);
  }
}

// Asks for the block that comes kAhead columns, or as many in later rows, after this one: a machine's own prefetching
// ends with each piece of a row, here 4 KiB apart from the next.
template <typename T>
SPO_INLINE void prefetch_ahead(const T* data, int64_t stride, int64_t rows, int64_t columns, int64_t row,
                               int64_t begin) {
  constexpr int64_t kAhead = 2048, kLine = 64 / sizeof(T);
  const int64_t place = begin + kAhead, ahead = row + place / columns;
  if (ahead >= rows) return;
  const T* from = data + ahead * stride + place % columns;
  for (int64_t i = 0; i < kMassBlock; i += kLine) __builtin_prefetch(from + i);
}

// `out` is written where it is not null; it may be the tile.
template <bool kMoments, typename Out>
SPO_INLINE void stats_row(const Tile& tile, Out* out, const TokenStats& stats, int64_t row, float* scratch) {
  const int64_t n = tile.columns;
  const float* x = tile.data + row * tile.stride;
  const float* z = scratch != nullptr ? scratch : x;
  if (scratch != nullptr) to_logits(x, scratch, n, tile.transform);
  const int64_t label = tile.labels[row];
  const bool has_label = label >= 0 && label < n;
  if (has_label) stats.label_logit[row] = z[label];

  const float old_max = stats.max[row];
  float new_max = old_max;
#pragma omp simd reduction(max : new_max)
  for (int64_t i = 0; i < n; ++i) new_max = z[i] > new_max ? z[i] : new_max;
  const float base = finite_base(new_max);
  const float drop = old_max - base;
  const float shrink = std::exp(drop);

  const float scale = tile.transform.scale, inverse = inverse_cap(tile.transform);
  // a float that has grown by thousands of nearly equal terms rounds each of them the same way: short sums in
  // float, their sum in double
  Sums<double> sums{};
  float* block_lse = stats.block_lse != nullptr ? stats.block_lse + row * stats.block_lse_stride : nullptr;
  for (int64_t begin = 0; begin < n; begin += kMassBlock) {
    const int64_t end = std::min(begin + kMassBlock, n);
    prefetch_ahead(tile.data, tile.stride, tile.rows, n, row, begin);
    // Through memory, so that the sums see rounded values: contracted into a multiply-add they would differ in the
    // last bit between the instances of this template.
    float exponentials[kMassBlock];
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) exponentials[i - begin] = fast_exp(z[i] - base);
    float block = 0.0f, block_shifted = 0.0f, block_square = 0.0f;
#pragma omp simd reduction(+ : block, block_shifted, block_square)
    for (int64_t i = begin; i < end; ++i) {
      const float e = exponentials[i - begin];
      block += e;
      if (kMoments) {
        block_shifted += moment(e, z[i] - base);
        block_square += e * e;
      }
    }
    if (out != nullptr) {
#pragma omp simd
      for (int64_t i = begin; i < end; ++i) round_to(exponentials[i - begin] * slope(z[i], scale, inverse), out[i]);
    }
    if (block_lse != nullptr) block_lse[begin / kMassBlock] = base + std::log(block);
    sums = sums + Sums<double>{block, block_shifted, block_square};
  }

  const Sums<double> old{stats.sum[row], kMoments ? stats.shifted_sum[row] : 0.0f,
                         kMoments ? stats.square_sum[row] : 0.0f};
  sums = rebased(old, drop, shrink) + sums;
  stats.sum[row] = static_cast<float>(sums.sum);
  if (kMoments) {
    stats.shifted_sum[row] = static_cast<float>(sums.shifted);
    stats.square_sum[row] = static_cast<float>(sums.square);
  }
  stats.max[row] = new_max;
  if (out != nullptr) {
    stats.rescale[row] = shrink;
    if (has_label) out[label] = {};
  }
}

SPO_INLINE bool is_bfloat16(const TileOut& out) { return out.scalar == Scalar::kBFloat16; }

template <typename Out>
SPO_INLINE Out* out_row(const TileOut& out, int64_t row) {
  return static_cast<Out*>(out.data) + row * out.stride;
}

// `scratch` holds a row's logits where they differ from its products, so that the tile is left as it is.
SPO_INLINE void stats_rows(const Tile& tile, const TileOut& out, const TokenStats& stats, int64_t begin, int64_t end,
                           float* scratch) {
  const bool moments = stats.shifted_sum != nullptr, rescale = stats.rescale != nullptr;
  for (int64_t row = begin; row < end; ++row) {
    float* floats = rescale && !is_bfloat16(out) ? out_row<float>(out, row) : nullptr;
    if (rescale && is_bfloat16(out) && moments) {
      stats_row<true>(tile, out_row<BFloat16>(out, row), stats, row, scratch);
    } else if (rescale && is_bfloat16(out)) {
      stats_row<false>(tile, out_row<BFloat16>(out, row), stats, row, scratch);
    } else if (moments) {
      stats_row<true>(tile, floats, stats, row, scratch);
    } else {
      stats_row<false>(tile, floats, stats, row, scratch);
    }
  }
}

template <bool kMoments, typename Out>
SPO_INLINE void grad_row(const Tile& tile, Out* out, const TokenGrads& grads, int64_t row) {
  const int64_t n = tile.columns;
  const float* x = tile.data + row * tile.stride;
  const bool identity = is_identity(tile.transform);
  const float scale = tile.transform.scale, inverse = inverse_cap(tile.transform);
  const RowGrads g = row_grads(grads, row);
  const int64_t label = tile.labels[row];
  for (int64_t begin = 0; begin < n; begin += kMassBlock) {
    const int64_t count = std::min(kMassBlock, n - begin);
    prefetch_ahead(tile.data, tile.stride, tile.rows, n, row, begin);
    float logits[kMassBlock];
    const float* z = x + begin;
    if (!identity) {
      LogitTransform transform = tile.transform;
      if (transform.bias != nullptr) transform.bias += begin;
      to_logits(z, logits, count, transform);
      z = logits;
    }
    const bool has_label = label >= begin && label < begin + count;
    const float z_label = has_label ? z[label - begin] : 0.0f;
    float values[kMassBlock];
#pragma omp simd
    for (int64_t i = 0; i < count; ++i)
      values[i] = logit_grad<CpuMath, kMoments>(z[i], g) * slope(z[i], scale, inverse);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) round_to(values[i], out[begin + i]);
    if (has_label)
      round_to((logit_grad<CpuMath, kMoments>(z_label, g) + g.logp) * slope(z_label, scale, inverse), out[label]);
  }
}

SPO_INLINE void grad_rows(const Tile& tile, const TileOut& out, const TokenGrads& grads, int64_t begin, int64_t end) {
  const bool moments = grads.grad_entropy != nullptr || grads.grad_log_sum_p2 != nullptr;
  for (int64_t row = begin; row < end; ++row) {
    if (is_bfloat16(out) && moments) {
      grad_row<true>(tile, out_row<BFloat16>(out, row), grads, row);
    } else if (is_bfloat16(out)) {
      grad_row<false>(tile, out_row<BFloat16>(out, row), grads, row);
    } else if (moments) {
      grad_row<true>(tile, out_row<float>(out, row), grads, row);
    } else {
      grad_row<false>(tile, out_row<float>(out, row), grads, row);
    }
  }
}

template <typename T>
SPO_INLINE void scaled_row(T* data, int64_t stride, int64_t rows, int64_t columns, int64_t row, float factor) {
  T* x = data + row * stride;
  for (int64_t begin = 0; begin < columns; begin += kMassBlock) {
    const int64_t end = std::min(begin + kMassBlock, columns);
    prefetch_ahead(data, stride, rows, columns, row, begin);
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) round_to(to_float(x[i]) * factor, x[i]);
  }
}

SPO_INLINE void scaled_rows(const TileOut& x, int64_t rows, int64_t columns, const float* factors, int64_t begin,
                            int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (factors[row] == 1.0f) continue;
    if (is_bfloat16(x)) {
      scaled_row(static_cast<BFloat16*>(x.data), x.stride, rows, columns, row, factors[row]);
    } else {
      scaled_row(static_cast<float*>(x.data), x.stride, rows, columns, row, factors[row]);
    }
  }
}

template <typename Rows>
void parallel_rows(int64_t rows, [[maybe_unused]] int threads, const Rows& run) {
  constexpr int64_t kBlock = 16;
  if (rows <= kBlock) {
    // one thread's work anyway, and starting a team takes 1 us and more
    if (rows > 0) run(0, rows);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t begin = 0; begin < rows; begin += kBlock) run(begin, std::min(begin + kBlock, rows));
}

struct Kernels {
  void (*stats)(const Tile&, const TileOut&, const TokenStats&, int64_t begin, int64_t end, float* scratch);
  void (*grad)(const Tile&, const TileOut&, const TokenGrads&, int64_t begin, int64_t end);
  void (*scale)(const TileOut&, int64_t rows, int64_t columns, const float* factors, int64_t begin, int64_t end);
};

// The bodies above inlined into functions for one instruction set, which vectorises them for it.
// NOLINTBEGIN(bugprone-macro-parentheses): a function's attribute
#define SPO_BUILD(Name, attribute)                                                                                    \
  struct Name {                                                                                                       \
    attribute static void stats(const Tile& tile, const TileOut& out, const TokenStats& stats, int64_t begin,         \
                                int64_t end, float* scratch) {                                                        \
      stats_rows(tile, out, stats, begin, end, scratch);                                                              \
    }                                                                                                                 \
    attribute static void grad(const Tile& tile, const TileOut& out, const TokenGrads& grads, int64_t begin,          \
                               int64_t end) {                                                                         \
      grad_rows(tile, out, grads, begin, end);                                                                        \
    }                                                                                                                 \
    attribute static void scale(const TileOut& x, int64_t rows, int64_t columns, const float* factors, int64_t begin, \
                                int64_t end) {                                                                        \
      scaled_rows(x, rows, columns, factors, begin, end);                                                             \
    }                                                                                                                 \
    static constexpr Kernels kernels{stats, grad, scale};                                                             \
  };
SPO_BUILD(Portable, )
SPO_BUILD(Avx2, SPO_AVX2)
SPO_BUILD(Avx512, SPO_AVX512)
// NOLINTEND(bugprone-macro-parentheses)

const Kernels& kernels() {
  switch (instruction_set()) {
    case InstructionSet::kAvx512:
      return Avx512::kernels;
    case InstructionSet::kAvx2:
      return Avx2::kernels;
    default:
      return Portable::kernels;
  }
}

}  // namespace

void tile_stats(const Tile& tile, const TileOut& out, const TokenStats& stats, int threads) {
  parallel_rows(tile.rows, threads, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(is_identity(tile.transform) ? 0 : tile.columns);
    kernels().stats(tile, out, stats, begin, end, scratch.empty() ? nullptr : scratch.data());
  });
}

void tile_grad(const Tile& tile, const TileOut& out, const TokenGrads& grads, int threads) {
  parallel_rows(tile.rows, threads, [&](int64_t begin, int64_t end) { kernels().grad(tile, out, grads, begin, end); });
}

void scale_rows(const TileOut& x, int64_t rows, int64_t columns, const float* factors, int threads) {
  parallel_rows(rows, threads,
                [&](int64_t begin, int64_t end) { kernels().scale(x, rows, columns, factors, begin, end); });
}

}  // namespace spo
