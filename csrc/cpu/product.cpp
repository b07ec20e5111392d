#include "product.h"

#include <cstdlib>
#include <memory>
#include <new>

namespace spo {
namespace {

struct Usable {
  NamedProduct products[4] = {};
  int count = 0;

  void add(const char* name, bool machine_has_it, ProductFunction run) {
    if (machine_has_it && run != nullptr) products[count++] = {name, run};
  }

  Usable() {
#if defined(__x86_64__) && defined(__GNUC__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    add("avx2", avx2, product_avx2());
    add("avx512", avx512, product_avx512());
    add("avx512_bf16", avx512 && __builtin_cpu_supports("avx512bf16"), product_avx512_bf16());
#endif
  }
};

}  // namespace

const NamedProduct* usable_products() {
  static const Usable usable;
  return usable.products;
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
