// Python module `_C`: raw addresses in, nothing out. Python has checked what lies behind them.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "cpu/product.h"
#include "cpu/tiles.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

template <typename T>
T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// (address, row stride, whether it holds bfloat16, not float)
using TileTuple = std::array<std::int64_t, 3>;

spo::Tile tile_at(const TileTuple& tile, int64_t rows, int64_t columns, std::uintptr_t bias, std::uintptr_t labels,
                  float scale, float softcap) {
  return {at<float>(static_cast<std::uintptr_t>(tile[0])),
          tile[1],
          rows,
          columns,
          at<int64_t>(labels),
          {at<float>(bias), scale, softcap}};
}

spo::TileOut out_at(const TileTuple& out) {
  return {at<void>(static_cast<std::uintptr_t>(out[0])), out[1], out[2] != 0};
}

void tile_stats(const TileTuple& tile, const TileTuple& out, int64_t rows, int64_t columns, std::uintptr_t bias,
                std::uintptr_t labels, float scale, float softcap, std::uintptr_t max, std::uintptr_t sum,
                std::uintptr_t label_logit, std::uintptr_t shifted_sum, std::uintptr_t square_sum,
                std::uintptr_t rescale, std::uintptr_t block_lse, int64_t block_lse_stride, int threads) {
  spo::tile_stats(tile_at(tile, rows, columns, bias, labels, scale, softcap), out_at(out),
                  {at<float>(max), at<float>(sum), at<float>(label_logit), at<float>(shifted_sum),
                   at<float>(square_sum), at<float>(rescale), at<float>(block_lse), block_lse_stride},
                  threads);
}

void tile_grad(const TileTuple& tile, const TileTuple& out, int64_t rows, int64_t columns, std::uintptr_t bias,
               std::uintptr_t labels, float scale, float softcap, std::uintptr_t lse, std::uintptr_t grad_logp,
               std::uintptr_t grad_lse, std::uintptr_t grad_entropy, std::uintptr_t entropy,
               std::uintptr_t grad_log_sum_p2, std::uintptr_t log_sum_p2, int threads) {
  spo::tile_grad(tile_at(tile, rows, columns, bias, labels, scale, softcap), out_at(out),
                 {at<float>(lse), at<float>(grad_logp), at<float>(grad_lse), at<float>(grad_entropy),
                  at<float>(entropy), at<float>(grad_log_sum_p2), at<float>(log_sum_p2)},
                 threads);
}

void scale_rows(const TileTuple& x, int64_t rows, int64_t columns, std::uintptr_t factors, int threads) {
  spo::scale_rows(out_at(x), rows, columns, at<float>(factors), threads);
}

py::list product_names() {
  py::list names;
  for (const auto* product = spo::usable_products(); product->run != nullptr; ++product) names.append(product->name);
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

void product(const std::string& name, const OperandTuple& a, const OperandTuple& b,
             const std::array<std::int64_t, 5>& out, int64_t m, int64_t n, int64_t k, bool accumulate, int threads) {
  const auto* chosen = spo::usable_products();
  while (chosen->run != nullptr && name != chosen->name) ++chosen;
  if (chosen->run == nullptr) throw std::invalid_argument("product '" + name + "' cannot run on this machine");
  const spo::Operand left = operand(a, "a_rows", m), right = operand(b, "b_rows", k);
  const spo::Result result{at<void>(static_cast<std::uintptr_t>(out[0])), out[1], static_cast<spo::Scalar>(out[2]),
                           row_list("out_rows", static_cast<std::uintptr_t>(out[3]), m, out[4])};
  const bool rounds = name == "avx512_bf16" && result.scalar == spo::Scalar::kBFloat16;
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

const char* vector_width() {
#if defined(__x86_64__) && defined(__GNUC__)
  if (__builtin_cpu_supports("avx512f")) return "AVX-512";
  if (__builtin_cpu_supports("avx2")) return "AVX2";
#endif
  return "baseline vectors";
}

#ifdef _OPENMP
constexpr bool kOpenMP = true;
#else
constexpr bool kOpenMP = false;
#endif

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "CPU tile kernels of spo_kernels";
  module.attr("openmp") = kOpenMP;
  module.attr("mass_block") = spo::kMassBlock;
  module.attr("rounded_depth") = spo::kRoundedDepth;
  module.def("vector_width", &vector_width, "The widest vectors that the kernels use on this machine.");
  module.def("made_by_amd", &made_by_amd, "Whether AMD made this machine's processor.");
  module.def("product_names", &product_names, "The products that this build has and this machine can run.");
  module.def("product", &product, "name"_a, py::kw_only(), "a"_a, "b"_a, "out"_a, "m"_a, "n"_a, "k"_a, "accumulate"_a,
             "threads"_a,
             "out (+)= a b. An operand is (address, row stride, column stride, scalar: 0 float, 1 bfloat16, 2 half, "
             "row list's address or 0, rows), the result (address, row stride, row list's address or 0, rows).");
  module.def("tile_stats", &tile_stats, py::call_guard<py::gil_scoped_release>(), py::kw_only(), "tile"_a, "out"_a,
             "rows"_a, "columns"_a, "bias"_a, "labels"_a, "scale"_a, "softcap"_a, "max"_a, "sum"_a, "label_logit"_a,
             "shifted_sum"_a, "square_sum"_a, "rescale"_a, "block_lse"_a, "block_lse_stride"_a, "threads"_a);
  module.def("tile_grad", &tile_grad, py::call_guard<py::gil_scoped_release>(), py::kw_only(), "tile"_a, "out"_a,
             "rows"_a, "columns"_a, "bias"_a, "labels"_a, "scale"_a, "softcap"_a, "lse"_a, "grad_logp"_a, "grad_lse"_a,
             "grad_entropy"_a, "entropy"_a, "grad_log_sum_p2"_a, "log_sum_p2"_a, "threads"_a);
  module.def("scale_rows", &scale_rows, py::call_guard<py::gil_scoped_release>(), "x"_a, py::kw_only(), "rows"_a,
             "columns"_a, "factors"_a, "threads"_a);
}
