// How a team of threads goes through steps of tasks without a barrier between them.
//
// At a barrier everyone waits for a thread that another program holds up. Here a thread that finds no task left in a
// step goes on with the next one, and waits only for what its task needs.
//
// No standard library here: an inline function compiled for one instruction set could replace another file's.
#pragma once

#include <immintrin.h>
#include <sched.h>

#include <cstdint>
#include <cstring>

namespace spo {
namespace {

// On a cache line of its own.
struct alignas(64) Counter {
  int64_t value;
};

inline void add(Counter& counter) { __atomic_fetch_add(&counter.value, 1, __ATOMIC_RELEASE); }

inline void wait_for(const int64_t& value, int64_t wanted) {
  constexpr int kSpins = 1000;  // tens of microseconds, before the core is offered to others
  for (int spins = 0; __atomic_load_n(&value, __ATOMIC_ACQUIRE) != wanted; ++spins) {
    if (spins < kSpins) {
      _mm_pause();
    } else {
      sched_yield();
    }
  }
}

// Each thread its own share of the tasks, in order, and then what the others have left. A share is the same in every
// step, so that what is added to is in the cache of the thread that wrote it last. `taken` has a counter a thread.
template <typename Run>
inline void deal(int64_t tasks, int thread, int threads, Counter* taken, const Run& run) {
  for (int i = 0; i < threads; ++i) {
    const int owner = (thread + i) % threads;
    const int64_t first = tasks * owner / threads, count = tasks * (owner + 1) / threads - first;
    for (;;) {
      const int64_t task = __atomic_fetch_add(&taken[owner].value, 1, __ATOMIC_RELAXED);
      if (task >= count) break;
      run(first + task);
    }
  }
}

// Steps, each of tasks that pack into one of two buffers in turn, and of tasks that read it. Reading tasks of the same
// number follow each other from step to step. All tasks of a step are taken before any of the next, so whoever is
// waited for is at work.
class Steps {
 public:
  // what the constructor's `memory` holds, a multiple of a cache line
  static int64_t bytes(int64_t steps, int64_t reads, int threads) {
    const int64_t finished = (reads * static_cast<int64_t>(sizeof(int64_t)) + 63) / 64 * 64;
    return steps * counters(threads) * static_cast<int64_t>(sizeof(Counter)) + finished;
  }

  Steps(void* memory, int64_t steps, int64_t reads, int threads)
      : reads_(reads),
        threads_(threads),
        counters_(static_cast<Counter*>(memory)),
        finished_(reinterpret_cast<int64_t*>(counters_ + steps * counters(threads))) {
    std::memset(memory, 0, static_cast<size_t>(bytes(steps, reads, threads)));
  }

  // Called by every thread of the team for every step, in order.
  template <typename Pack, typename Read>
  void run(int64_t step, int64_t packs, int thread, int team, const Pack& pack, const Read& read) const {
    Counter *here = of(step), *taken = here + 2;
    Counter &packed = here[0], &done = here[1];
    if (packs > 0 && step >= 2) wait_for(of(step - 2)[1].value, reads_);
    deal(packs, thread, team, taken, [&](int64_t task) {
      pack(task);
      add(packed);
    });
    wait_for(packed.value, packs);
    deal(reads_, thread, team, taken + threads_, [&](int64_t task) {
      wait_for(finished_[task], step);
      read(task);
      __atomic_store_n(&finished_[task], step + 1, __ATOMIC_RELEASE);
      add(done);
    });
  }

 private:
  // of a step: how many tasks packed, how many read, and how many of each kind were taken of each thread's share
  static int64_t counters(int threads) { return 2 + 2 * threads; }
  Counter* of(int64_t step) const { return counters_ + step * counters(threads_); }

  int64_t reads_;
  int threads_;
  Counter* counters_;
  int64_t* finished_;  // of each reading task, how many steps it has been through
};

}  // namespace
}  // namespace spo
