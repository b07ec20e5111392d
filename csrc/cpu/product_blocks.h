// Blocking and packing of a product, as templates over a micro-kernel; included by one file per instruction set.
//
// Rows and K are cut into blocks, each a step. In it A is packed (shared, read from L3 or L2): each row by itself, with
// K side by side, where it does not lie like that already, or, with kRowPanels, kRows rows at a time, which are then
// side by side. Every thread takes kGroup panels of kColumns columns of B, packs them into its own buffer (L2) and
// multiplies them by kRows rows of A at a time, accumulated in registers over the K block. Where B has too few columns
// for that, its panels are packed before, for all threads, which then take parts of A's rows.
//
// What is packed consists of units of 4 bytes: kStep values of k of one row of A or column of B ("lane"). A vector of
// units is loaded along k of one lane, or along lanes at one step of k, whichever lie side by side in the operand;
// where the packed form has the other order, a square of units is transposed in registers.
//
// No standard library here: an inline function compiled for this instruction set could replace another file's.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "product.h"
#include "team.h"

namespace spo {
namespace {

// 2048 rows of A, or 4 MiB, at once: a panel of B is packed again for each such block, at 1 % of its products' time
constexpr int64_t kBlockRows = 2048;
// multiply-adds that make another thread worth waking: about 4 us of work
constexpr int64_t kThreadWork = 1 << 19;
// lanes side by side are a cache line or two per k, far apart: no machine prefetches that by itself
constexpr int64_t kPrefetch = 16;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }
inline int64_t pieces(int64_t value, int64_t step) { return (value + step - 1) / step; }
inline int64_t rounded_up(int64_t value, int64_t step) { return pieces(value, step) * step; }

// The rows or the columns of an operand, from the one numbered `first` on.
struct Axis {
  int64_t stride;
  const int64_t* list;  // null: in order
  int64_t first;

  int64_t operator()(int64_t i) const { return (list == nullptr ? first + i : list[first + i]) * stride; }
  bool side_by_side() const { return stride == 1 && list == nullptr; }
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

// The cache lines of `count` elements.
template <Scalar kScalar>
inline void prefetch(const void* data, int64_t index, int64_t count) {
  constexpr int64_t kSize = kScalar == Scalar::kFloat ? 4 : 2;
  for (int64_t i = 0; i < count; i += 64 / kSize)
    _mm_prefetch(static_cast<const char*>(data) + (index + i) * kSize, _MM_HINT_T0);
}

// A part of an operand, `lanes` by `depth`; beyond it there are zeros.
template <typename Kernel, Scalar kScalar>
struct Source {
  using Units = typename Kernel::Units;
  using Packed = typename Kernel::Packed;
  static constexpr int64_t kLanes = Kernel::kLanes, kStep = Kernel::kStep, kSquare = kLanes * kStep;

  const void* data;
  Axis lane_axis, k_axis;
  int64_t lanes, depth;

  // kLanes steps of k of one lane
  Units along_k(int64_t lane, int64_t k) const {
    const int64_t count = lane < lanes ? smaller(kSquare, depth - k) : 0;
    Packed values[kSquare] = {};
    for (int64_t i = 0; i < count; ++i)
      values[i] = Kernel::template load<kScalar>(data, lane_axis(lane) + k_axis(k + i));
    return Kernel::load_units(values);
  }

  // kLanes lanes by as many steps of k, each vector along k
  void square(int64_t lane, int64_t k, Units (&units)[kLanes]) const {
    if (lane + kLanes <= lanes && k + kSquare <= depth && k_axis.side_by_side())
      for (int64_t i = 0; i < kLanes; ++i)
        units[i] = Kernel::template load_along_k<kScalar>(data, lane_axis(lane + i) + k_axis(k));
    else
      for (int64_t i = 0; i < kLanes; ++i) units[i] = along_k(lane + i, k);
  }

