#include "worker/thread_pool.h"

#include <atomic>
#include <thread>
#include <vector>

#include "common/check.h"

namespace lockstep {
namespace {

// About 20 microseconds: the gap between two loops of a decode step.
constexpr int kSpins = 400;

inline void Pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

// A loop is open from its announcement until its indices run out. `gate` holds
// the loop's generation, whether it is open, and how many helpers are inside:
//
//   gate = generation << 32 | open << 31 | inside
//
// A helper enters by counting itself in while the loop is open; the caller
// closes the loop when no index is left, then waits until nobody is inside. So
// the fields of a loop are written only while no helper can read them.
struct ThreadPool::Shared {
  static constexpr uint64_t kOpen = uint64_t{1} << 31;
  static constexpr uint64_t kInside = kOpen - 1;

  std::atomic<uint64_t> gate{0};
  std::atomic<uint32_t> announced{0};  // rises with every loop: what sleepers watch
  std::atomic<bool> ending{false};

  // Of the open loop.
  const absl::FunctionRef<void(int64_t, int)>* fn = nullptr;
  int64_t count = 0;
  alignas(64) std::atomic<int64_t> next{0};

  std::vector<std::thread> helpers;

  void RunIndices(int thread) {
    for (int64_t i = next.fetch_add(1, std::memory_order_relaxed); i < count;
         i = next.fetch_add(1, std::memory_order_relaxed)) {
      (*fn)(i, thread);
    }
  }
};

ThreadPool::ThreadPool(int size) : size_(size), shared_(std::make_unique<Shared>()) {
  LOCKSTEP_CHECK(size >= 1);
  for (int thread = 1; thread < size; ++thread) {
    shared_->helpers.emplace_back([this, thread] { Help(thread); });
  }
}

ThreadPool::~ThreadPool() {
  shared_->ending.store(true);
  shared_->announced.fetch_add(1);
  shared_->announced.notify_all();
  for (std::thread& helper : shared_->helpers) helper.join();
}

void ThreadPool::Help(int thread) {
  Shared& s = *shared_;
  uint64_t last = 0;  // generation of the last loop this helper entered
  while (!s.ending.load(std::memory_order_relaxed)) {
    const uint32_t announced = s.announced.load(std::memory_order_acquire);
    bool entered = false;
    for (int spin = 0; spin < kSpins && !entered; ++spin) {
      uint64_t gate = s.gate.load(std::memory_order_relaxed);
      while ((gate & Shared::kOpen) != 0 && (gate >> 32) != last) {
        if (s.gate.compare_exchange_weak(gate, gate + 1, std::memory_order_acquire,
                                         std::memory_order_relaxed)) {
          last = gate >> 32;
          entered = true;
          break;
        }
      }
      if (!entered) Pause();
    }
    if (entered) {
      s.RunIndices(thread);
      if ((s.gate.fetch_sub(1, std::memory_order_release) & (Shared::kOpen | Shared::kInside)) ==
          1) {
        s.gate.notify_one();
      }
    } else if (!s.ending.load()) {
      s.announced.wait(announced);
    }
  }
}

void ThreadPool::ParallelFor(int64_t count, absl::FunctionRef<void(int64_t, int)> fn) {
  if (size_ == 1 || count <= 1) {
    for (int64_t i = 0; i < count; ++i) fn(i, 0);
    return;
  }
  Shared& s = *shared_;
  s.fn = &fn;
  s.count = count;
  s.next.store(0, std::memory_order_relaxed);
  const uint64_t generation = (s.gate.load(std::memory_order_relaxed) >> 32) + 1;
  s.gate.store(generation << 32 | Shared::kOpen, std::memory_order_release);
  s.announced.fetch_add(1, std::memory_order_release);
  s.announced.notify_all();

  s.RunIndices(0);

  uint64_t gate = s.gate.fetch_and(~Shared::kOpen, std::memory_order_acquire) & ~Shared::kOpen;
  for (int spin = 0; (gate & Shared::kInside) != 0; ++spin) {
    if (spin < kSpins) {
      Pause();
    } else {
      s.gate.wait(gate, std::memory_order_acquire);
    }
    gate = s.gate.load(std::memory_order_acquire);
  }
}

}  // namespace lockstep
