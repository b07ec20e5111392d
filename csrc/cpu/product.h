// Matrix products C (+)= A B with float results from float, bfloat16 or float16 operands.
//
// torch's CPU library has no half-precision product with float results, and on AMD its float product leaves AVX-512
// unused. Each result is summed over k in a fixed order by one thread, so results do not depend on the number of
// threads.
#pragma once

#include <array>
#include <cstdint>

#include "../tile.h"
#include "instruction_set.h"

namespace spo {

// An operand of any strides, counted in elements. With `rows`, its row i is the matrix's row rows[i].
struct Operand {
  const void* data;
  int64_t row_stride;
  int64_t column_stride;
  Scalar scalar;
  const int64_t* rows;
};

// The result, its columns side by side. With `rows`, which must be distinct, row i goes to the matrix's row rows[i].
// Of float; the bfloat16 product also rounds sums of at most kRoundedDepth terms to bfloat16 as it writes them.
struct Result {
  void* data;
  int64_t row_stride;
  Scalar scalar;
  const int64_t* rows;
};

constexpr int64_t kRoundedDepth = 2048;

struct ProductShape {
  int64_t m, n, k;
};

using ProductFunction = void (*)(const Operand& a, const Operand& b, const Result& c, const ProductShape& shape,
                                 bool accumulate, int threads);

// Null where the compiler could not build it; the caller asks the machine before using it.
// The bfloat16 product rounds a float operand to bfloat16 while packing it.
ProductFunction product_avx512();
ProductFunction product_avx512_bf16();
ProductFunction product_avx2();

struct NamedProduct {
  const char* name;
  ProductFunction run;
  InstructionSet needs;
  bool needs_bf16;
};
const std::array<NamedProduct, 3>& all_products();

// Whether this build has it, this machine can run it and the instruction set in use allows it.
bool usable(const NamedProduct& product);

// At least that many bytes on a cache line, the calling thread's until it asks again: fresh pages would cost a
// product of 200 x 128 x 1024 a fifth of its time.
void* product_scratch(int64_t bytes);

}  // namespace spo