  // twice kLanes lanes at one step of k
  void along_lanes(int64_t lane, int64_t k, Units (&units)[2]) const {
    const int64_t count = smaller(2 * kLanes, lanes - lane), steps = smaller(kStep, depth - k);
    if (count == 2 * kLanes && steps == kStep && lane_axis.side_by_side()) {
      const int64_t start = lane_axis(lane);
      for (int64_t ahead = k + kPrefetch; ahead < smaller(k + kPrefetch + kStep, depth); ++ahead)
        prefetch<kScalar>(data, start + k_axis(ahead), 2 * kLanes);
      Kernel::template load_along_lanes<kScalar>(data, start + k_axis(k), start + k_axis(k + kStep - 1), units);
      return;
    }
    Packed values[2][kSquare] = {};
    for (int64_t s = 0; s < steps; ++s)
      for (int64_t i = 0; i < count; ++i)
        values[i / kLanes][i % kLanes * kStep + s] =
            Kernel::template load<kScalar>(data, lane_axis(lane + i) + k_axis(k + s));
    for (int64_t half = 0; half < 2; ++half) units[half] = Kernel::load_units(values[half]);
  }

  // out[lane * row_size + k]
  void pack_rows(Packed* out, int64_t row_size) const {
    const auto store = [=, this](int64_t lane, int64_t k, const Units(&units)[kLanes]) {
      for (int64_t i = 0; i < smaller(kLanes, lanes - lane); ++i)
        Kernel::store_units(out + (lane + i) * row_size + k, units[i]);
    };
    if (!lane_axis.side_by_side()) {
      for (int64_t lane = 0; lane < lanes; lane += kLanes)
        for (int64_t k = 0; k < depth; k += kSquare) {
          Units units[kLanes];
          square(lane, k, units);
          store(lane, k, units);
        }
      return;
    }
    for (int64_t k = 0; k < depth; k += kSquare)
      for (int64_t lane = 0; lane < lanes; lane += 2 * kLanes) {
        Units units[2][kLanes], both[2];
        for (int64_t i = 0; i < kLanes; ++i) {
          along_lanes(lane, k + i * kStep, both);
          units[0][i] = both[0];
          units[1][i] = both[1];
        }
        for (int64_t half = 0; half < 2; ++half) {
          Kernel::transpose(units[half]);
          store(lane + half * kLanes, k, units[half]);
        }
      }
  }

  // out[lane / kRows * panel_size + k * kRows + lane % kRows] of the first `count` lanes. kLanes are written at once:
  // what is too much at one k is written over by the next, and beyond the last k there is room.
  void pack_row_panels(Packed* out, int64_t panel_size, int64_t count) const {
    constexpr int64_t kRows = Kernel::kRows;
    if (k_axis.side_by_side()) {
      for (int64_t lane = 0; lane < count; lane += kRows, out += panel_size)
        for (int64_t k = 0; k < depth; k += kSquare) {
          Units units[kLanes];
          square(lane, k, units);
          Kernel::transpose(units);
          for (int64_t i = 0; i < smaller(kSquare, depth - k); ++i)
            Kernel::store_units(out + (k + i) * kRows, units[i]);
        }
      return;
    }
    for (int64_t k = 0; k < depth; ++k, out += kRows) {
      if (lane_axis.side_by_side() && k + kPrefetch < depth)
        prefetch<kScalar>(data, lane_axis(0) + k_axis(k + kPrefetch), count);
      for (int64_t lane = 0; lane < count; lane += kRows)
        Kernel::store_units(out + lane / kRows * panel_size, some_lanes(lane, k));
    }
  }

  // kLanes lanes of one k, where a unit is one
  Units some_lanes(int64_t lane, int64_t k) const {
    if (lane + kLanes <= lanes && lane_axis.side_by_side())
      return Kernel::template load_along_k<kScalar>(data, lane_axis(lane) + k_axis(k));
    Packed values[kLanes] = {};
    for (int64_t i = 0; i < smaller(kLanes, lanes - lane); ++i)
      values[i] = Kernel::template load<kScalar>(data, lane_axis(lane + i) + k_axis(k));
    return Kernel::load_units(values);
  }

