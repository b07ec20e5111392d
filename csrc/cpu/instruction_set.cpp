#include "instruction_set.h"

#include <atomic>
#include <stdexcept>
#include <string>

namespace spo {
namespace {

std::atomic<InstructionSet>& in_use() {
  static std::atomic<InstructionSet> chosen{widest_instruction_set()};
  return chosen;
}

}  // namespace

InstructionSet widest_instruction_set() {
#if defined(__x86_64__) && defined(__GNUC__)
  // compilers before GCC 11 cannot ask for f16c; every processor with AVX2 has it
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx2 && avx512) return InstructionSet::kAvx512;
  if (avx2) return InstructionSet::kAvx2;
#endif
  return InstructionSet::kPortable;
}

InstructionSet instruction_set() { return in_use().load(std::memory_order_relaxed); }

void use_instruction_set(InstructionSet wanted) {
  const InstructionSet widest = widest_instruction_set();
  if (wanted > widest)
    throw std::invalid_argument(std::string("this processor has no ") + kInstructionSetNames[static_cast<int>(wanted)] +
                                ", its widest is " + kInstructionSetNames[static_cast<int>(widest)]);
  in_use().store(wanted, std::memory_order_relaxed);
}

bool has_avx512_bf16() {
#if defined(__x86_64__) && defined(__GNUC__)
  return instruction_set() == InstructionSet::kAvx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

}  // namespace spo
