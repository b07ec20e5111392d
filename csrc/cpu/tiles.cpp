#include "tiles.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "math.h"

// One build serves every x86-64: the loader picks the clone for the widest vectors the machine has.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define SPO_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SPO_CLONES
#endif

namespace spo {
namespace {

constexpr float kMinusInf = -std::numeric_limits<float>::infinity();

SPO_INLINE bool is_identity(const LogitTransform& f) {
  return f.bias == nullptr && f.scale == 1.0f && f.softcap == 0.0f;
}

// `z` may be `x`.
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
    const float cap = f.softcap, inverse = 1.0f / f.softcap;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) z[i] = cap * fast_tanh(z[i] * inverse);
  }
}

// d logit / d product, from the logit; inverse_cap is 1 / softcap, or 0 without one (then the logit may be -inf).
SPO_INLINE float slope(float logit, float scale, float inverse_cap) {
  const float ratio = inverse_cap == 0.0f ? 0.0f : logit * inverse_cap;
  return scale * (1.0f - ratio * ratio);
}

SPO_INLINE float inverse_cap(const LogitTransform& f) { return f.softcap != 0.0f ? 1.0f / f.softcap : 0.0f; }

template <bool kMoments, bool kRescale>
SPO_INLINE void stats_row(const Tile& tile, const TokenStats& stats, int64_t row, float* scratch) {
  const int64_t n = tile.columns;
  float* x = tile.data + row * n;
  const float* z = scratch != nullptr ? scratch : x;
  if (scratch != nullptr) to_logits(x, scratch, n, tile.transform);
  const int64_t label = tile.labels[row];
  const bool has_label = label >= 0 && label < n;
  if (has_label) stats.label_logit[row] = z[label];

  const float old_max = stats.max[row];
  float new_max = old_max;
#pragma omp simd reduction(max : new_max)
  for (int64_t i = 0; i < n; ++i) new_max = z[i] > new_max ? z[i] : new_max;
  // a row whose columns so far are all -inf would otherwise give exp(-inf + inf) = nan
  const float base = new_max == kMinusInf ? 0.0f : new_max;
  const float drop = old_max - base;
  const float shrink = std::exp(drop);

  const float scale = tile.transform.scale, inverse = inverse_cap(tile.transform);
  // a float that has grown by thousands of nearly equal terms rounds each of them the same way: short sums in
  // float, their sum in double
  double sum = 0.0, shifted_sum = 0.0, square_sum = 0.0;
  float* block_lse = stats.block_lse != nullptr ? stats.block_lse + row * stats.block_lse_stride : nullptr;
  for (int64_t begin = 0; begin < n; begin += kMassBlock) {
    const int64_t end = std::min(begin + kMassBlock, n);
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
        // exp(-inf) * -inf counts as 0
        block_shifted += e == 0.0f ? 0.0f : e * (z[i] - base);
        block_square += e * e;
      }
    }
    if (kRescale) {
#pragma omp simd
      for (int64_t i = begin; i < end; ++i) x[i] = exponentials[i - begin] * slope(z[i], scale, inverse);
    }
    if (block_lse != nullptr) block_lse[begin / kMassBlock] = base + std::log(block);
    sum += block;
    shifted_sum += block_shifted;
    square_sum += block_square;
  }

  const double carried = stats.sum[row] == 0.0f ? 0.0 : static_cast<double>(stats.sum[row]) * shrink;
  if (kMoments) {
    const double moved = carried == 0.0 ? 0.0 : carried * drop;
    stats.shifted_sum[row] = static_cast<float>(stats.shifted_sum[row] * shrink + moved + shifted_sum);
    stats.square_sum[row] = static_cast<float>(stats.square_sum[row] * shrink * shrink + square_sum);
  }
  stats.sum[row] = static_cast<float>(carried + sum);
  stats.max[row] = new_max;
  if (kRescale) {
    stats.rescale[row] = shrink;
    if (has_label) x[label] = 0.0f;
  }
}

// `scratch` holds a row's logits where they differ from its products, so that the tile is left as it is.
SPO_CLONES void stats_rows(const Tile& tile, const TokenStats& stats, int64_t begin, int64_t end, float* scratch) {
  const bool moments = stats.shifted_sum != nullptr, rescale = stats.rescale != nullptr;
  for (int64_t row = begin; row < end; ++row) {
    if (moments && rescale) {
      stats_row<true, true>(tile, stats, row, scratch);
    } else if (moments) {
      stats_row<true, false>(tile, stats, row, scratch);
    } else if (rescale) {
      stats_row<false, true>(tile, stats, row, scratch);
    } else {
      stats_row<false, false>(tile, stats, row, scratch);
    }
  }
}

SPO_INLINE float value_or_zero(const float* values, int64_t row) { return values != nullptr ? values[row] : 0.0f; }

template <bool kExtras>
SPO_INLINE void grad_row(const Tile& tile, const TokenGrads& grads, int64_t row) {
  const int64_t n = tile.columns;
  float* x = tile.data + row * n;
  if (!is_identity(tile.transform)) to_logits(x, x, n, tile.transform);
  const float scale = tile.transform.scale, inverse = inverse_cap(tile.transform);
  const float lse = grads.lse[row];
  const float g_logp = value_or_zero(grads.grad_logp, row);
  const float g_entropy = value_or_zero(grads.grad_entropy, row), entropy = value_or_zero(grads.entropy, row);
  const float g_squares = value_or_zero(grads.grad_log_sum_p2, row), squares = value_or_zero(grads.log_sum_p2, row);
  const float weight = value_or_zero(grads.grad_lse, row) - g_logp - 2.0f * g_squares;
  const int64_t label = tile.labels[row];
  const bool has_label = label >= 0 && label < n;
  const float at_label = has_label ? g_logp * slope(x[label], scale, inverse) : 0.0f;

#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float logit = x[i];
    const float log_p = logit - lse;
    const float p = fast_exp(log_p);
    float grad = p * weight;
    if (kExtras) {
      grad -= p == 0.0f ? 0.0f : g_entropy * p * (log_p + entropy);
      grad += 2.0f * g_squares * fast_exp(2.0f * log_p - squares);
    }
    x[i] = grad * slope(logit, scale, inverse);
  }
  if (has_label) x[label] += at_label;
}

SPO_CLONES void grad_rows(const Tile& tile, const TokenGrads& grads, int64_t begin, int64_t end) {
  const bool extras = grads.grad_entropy != nullptr || grads.grad_log_sum_p2 != nullptr;
  for (int64_t row = begin; row < end; ++row) {
    if (extras) {
      grad_row<true>(tile, grads, row);
    } else {
      grad_row<false>(tile, grads, row);
    }
  }
}

template <typename Rows>
void parallel_rows(int64_t rows, int threads, const Rows& run) {
  constexpr int64_t kBlock = 16;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t begin = 0; begin < rows; begin += kBlock) run(begin, std::min(begin + kBlock, rows));
}

}  // namespace

void tile_stats(const Tile& tile, const TokenStats& stats, int threads) {
  parallel_rows(tile.rows, threads, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(is_identity(tile.transform) ? 0 : tile.columns);
    stats_rows(tile, stats, begin, end, scratch.empty() ? nullptr : scratch.data());
  });
}

void tile_grad(const Tile& tile, const TokenGrads& grads, int threads) {
  parallel_rows(tile.rows, threads, [&](int64_t begin, int64_t end) { grad_rows(tile, grads, begin, end); });
}

}  // namespace spo