  // out[(k / kStep) * kColumns * kStep + lane * kStep + k % kStep]
  void pack_panel(Packed* out) const {
    constexpr int64_t kStepSize = Kernel::kColumns * kStep;
    if (k_axis.side_by_side())
      for (int64_t lane = 0; lane < Kernel::kColumns; lane += kLanes)
        for (int64_t k = 0; k < depth; k += kSquare) {
          Units units[kLanes];
          square(lane, k, units);
          Kernel::transpose(units);
          for (int64_t i = 0; i < pieces(smaller(kSquare, depth - k), kStep); ++i)
            Kernel::store_units(out + (k / kStep + i) * kStepSize + lane * kStep, units[i]);
        }
    else
      for (int64_t k = 0; k < depth; k += kStep, out += kStepSize)
        for (int64_t lane = 0; lane < Kernel::kColumns; lane += 2 * kLanes) {
          Units units[2];
          along_lanes(lane, k, units);
          Kernel::store_units(out + lane * kStep, units[0]);
          Kernel::store_units(out + (lane + kLanes) * kStep, units[1]);
        }
  }
};

// Calls `use` with the part of an operand that has these axes.
template <typename Kernel, typename Use>
inline void with_source(const Operand& from, const Axis& lane_axis, const Axis& k_axis, int64_t lanes, int64_t depth,
                        const Use& use) {
  switch (from.scalar) {
    case Scalar::kFloat:
      return use(Source<Kernel, Scalar::kFloat>{from.data, lane_axis, k_axis, lanes, depth});
    case Scalar::kBFloat16:
      return use(Source<Kernel, Scalar::kBFloat16>{from.data, lane_axis, k_axis, lanes, depth});
    case Scalar::kHalf:
      return use(Source<Kernel, Scalar::kHalf>{from.data, lane_axis, k_axis, lanes, depth});
  }
}

// How a product is cut: steps of a block of rows and of K, and in each of them tasks for a team of threads.
template <typename Kernel>
struct Cut {
  static constexpr int64_t kRows = Kernel::kRows, kColumns = Kernel::kColumns, kDepth = Kernel::kDepth;
  static constexpr int64_t kLeftRows = Kernel::kRowPanels ? kRows : 1;  // of A that are packed together
  static constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(typename Kernel::Packed));
  // what a thread packs of A at a time: 4 cache lines of lanes, or a page along k, whichever lie side by side; of
  // panels 6 cache lines of lanes, and all of k, as a store reaches into the next one
  static constexpr int64_t kPackLanes = Kernel::kRowPanels ? 16 * kRows : 64;
  static constexpr int64_t kPackDepth = Kernel::kRowPanels ? kDepth : 256;

  int threads;
  int64_t column_panels, block, k_steps, steps;
  bool share;     // whether panels of B are packed for all threads
  int64_t group;  // panels of B that are packed and multiplied together
  bool in_place;  // whether A is not packed
  int64_t chunks, chunk;
  int64_t a_size, b_size, a_block, b_block;

  Cut(const Operand& a, const ProductShape& shape, int most)
      : threads(static_cast<int>(smaller(most, 1 + shape.m * shape.n * shape.k / kThreadWork))),
        column_panels(pieces(shape.n, kColumns)),
        block(rounded_up(pieces(shape.m, pieces(shape.m, kBlockRows)), kRows)),
        k_steps(pieces(shape.k, kDepth)),
        steps(pieces(shape.m, block) * k_steps),
        share(threads > 1 && column_panels < 4 * threads),
        group(share ? 1 : larger(1, smaller(Kernel::kGroup, column_panels / (8 * threads)))),
        in_place(!Kernel::kRowPanels && a.scalar == Kernel::kScalar && a.column_stride == 1 &&
                 shape.k % Kernel::kStep == 0),
        // fewer column panels than threads could share: cut the rows too, so that every thread has work
        chunks(share ? smaller(pieces(4 * threads, column_panels), block / kRows) : 1),
        chunk(rounded_up(pieces(block, chunks), kRows)),
        // one line more than needed, so that rows do not fall on the same sets of L1
        a_size(rounded_up(smaller(kDepth, shape.k) * kLeftRows, kLine) + kLine),
        b_size(kColumns * rounded_up(smaller(kDepth, shape.k), kLine)),
        a_block(in_place ? 0 : block / kLeftRows * a_size),
        b_block(share ? column_panels * b_size : 0) {}

