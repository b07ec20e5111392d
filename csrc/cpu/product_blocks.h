// Blocking and packing of a product, as templates over a micro-kernel; included by one file per instruction set.
//
// K is cut into blocks. For each, all of A is packed into panels of kRows rows (shared, read from L3 or L2), then
// every thread takes panels of kColumns columns of B, packs each into its own buffer (L2) and multiplies it by all
// panels of A: a panel of A (L1) times a panel of B, accumulated in registers over the K block.
//
// No standard library here: an inline function compiled for this instruction set could replace another file's.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "product.h"

namespace spo {
namespace {

constexpr int kCacheLine = 64;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t rounded_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

inline void* allocate(int64_t bytes) {
  return std::aligned_alloc(kCacheLine, static_cast<size_t>(rounded_up(bytes, kCacheLine)));
}

// One element as float. Specialised, not overloaded: the scalar is known where the loops are compiled.
template <Scalar kScalar>
inline float to_float(const void* data, int64_t index) {
  if constexpr (kScalar == Scalar::kFloat) {
    return static_cast<const float*>(data)[index];
  } else if constexpr (kScalar == Scalar::kHalf) {
    return _cvtsh_ss(static_cast<const uint16_t*>(data)[index]);
  } else {
    const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(data)[index]) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
}

// Panels of `kWidth` lanes: out[(k / step) * kWidth * step + lane * step + k % step], zero beyond `lanes` and `depth`.
// `lane_stride` and `k_stride` are those of the operand; Kernel::kStep values of k lie side by side.
template <typename Kernel, int kWidth, Scalar kScalar>
inline void pack_panel(const Operand& from, int64_t lane_stride, int64_t k_stride, int64_t offset, int64_t lanes,
                       int64_t depth, typename Kernel::Packed* out) {
  constexpr int kStep = Kernel::kStep;
  const int64_t padded = rounded_up(depth, kStep);
  if (lanes == kWidth && depth == padded && lane_stride == 1) {
    for (int64_t k = 0; k < depth; k += kStep, out += kWidth * kStep)
      for (int s = 0; s < kStep; ++s)
        for (int lane = 0; lane < kWidth; ++lane)
          out[lane * kStep + s] = Kernel::template load<kScalar>(from.data, offset + (k + s) * k_stride + lane);
    return;
  }
  // eight lanes at a time keep their cache lines in L1 while k runs along them
  constexpr int kGroup = kWidth % 8 == 0 ? 8 : kWidth;
  for (int first = 0; first < kWidth; first += kGroup)
    for (int64_t k = 0; k < padded; ++k) {
      auto* place = out + (k / kStep) * kWidth * kStep + k % kStep;
      for (int lane = first; lane < first + kGroup; ++lane) {
        const bool inside = lane < lanes && k < depth;
        const int64_t index = offset + k * k_stride + lane * lane_stride;
        place[lane * kStep] = inside ? Kernel::template load<kScalar>(from.data, index) : typename Kernel::Packed{};
      }
    }
}

template <typename Kernel, int kWidth>
inline void pack(const Operand& from, int64_t lane_stride, int64_t k_stride, int64_t offset, int64_t lanes,
                 int64_t depth, typename Kernel::Packed* out) {
  switch (from.scalar) {
    case Scalar::kFloat:
      return pack_panel<Kernel, kWidth, Scalar::kFloat>(from, lane_stride, k_stride, offset, lanes, depth, out);
    case Scalar::kBFloat16:
      return pack_panel<Kernel, kWidth, Scalar::kBFloat16>(from, lane_stride, k_stride, offset, lanes, depth, out);
    case Scalar::kHalf:
      return pack_panel<Kernel, kWidth, Scalar::kHalf>(from, lane_stride, k_stride, offset, lanes, depth, out);
  }
}

template <typename Kernel>
void product(const Operand& a, const Operand& b, float* c, int64_t c_stride, const ProductShape& shape,
             bool accumulate, int threads) {
  using Packed = typename Kernel::Packed;
  if (shape.m == 0 || shape.n == 0) return;
  if (shape.k == 0) {
    for (int64_t row = 0; row < shape.m && !accumulate; ++row)
      std::memset(c + row * c_stride, 0, static_cast<size_t>(shape.n) * sizeof(float));
    return;
  }
  constexpr int64_t kRows = Kernel::kRows, kColumns = Kernel::kColumns, kDepth = Kernel::kDepth;
  const int64_t row_panels = (shape.m + kRows - 1) / kRows, column_panels = (shape.n + kColumns - 1) / kColumns;
  // fewer column panels than threads: cut the rows too, so that every thread has work
  const int64_t wanted = 4 * threads;
  const int64_t row_chunks = column_panels >= wanted ? 1 : smaller((wanted + column_panels - 1) / column_panels,
                                                                    (row_panels + 7) / 8);
  const int64_t chunk = (row_panels + row_chunks - 1) / row_chunks;
  auto* a_panels = static_cast<Packed*>(allocate(row_panels * kRows * kDepth * sizeof(Packed)));
  auto* b_panels = static_cast<Packed*>(allocate(threads * kColumns * kDepth * sizeof(Packed)));
#pragma omp parallel num_threads(threads)
  {
#ifdef _OPENMP
    Packed* b_panel = b_panels + omp_get_thread_num() * kColumns * kDepth;
#else
    Packed* b_panel = b_panels;
#endif
    for (int64_t k = 0; k < shape.k; k += kDepth) {
      const int64_t depth = smaller(kDepth, shape.k - k);
#pragma omp for schedule(static)
      for (int64_t panel = 0; panel < row_panels; ++panel)
        pack<Kernel, kRows>(a, a.row_stride, a.column_stride, panel * kRows * a.row_stride + k * a.column_stride,
                            smaller(kRows, shape.m - panel * kRows), depth, a_panels + panel * kRows * kDepth);
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < column_panels * row_chunks; ++task) {
        const int64_t column = task / row_chunks * kColumns, first = task % row_chunks * chunk;
        const int64_t columns = smaller(kColumns, shape.n - column);
        pack<Kernel, kColumns>(b, b.column_stride, b.row_stride, column * b.column_stride + k * b.row_stride, columns,
                               depth, b_panel);
        for (int64_t panel = first; panel < smaller(first + chunk, row_panels); ++panel)
          Kernel::multiply(a_panels + panel * kRows * kDepth, b_panel, (depth + Kernel::kStep - 1) / Kernel::kStep,
                           c + panel * kRows * c_stride + column, c_stride, smaller(kRows, shape.m - panel * kRows),
                           columns, accumulate || k > 0);
      }
    }
  }
  std::free(b_panels);
  std::free(a_panels);
}

}  // namespace
}  // namespace spo
