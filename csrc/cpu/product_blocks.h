// Blocking and packing of a product, as templates over a micro-kernel; included by one file per instruction set.
//
// Rows and K are cut into blocks. For each, A is packed into panels of kRows rows (shared, read from L3 or L2), then
// every thread takes panels of kColumns columns of B, packs each into its own buffer (L2) and multiplies it by all
// panels of A: a panel of A (L1) times a panel of B, accumulated in registers over the K block. Where B has too few
// columns for that, its panels are packed with A's, and threads take parts of A's rows.
//
// No standard library here: an inline function compiled for this instruction set could replace another file's.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "product.h"

namespace spo {
namespace {

// 1536 rows of A, or 3 MiB, at once: a panel of B is packed again for each such block, at 1 % of its products' time
constexpr int64_t kBlockPanels = 256;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t rounded_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// The rows or the columns of an operand, from the one numbered `first` on.
struct Axis {
  int64_t stride;
  const int64_t* list;  // null: in order
  int64_t first;

  int64_t operator()(int64_t i) const { return (list == nullptr ? first + i : list[first + i]) * stride; }
};

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
// Kernel::kStep values of k lie side by side.
template <typename Kernel, int kWidth, Scalar kScalar>
inline void pack_panel(const void* data, const Axis& lane_axis, const Axis& k_axis, int64_t lanes, int64_t depth,
                       typename Kernel::Packed* out) {
  constexpr int kStep = Kernel::kStep;
  const int64_t padded = rounded_up(depth, kStep);
  if (lanes == kWidth && depth == padded && lane_axis.stride == 1 && lane_axis.list == nullptr) {
    for (int64_t k = 0; k < depth; k += kStep, out += kWidth * kStep)
      for (int s = 0; s < kStep; ++s) {
        const int64_t offset = lane_axis(0) + k_axis(k + s);
        for (int lane = 0; lane < kWidth; ++lane)
          out[lane * kStep + s] = Kernel::template load<kScalar>(data, offset + lane);
      }
    return;
  }
  // eight lanes at a time keep their cache lines in L1 while k runs along them
  constexpr int kGroup = kWidth % 8 == 0 ? 8 : kWidth;
  for (int first = 0; first < kWidth; first += kGroup) {
    int64_t starts[kGroup];
    for (int lane = 0; lane < kGroup; ++lane) starts[lane] = first + lane < lanes ? lane_axis(first + lane) : 0;
    for (int64_t k = 0; k < padded; ++k) {
      auto* place = out + (k / kStep) * kWidth * kStep + first * kStep + k % kStep;
      const int64_t offset = k < depth ? k_axis(k) : 0;
      for (int lane = 0; lane < kGroup; ++lane) {
        const bool inside = first + lane < lanes && k < depth;
        place[lane * kStep] =
            inside ? Kernel::template load<kScalar>(data, offset + starts[lane]) : typename Kernel::Packed{};
      }
    }
  }
}

template <typename Kernel, int kWidth>
inline void pack(const void* data, Scalar scalar, const Axis& lane_axis, const Axis& k_axis, int64_t lanes,
                 int64_t depth, typename Kernel::Packed* out) {
  switch (scalar) {
    case Scalar::kFloat:
      return pack_panel<Kernel, kWidth, Scalar::kFloat>(data, lane_axis, k_axis, lanes, depth, out);
    case Scalar::kBFloat16:
      return pack_panel<Kernel, kWidth, Scalar::kBFloat16>(data, lane_axis, k_axis, lanes, depth, out);
    case Scalar::kHalf:
      return pack_panel<Kernel, kWidth, Scalar::kHalf>(data, lane_axis, k_axis, lanes, depth, out);
  }
}

template <typename Kernel>
void product(const Operand& a, const Operand& b, const Result& c, const ProductShape& shape, bool accumulate,
             int threads) {
  using Packed = typename Kernel::Packed;
  constexpr int64_t kRows = Kernel::kRows, kColumns = Kernel::kColumns, kDepth = Kernel::kDepth;
  const Axis c_rows{c.row_stride, c.rows, 0};
  if (shape.m == 0 || shape.n == 0) return;
  if (shape.k == 0) {
    for (int64_t row = 0; row < shape.m && !accumulate; ++row)
      std::memset(c.data + c_rows(row), 0, static_cast<size_t>(shape.n) * sizeof(float));
    return;
  }
  const int64_t row_panels = (shape.m + kRows - 1) / kRows, column_panels = (shape.n + kColumns - 1) / kColumns;
  const int64_t blocks = (row_panels + kBlockPanels - 1) / kBlockPanels;
  const int64_t block = (row_panels + blocks - 1) / blocks;
  // fewer column panels than threads could share: cut the rows too, so that every thread has work
  const int64_t wanted = 4 * threads;
  const bool share = threads > 1 && column_panels < wanted;
  const int64_t chunks = share ? smaller((wanted + column_panels - 1) / column_panels, block) : 1;
  const int64_t chunk = (block + chunks - 1) / chunks;
  const int64_t depth_used = rounded_up(smaller(kDepth, shape.k), Kernel::kStep);
  const int64_t a_size = kRows * depth_used, b_size = kColumns * depth_used;
  const int64_t b_first = rounded_up(block * a_size, 64);
  auto* a_panels = static_cast<Packed*>(
      product_scratch((b_first + (share ? column_panels : threads) * b_size) * static_cast<int64_t>(sizeof(Packed))));
  Packed* b_panels = a_panels + b_first;

#pragma omp parallel num_threads(threads)
  {
#ifdef _OPENMP
    Packed* own_panel = b_panels + (share ? 0 : omp_get_thread_num()) * b_size;
#else
    Packed* own_panel = b_panels;
#endif
    const auto pack_a = [&](int64_t panel, int64_t k, int64_t depth, Packed* out) {
      const int64_t row = panel * kRows;
      pack<Kernel, kRows>(a.data, a.scalar, {a.row_stride, a.rows, row}, {a.column_stride, nullptr, k},
                          smaller(kRows, shape.m - row), depth, out);
    };
    const auto pack_b = [&](int64_t panel, int64_t k, int64_t depth, Packed* out) {
      const int64_t column = panel * kColumns;
      pack<Kernel, kColumns>(b.data, b.scalar, {b.column_stride, nullptr, column}, {b.row_stride, b.rows, k},
                             smaller(kColumns, shape.n - column), depth, out);
    };
    for (int64_t first = 0; first < row_panels; first += block)
      for (int64_t k = 0; k < shape.k; k += kDepth) {
        const int64_t depth = smaller(kDepth, shape.k - k), panels = smaller(block, row_panels - first);
        const int64_t shared = share ? column_panels : 0;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < shared; ++task) pack_b(task, k, depth, b_panels + task * b_size);
#pragma omp for schedule(static)
        for (int64_t panel = 0; panel < panels; ++panel)
          pack_a(first + panel, k, depth, a_panels + panel * a_size);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < column_panels * chunks; ++task) {
          const int64_t column_panel = task / chunks, column = column_panel * kColumns;
          const int64_t begin = task % chunks * chunk, end = smaller(begin + chunk, panels);
          const Packed* b_panel = share ? b_panels + column_panel * b_size : own_panel;
          if (!share) pack_b(column_panel, k, depth, own_panel);
          for (int64_t panel = begin; panel < end; ++panel) {
            const int64_t row = (first + panel) * kRows, rows = smaller(kRows, shape.m - row);
            float* places[kRows];
            for (int64_t i = 0; i < rows; ++i) places[i] = c.data + c_rows(row + i) + column;
            Kernel::multiply(a_panels + panel * a_size, b_panel, (depth + Kernel::kStep - 1) / Kernel::kStep, places,
                             rows, smaller(kColumns, shape.n - column), accumulate || k > 0);
          }
        }
      }
  }
}

}  // namespace
}  // namespace spo
