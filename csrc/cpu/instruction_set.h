// Which of the builds of the CPU kernels runs: one library serves every x86-64, and every other machine.
#pragma once

namespace spo {

// Each includes those before it. What a build may use beside its own name: SPO_AVX2, SPO_AVX512.
enum class InstructionSet : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };
constexpr int kInstructionSets = 3;
constexpr const char* kInstructionSetNames[kInstructionSets] = {"portable", "avx2", "avx512"};

#if defined(__x86_64__) && defined(__GNUC__)
#define SPO_AVX2 __attribute__((target("avx2,fma,f16c")))
#define SPO_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))
#else
#define SPO_AVX2
#define SPO_AVX512
#endif

// The widest that this machine has.
InstructionSet widest_instruction_set();

// The one in use: the widest, until a narrower one is asked for. Asking for more than the machine has throws
// std::invalid_argument.
InstructionSet instruction_set();
void use_instruction_set(InstructionSet wanted);

// Whether products of bfloat16 operands may use the machine's own.
bool has_avx512_bf16();

}  // namespace spo
