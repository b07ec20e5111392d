// Every product that this machine can run, on operands that end where their memory ends; called by
// tests/test_sanitizers.py. Values are multiples of 1/8 of at most 1, so that every sum is exact in float.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <string_view>
#include <thread>
#include <type_traits>
#include <vector>

#include "product.h"

namespace {

std::mt19937 generator(1);

int64_t below(int64_t limit) { return static_cast<int64_t>(generator() % static_cast<uint64_t>(limit)); }

// `value`'s bits in `scalar`: multiples of 1/8 up to 1 are exact in all three
void put(char* place, spo::Scalar scalar, float value) {
  if (scalar == spo::Scalar::kFloat) {
    std::memcpy(place, &value, sizeof value);
    return;
  }
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t half = value == 0.0f ? 0 : (bits >> 16 & 0x8000u) | (((bits >> 23 & 0xffu) - 112) << 10) | (bits >> 13 & 0x3ffu);
  const auto narrow = static_cast<uint16_t>(scalar == spo::Scalar::kHalf ? half : bits >> 16);
  std::memcpy(place, &narrow, sizeof narrow);
}

enum class Layout { kRows, kColumns, kPiece, kSpread };

// A matrix whose first element is not at the start of its memory and whose last one ends it; `rows` of it are listed,
// or all in order.
struct Matrix {
  Matrix(int64_t rows, int64_t columns, Layout layout, spo::Scalar scalar, bool listed) {
    const int64_t size = scalar == spo::Scalar::kFloat ? 4 : 2, owned = listed ? rows + 3 : rows;
    const int64_t row_stride = layout == Layout::kColumns ? 1 : layout == Layout::kPiece ? columns + 3 : 2 * columns;
    const int64_t column_stride = layout == Layout::kColumns ? owned : layout == Layout::kSpread ? 2 : 1;
    const bool dense = layout == Layout::kRows;
    const int64_t stride = dense ? columns : row_stride;
    const int64_t elements = owned > 0 && columns > 0 ? (owned - 1) * stride + (columns - 1) * column_stride + 1 : 0;
    memory = static_cast<char*>(std::malloc(static_cast<size_t>((elements + 1) * size)));
    values.resize(static_cast<size_t>(owned * columns));
    for (int64_t i = 0; i < owned; ++i)
      for (int64_t j = 0; j < columns; ++j) {
        const float value = static_cast<float>(below(17) - 8) / 8.0f;
        values[static_cast<size_t>(i * columns + j)] = value;
        put(memory + (1 + i * stride + j * column_stride) * size, scalar, value);
      }
    for (int64_t i = 0; listed && i < rows; ++i) list.push_back(below(owned));
    operand = {memory + size, stride, column_stride, scalar, listed ? list.data() : nullptr};
    width = columns;
  }
  Matrix(const Matrix&) = delete;
  Matrix& operator=(const Matrix&) = delete;
  ~Matrix() { std::free(memory); }

  float at(int64_t row, int64_t column) const {
    return values[static_cast<size_t>((list.empty() ? row : list[static_cast<size_t>(row)]) * width + column)];
  }

  char* memory;
  std::vector<float> values;
  std::vector<int64_t> list;
  spo::Operand operand;
  int64_t width;
};

float result(float value) { return value; }
float result(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

// The float's value in the result's scalar: itself, or rounded to bfloat16, ties to even.
template <typename Out>
Out in_result(float value) {
  if constexpr (std::is_same_v<Out, float>) return value;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<Out>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

template <typename Out>
void check(const spo::NamedProduct& product, const spo::ProductShape& shape, Layout layout, spo::Scalar left,
           spo::Scalar right, bool listed, int threads) {
  constexpr bool kRounded = !std::is_same_v<Out, float>;
  const auto [m, n, k] = shape;
  const Matrix a(m, k, layout, left, listed), b(k, n, layout, right, listed);
  std::vector<int64_t> places(static_cast<size_t>(m + (listed ? 2 : 0)));
  std::iota(places.begin(), places.end(), 0);
  if (listed) std::shuffle(places.begin(), places.end(), generator);
  const int64_t stride = n + 1;
  for (const bool accumulate : {false, true}) {
    // one element before the result and none after it
    if (kRounded && accumulate) continue;
    std::vector<Out> out(static_cast<size_t>(places.empty() ? 1 : static_cast<int64_t>(places.size()) * stride),
                         in_result<Out>(0.5f));
    std::vector<float> expected(out.size(), 0.5f);
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n; ++j) {
        float sum = accumulate ? 0.5f : 0.0f;
        for (int64_t l = 0; l < k; ++l) sum += a.at(i, l) * b.at(l, j);
        expected[static_cast<size_t>(places[static_cast<size_t>(i)] * stride + 1 + j)] = result(in_result<Out>(sum));
      }
    // a thread of its own starts with no packing memory, so that this product gets just what it asks for
    std::thread([&] {
      const auto scalar = kRounded ? spo::Scalar::kBFloat16 : spo::Scalar::kFloat;
      product.run(a.operand, b.operand, {out.data() + 1, stride, scalar, listed ? places.data() : nullptr}, shape,
                  accumulate, threads);
    }).join();
    for (size_t i = 0; i < out.size(); ++i)
      if (result(out[i]) != expected[i]) {
        std::printf("%s: m=%ld n=%ld k=%ld layout %d scalars %d %d listed %d accumulate %d threads %d: [%zu] is %g, not %g\n",
                    product.name, m, n, k, static_cast<int>(layout), static_cast<int>(left), static_cast<int>(right),
                    listed, accumulate, threads, i, static_cast<double>(result(out[i])), static_cast<double>(expected[i]));
        std::exit(1);
      }
  }
}

}  // namespace

int main() {
  const spo::ProductShape shapes[] = {{0, 5, 3},    {5, 0, 3},   {5, 3, 0},      {1, 1, 1},   {5, 63, 2},
                                      {6, 64, 32},  {7, 65, 33}, {13, 130, 257}, {65, 17, 1}, {3, 5, 1025},
                                      {97, 1, 530}, {1, 200, 31}, {16, 16, 16},  {2053, 3, 5}, {37, 70, 600}, {3, 66, 2051}, {200, 67, 4}};
  const spo::Scalar scalars[][2] = {{spo::Scalar::kFloat, spo::Scalar::kFloat},
                                    {spo::Scalar::kFloat, spo::Scalar::kBFloat16},
                                    {spo::Scalar::kBFloat16, spo::Scalar::kBFloat16},
                                    {spo::Scalar::kHalf, spo::Scalar::kHalf},
                                    {spo::Scalar::kBFloat16, spo::Scalar::kFloat}};
  int64_t products = 0;
  for (const auto& product : spo::all_products()) {
    if (!spo::usable(product)) continue;
    std::printf("%s\n", product.name);
    for (const auto& shape : shapes)
      for (const Layout layout : {Layout::kRows, Layout::kColumns, Layout::kPiece, Layout::kSpread})
        for (const auto& [left, right] : scalars)
          for (const bool listed : {false, true}) {
            const int threads = products % 2 == 0 ? 1 : 3;
            check<float>(product, shape, layout, left, right, listed, threads);
            if (std::string_view(product.name) == "avx512_bf16" && shape.k <= spo::kRoundedDepth)
              check<uint16_t>(product, shape, layout, left, right, listed, threads);
            ++products;
          }
  }
  std::printf("%ld products\n", static_cast<long>(products));
}
