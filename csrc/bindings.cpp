// Python module `_C`: raw addresses in, nothing out. Python has checked what lies behind them.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>

#include "cpu/pair_loss.h"
#include "cpu/product.h"
#include "cpu/tiles.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

template <typename T>
T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// What follows comes in a few tuples, without names: pybind11 takes 0.3 us to find each named argument, and a small
// call is over in 2.

// (products, their row stride, out, its row stride, its scalar, rows, columns, labels)
using TileTuple = std::array<std::int64_t, 8>;
// (bias or 0, scale, softcap or 0)
using TransformTuple = std::tuple<std::uintptr_t, float, float>;
// The addresses of TokenStats in their order, then block_lse's row stride
using StatsTuple = std::array<std::int64_t, 8>;
// The addresses of TokenGrads in their order
using GradsTuple = std::array<std::int64_t, 8>;
// (address, row stride, scalar, rows, columns)
using MatrixTuple = std::array<std::int64_t, 5>;

template <typename T>
T* at(std::int64_t address) {
  return at<T>(static_cast<std::uintptr_t>(address));
}

spo::Tile tile_of(const TileTuple& from, const TransformTuple& transform) {
  const auto [bias, scale, softcap] = transform;
  return {at<float>(from[0]), from[1], from[5], from[6], at<int64_t>(from[7]), {at<float>(bias), scale, softcap}};
}

spo::TileOut out_of(const TileTuple& from) { return {at<void>(from[2]), from[3], static_cast<spo::Scalar>(from[4])}; }

void tile_stats(const TileTuple& tile, const TransformTuple& transform, const StatsTuple& stats, int threads) {
  spo::tile_stats(tile_of(tile, transform), out_of(tile),
                  {at<float>(stats[0]), at<float>(stats[1]), at<float>(stats[2]), at<float>(stats[3]),
                   at<float>(stats[4]), at<float>(stats[5]), at<float>(stats[6]), stats[7]},
                  threads);
}

void tile_grad(const TileTuple& tile, const TransformTuple& transform, const GradsTuple& grads, int threads) {
  spo::tile_grad(tile_of(tile, transform), out_of(tile),
                 {at<float>(grads[0]), at<float>(grads[1]), at<float>(grads[2]), at<float>(grads[3]),
                  at<float>(grads[4]), at<float>(grads[5]), at<float>(grads[6]), at<float>(grads[7])},
                 threads);
}

void scale_rows(const MatrixTuple& x, std::uintptr_t factors, int threads) {
  spo::scale_rows({at<void>(x[0]), x[1], static_cast<spo::Scalar>(x[2])}, x[3], x[4], at<float>(factors), threads);
}

void pair_loss(std::uintptr_t logp, std::uintptr_t labels, std::uintptr_t bounds, bool wide_bounds, int64_t pairs,
               int64_t tokens, int64_t width, int64_t ignore_index, std::uintptr_t reference, std::uintptr_t value,
               float beta, bool use_reference, int penalty, float weight, float epsilon, bool mean, float factor,
               std::uintptr_t summary, std::uintptr_t coefficients) {
  spo::pair_loss(
      {at<float>(logp), at<int64_t>(labels), at<void>(bounds), wide_bounds, pairs, tokens, width, ignore_index},
      {at<float>(reference), at<float>(value), beta, use_reference, static_cast<spo::Penalty>(penalty), weight, epsilon,
       mean, factor},
      at<float>(summary), at<float>(coefficients));
}

py::list product_names() {
  py::list names;
  for (const auto& product : spo::all_products())
    if (spo::usable(product)) names.append(product.name);
  return names;
}

// A list of `count` rows of a matrix that has `limit` of them, or null.
const int64_t* row_list(const char* name, std::uintptr_t address, int64_t count, int64_t limit) {
  const auto* rows = at<const int64_t>(address);
  for (int64_t i = 0; rows != nullptr && i < count; ++i)
    if (rows[i] < 0 || rows[i] >= limit)
      throw py::index_error(std::string(name) + "[" + std::to_string(i) + "] = " + std::to_string(rows[i]) +
                            " is outside [0, " + std::to_string(limit) + ")");
  return rows;
}

// (address, row stride, column stride, scalar, address of the row list or 0, rows of the matrix)
using OperandTuple = std::array<std::int64_t, 6>;

spo::Operand operand(const OperandTuple& from, const char* list_name, int64_t rows) {
  return {at<const void>(static_cast<std::uintptr_t>(from[0])), from[1], from[2], static_cast<spo::Scalar>(from[3]),
          row_list(list_name, static_cast<std::uintptr_t>(from[4]), rows, from[5])};
}

