// Python module `_C_cuda`: raw addresses in, nothing out. Python has checked what lies behind them.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>
#include <tuple>

#include "cuda/tiles.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

using Address = std::uintptr_t;
using MatrixTuple = std::tuple<Address, int64_t, int>;
using TransformTuple = std::tuple<Address, float, float>;
using QueueTuple = std::tuple<int, Address>;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

spo::Matrix matrix(const MatrixTuple& from) {
  return {at<void>(std::get<0>(from)), std::get<1>(from), static_cast<spo::Scalar>(std::get<2>(from))};
}

spo::Queue queue_of(const QueueTuple& from) { return {std::get<0>(from), at<void>(std::get<1>(from))}; }

spo::CudaTile tile_of(const MatrixTuple& products, const MatrixTuple& out, int64_t rows, int64_t columns,
                      Address labels, const TransformTuple& transform) {
  const auto [bias, scale, softcap] = transform;
  return {matrix(products), matrix(out), rows, columns, at<int64_t>(labels), {at<float>(bias), scale, softcap}};
}

void tile_stats(const MatrixTuple& products, const MatrixTuple& out, int64_t rows, int64_t columns, Address labels,
                const TransformTuple& transform, Address max, Address sum, Address label_logit, Address shifted_sum,
                Address square_sum, Address rescale, Address block_lse, int64_t block_lse_stride,
                const QueueTuple& queue) {
  spo::tile_stats(tile_of(products, out, rows, columns, labels, transform),
                  {at<float>(max), at<float>(sum), at<float>(label_logit), at<float>(shifted_sum),
                   at<float>(square_sum), at<float>(rescale), at<float>(block_lse), block_lse_stride},
                  queue_of(queue));
}

void tile_grad(const MatrixTuple& products, const MatrixTuple& out, int64_t rows, int64_t columns, Address labels,
               const TransformTuple& transform, Address lse, Address grad_logp, Address grad_lse, Address grad_entropy,
               Address entropy, Address grad_log_sum_p2, Address log_sum_p2, Address lse_rest,
               const QueueTuple& queue) {
  spo::tile_grad(tile_of(products, out, rows, columns, labels, transform),
                 {at<float>(lse), at<float>(grad_logp), at<float>(grad_lse), at<float>(grad_entropy),
                  at<float>(entropy), at<float>(grad_log_sum_p2), at<float>(log_sum_p2), at<float>(lse_rest)},
                 queue_of(queue));
}

void scale_rows(const MatrixTuple& x, int64_t rows, int64_t columns, Address factors, const QueueTuple& queue) {
  spo::scale_rows(matrix(x), rows, columns, at<float>(factors), queue_of(queue));
}

void pair_loss(Address logp, Address labels, Address bounds, bool wide_bounds, int64_t pairs, int64_t tokens,
               int64_t width, int64_t ignore_index, Address reference, Address value, float beta, bool use_reference,
               int penalty, float weight, float epsilon, bool mean, float factor, Address summary, Address coefficients,
               const QueueTuple& queue) {
  spo::pair_loss(
      {at<float>(logp), at<int64_t>(labels), at<void>(bounds), wide_bounds, pairs, tokens, width, ignore_index},
      {at<float>(reference), at<float>(value), beta, use_reference, static_cast<spo::Penalty>(penalty), weight, epsilon,
       mean, factor},
      at<float>(summary), at<float>(coefficients), queue_of(queue));
}

}  // namespace

PYBIND11_MODULE(_C_cuda, module) {
  using Released = py::call_guard<py::gil_scoped_release>;
  module.doc() =
      "CUDA tile kernels of spo_kernels. A matrix is (address, row stride in elements, scalar: 0 float, 1 bfloat16, "
      "2 half), a transform (bias, scale, softcap), a queue (device, stream); an address of 0 stands for None.";
  module.attr("mass_block") = spo::kMassBlock;
  module.def("why_not", &spo::why_not, Released(), "device"_a, "Empty, or why the kernels cannot run there.");
  module.def("tile_stats", &tile_stats, Released(), py::kw_only(), "products"_a, "out"_a, "rows"_a, "columns"_a,
             "labels"_a, "transform"_a, "max"_a, "sum"_a, "label_logit"_a, "shifted_sum"_a, "square_sum"_a, "rescale"_a,
             "block_lse"_a, "block_lse_stride"_a, "queue"_a);
  module.def("tile_grad", &tile_grad, Released(), py::kw_only(), "products"_a, "out"_a, "rows"_a, "columns"_a,
             "labels"_a, "transform"_a, "lse"_a, "grad_logp"_a, "grad_lse"_a, "grad_entropy"_a, "entropy"_a,
             "grad_log_sum_p2"_a, "log_sum_p2"_a, "lse_rest"_a, "queue"_a);
  module.def("scale_rows", &scale_rows, Released(), "x"_a, py::kw_only(), "rows"_a, "columns"_a, "factors"_a,
             "queue"_a);
  module.def("pair_loss", &pair_loss, Released(), py::kw_only(), "logp"_a, "labels"_a, "bounds"_a, "wide_bounds"_a,
             "pairs"_a, "tokens"_a, "width"_a, "ignore_index"_a, "reference"_a, "value"_a, "beta"_a, "use_reference"_a,
             "penalty"_a, "weight"_a, "epsilon"_a, "mean"_a, "factor"_a, "summary"_a, "coefficients"_a, "queue"_a);
}
