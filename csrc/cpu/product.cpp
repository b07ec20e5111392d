#include "product.h"

#include <cstdlib>
#include <memory>
#include <new>

namespace spo {
const std::array<NamedProduct, 3>& all_products() {
  static const std::array<NamedProduct, 3> products{{
      {"avx2", product_avx2(), InstructionSet::kAvx2, false},
      {"avx512", product_avx512(), InstructionSet::kAvx512, false},
      {"avx512_bf16", product_avx512_bf16(), InstructionSet::kAvx512, true},
  }};
  return products;
}

bool usable(const NamedProduct& product) {
  return product.run != nullptr && instruction_set() >= product.needs && (!product.needs_bf16 || has_avx512_bf16());
}

void* product_scratch(int64_t bytes) {
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local int64_t size = 0;
  if (bytes > size) {
    constexpr int64_t kCacheLine = 64;
    size = 0;
    memory.reset();
    const int64_t rounded = (bytes + kCacheLine - 1) / kCacheLine * kCacheLine;
    memory.reset(std::aligned_alloc(kCacheLine, static_cast<size_t>(rounded)));
    if (memory == nullptr) throw std::bad_alloc();
    size = rounded;
  }
  return memory.get();
}

}  // namespace spo