// (address, row stride, scalar, address of the row list or 0, rows of the matrix)
using ResultTuple = std::array<std::int64_t, 5>;
// (m, n, k)
using ShapeTuple = std::array<std::int64_t, 3>;

void product(const std::string& name, const OperandTuple& a, const OperandTuple& b, const ResultTuple& out,
             const ShapeTuple& shape, bool accumulate, int threads) {
  const auto [m, n, k] = shape;
  const auto& all = spo::all_products();
  const auto chosen =
      std::find_if(all.begin(), all.end(), [&](const auto& one) { return name == one.name && spo::usable(one); });
  if (chosen == all.end()) throw std::invalid_argument("product '" + name + "' cannot run on this machine");
  const spo::Operand left = operand(a, "a_rows", m), right = operand(b, "b_rows", k);
  const spo::Result result{at<void>(out[0]), out[1], static_cast<spo::Scalar>(out[2]),
                           row_list("out_rows", static_cast<std::uintptr_t>(out[3]), m, out[4])};
  const bool rounds = chosen->needs_bf16 && result.scalar == spo::Scalar::kBFloat16;
  if (result.scalar != spo::Scalar::kFloat && (!rounds || accumulate || k > spo::kRoundedDepth))
    throw std::invalid_argument("product '" + name + "' cannot write such a result");
  py::gil_scoped_release released;
  chosen->run(left, right, result, {m, n, k}, accumulate, threads);
}

bool made_by_amd() {
#if defined(__x86_64__) && defined(__GNUC__)
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

const char* instruction_set() { return spo::kInstructionSetNames[static_cast<int>(spo::instruction_set())]; }

void use_instruction_set(const std::string& name) {
  for (int i = 0; i < spo::kInstructionSets; ++i)
    if (name == spo::kInstructionSetNames[i]) return spo::use_instruction_set(static_cast<spo::InstructionSet>(i));
  throw std::invalid_argument("expected portable, avx2 or avx512, got " + name);
}

#ifdef _OPENMP
constexpr bool kOpenMP = true;
#else
constexpr bool kOpenMP = false;
#endif

}  // namespace

PYBIND11_MODULE(_C, module) {
  using Released = py::call_guard<py::gil_scoped_release>;
  module.doc() = "CPU tile kernels and products of spo_kernels. Scalars: 0 float, 1 bfloat16, 2 half.";
  module.attr("openmp") = kOpenMP;
  module.attr("mass_block") = spo::kMassBlock;
  module.attr("rounded_depth") = spo::kRoundedDepth;
  module.def("instruction_set", &instruction_set, "The build of the kernels in use: portable, avx2 or avx512.");
  module.def("use_instruction_set", &use_instruction_set,
             "use_instruction_set(name): from now on; ValueError where this processor lacks it.");
  module.def("made_by_amd", &made_by_amd, "Whether AMD made this machine's processor.");
  module.def("product_names", &product_names, "The products that this build has and this machine can run.");
  module.def("product", &product,
             "product(name, a, b, out, shape, accumulate, threads): out (+)= a b, with shape (m, n, k). An operand is "
             "(address, row stride, column stride, scalar, row list's address or 0, rows), the result (address, row "
             "stride, scalar, row list's address or 0, rows).");
  module.def("tile_stats", &tile_stats, Released(),
             "tile_stats(tile, transform, stats, threads). A tile is (products, their row stride, out, its row stride, "
             "its scalar, rows, columns, labels), a transform (bias or 0, scale, softcap or 0), stats the addresses of "
             "TokenStats and block_lse's row stride.");
  module.def("tile_grad", &tile_grad, Released(),
             "tile_grad(tile, transform, grads, threads); grads are the addresses of TokenGrads.");
  module.def("scale_rows", &scale_rows, Released(),
             "scale_rows(matrix, factors, threads); a matrix is (address, row stride, scalar, rows, columns).");
  module.def("pair_loss", &pair_loss, Released(), py::kw_only(), "logp"_a, "labels"_a, "bounds"_a, "wide_bounds"_a,
             "pairs"_a, "tokens"_a, "width"_a, "ignore_index"_a, "reference"_a, "value"_a, "beta"_a, "use_reference"_a,
             "penalty"_a, "weight"_a, "epsilon"_a, "mean"_a, "factor"_a, "summary"_a, "coefficients"_a);
}