  int64_t buffers() const { return smaller(2, steps); }
  int64_t packed() const { return buffers() * (a_block + b_block) + (share ? 0 : threads * group * b_size); }
};

template <typename Kernel, typename Out>
void product(const Operand& a, const Operand& b, const Result& c, const ProductShape& shape, bool accumulate,
             int threads) {
  using Packed = typename Kernel::Packed;
  constexpr int64_t kRows = Kernel::kRows, kColumns = Kernel::kColumns, kDepth = Kernel::kDepth, kStep = Kernel::kStep;
  const Axis a_axis{a.row_stride, a.rows, 0}, c_axis{c.row_stride, c.rows, 0};
  auto* out = static_cast<Out*>(c.data);
  if (shape.m == 0 || shape.n == 0) return;
  if (shape.k == 0) {
    for (int64_t row = 0; row < shape.m && !accumulate; ++row)
      std::memset(out + c_axis(row), 0, static_cast<size_t>(shape.n) * sizeof(Out));
    return;
  }
  const Cut<Kernel> cut(a, shape, threads);
  const int64_t reads = pieces(cut.column_panels, cut.group) * cut.chunks;
  const int64_t state = Steps::bytes(cut.steps, reads, cut.threads);
  auto* scratch = static_cast<char*>(product_scratch(state + cut.packed() * static_cast<int64_t>(sizeof(Packed))));
  const Steps steps(scratch, cut.steps, reads, cut.threads);
  Packed* a_blocks = reinterpret_cast<Packed*>(scratch + state);
  Packed* b_blocks = a_blocks + cut.buffers() * cut.a_block;

#pragma omp parallel num_threads(cut.threads)
  {
#ifdef _OPENMP
    const int thread = omp_get_thread_num(), team = omp_get_num_threads();
#else
    const int thread = 0, team = 1;
#endif
    for (int64_t step = 0; step < cut.steps; ++step) {
      const int64_t first = step / cut.k_steps * cut.block, rows = smaller(cut.block, shape.m - first);
      const int64_t k = step % cut.k_steps * kDepth, depth = smaller(kDepth, shape.k - k);
      const int64_t panels = cut.share ? cut.column_panels : 0, across = pieces(depth, cut.kPackDepth);
      const int64_t packs = panels + (cut.in_place ? 0 : pieces(rows, cut.kPackLanes) * across);
      Packed* a_rows = a_blocks + step % 2 * cut.a_block;
      Packed* b_panels = b_blocks + step % 2 * cut.b_block;
      const auto pack_panel = [&](int64_t panel, Packed* to) {
        const int64_t column = panel * kColumns;
        with_source<Kernel>(b, {b.column_stride, nullptr, column}, {b.row_stride, b.rows, k},
                            smaller(kColumns, shape.n - column), depth, [&](const auto& part) { part.pack_panel(to); });
      };
      const auto pack = [&](int64_t task) {
        if (task < panels) return pack_panel(task, b_panels + task * cut.b_size);
        const int64_t row = (task - panels) / across * cut.kPackLanes;
        const int64_t inner = (task - panels) % across * cut.kPackDepth;
        const int64_t count = smaller(cut.kPackLanes, rows - row);
        with_source<Kernel>(a, {a.row_stride, a.rows, first + row}, {a.column_stride, nullptr, k + inner},
                            Kernel::kRowPanels ? rows - row : count, smaller(cut.kPackDepth, depth - inner),
                            [&](const auto& part) {
                              if constexpr (Kernel::kRowPanels)
                                part.pack_row_panels(a_rows + row / kRows * cut.a_size, cut.a_size, count);
                              else
                                part.pack_rows(a_rows + row * cut.a_size + inner, cut.a_size);
                            });
      };
      const auto multiply = [&](int64_t task) {
        const int64_t panel = task / cut.chunks * cut.group, begin = task % cut.chunks * cut.chunk;
        const int64_t group = smaller(cut.group, cut.column_panels - panel);
        Packed* group_panels = cut.share ? b_panels + panel * cut.b_size : b_blocks + thread * cut.group * cut.b_size;
        for (int64_t i = 0; i < group && !cut.share; ++i) pack_panel(panel + i, group_panels + i * cut.b_size);
        for (int64_t row = begin; row < smaller(begin + cut.chunk, rows); row += kRows) {
          const int64_t count = smaller(kRows, rows - row);
          const Packed* a_at[kRows];
          Out* c_at[kRows];
          for (int64_t i = 0; i < kRows; ++i) {
            const int64_t at = row + smaller(i, count - 1);
            a_at[i] = cut.in_place ? static_cast<const Packed*>(a.data) + a_axis(first + at) + k
                                   : a_rows + at / cut.kLeftRows * cut.a_size;
            c_at[i] = out + c_axis(first + at) + panel * kColumns;
          }
          for (int64_t i = 0; i < group; ++i) {
            Kernel::multiply(a_at, group_panels + i * cut.b_size, pieces(depth, kStep), c_at, count,
                             smaller(kColumns, shape.n - (panel + i) * kColumns), accumulate || k > 0);
            for (Out*& at : c_at) at += kColumns;
          }
        }
      };
      steps.run(step, packs, thread, team, pack, multiply);
    }
  }
}

}  // namespace
}  // namespace spo
