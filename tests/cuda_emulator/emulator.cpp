// The fibres behind cuda_runtime.h.

#include <ucontext.h>

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_runtime.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace {

constexpr int kWarp = 32;
constexpr std::size_t kStackBytes = 64 << 10;

enum class State { kReady, kAtBarrier, kAtShuffle, kLost, kDone };

struct Fibre {
  std::vector<char> stack = std::vector<char>(kStackBytes);
  ucontext_t context{};
  State state = State::kDone;
  dim3 index;
  uint64_t exchanged = 0;
};

std::vector<Fibre> fibres;
std::size_t threads = 0, current = 0;
ucontext_t scheduler;
const std::function<void()>* body = nullptr;

void run_fibre() {
  (*body)();
  fibres[current].state = State::kDone;
}

void wait(State state) {
  Fibre& mine = fibres[current];
  mine.state = state;
  swapcontext(&mine.context, &scheduler);
}

void start_block(dim3 block) {
  threads = static_cast<std::size_t>(block.x) * block.y * block.z;
  if (fibres.size() < threads) fibres.resize(threads);
  for (std::size_t t = 0; t < threads; ++t) {
    Fibre& fibre = fibres[t];
    fibre.index = dim3(t % block.x, t / block.x % block.y, t / block.x / block.y);
    fibre.state = State::kReady;
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.data();
    fibre.context.uc_stack.ss_size = kStackBytes;
    fibre.context.uc_link = &scheduler;
    makecontext(&fibre.context, run_fibre, 0);
  }
}

bool all(std::size_t begin, std::size_t end, State state) {
  for (std::size_t t = begin; t < end; ++t) {
    if (fibres[t].state != state) return false;
  }
  return true;
}

void release(std::size_t begin, std::size_t end, State state) {
  if (!all(begin, end, state)) return;
  for (std::size_t t = begin; t < end; ++t) fibres[t].state = State::kReady;
}

void run_block(bool reverse) {
  while (!all(0, threads, State::kDone)) {
    bool moved = false;
    for (std::size_t i = 0; i < threads; ++i) {
      current = reverse ? threads - 1 - i : i;
      if (fibres[current].state != State::kReady) continue;
      threadIdx = fibres[current].index;
      swapcontext(&scheduler, &fibres[current].context);
      moved = true;
    }
    if (!moved) throw std::runtime_error("a barrier or shuffle that some threads do not reach");
    for (std::size_t first = 0; first < threads; first += kWarp) {
      release(first, first + kWarp < threads ? first + kWarp : threads, State::kAtShuffle);
    }
    release(0, threads, State::kAtBarrier);
  }
}

}  // namespace

namespace emulator {

void wait_for_block() { wait(State::kAtBarrier); }

uint64_t exchange(uint64_t mine, int offset) {
  const std::size_t other = current / kWarp * kWarp + (current % kWarp ^ static_cast<std::size_t>(offset));
  if (other >= threads) wait(State::kLost);
  fibres[current].exchanged = mine;
  wait(State::kAtShuffle);
  const uint64_t theirs = fibres[other].exchanged;
  // nobody may overwrite a value that is still to be read
  wait(State::kAtShuffle);
  return theirs;
}

void run_grid(dim3 grid, dim3 block, const std::function<void()>& thread) {
  const char* order = std::getenv("SPO_EMULATOR_ORDER");
  const bool reverse = order != nullptr && std::string(order) == "reverse";
  if (block.x * block.y * block.z > 1024) throw std::runtime_error("a block of more than 1024 threads");
  body = &thread;
  blockDim = block;
  gridDim = grid;
  for (unsigned b = 0; b < grid.x; ++b) {
    blockIdx = dim3(b, 0, 0);
    start_block(block);
    run_block(reverse);
  }
}

}  // namespace emulator
