// Data parallelism for the cpu backend: one caller and size() - 1 helpers run
// the indices of a loop. Which thread runs which index is not defined, so work
// must not depend on it (results are kept the same for every size by making an
// index the unit of arithmetic). A loop does not wait for a helper that has not
// woken up: on a busy machine the caller just does more itself.
//
// Helpers spin for some microseconds after a loop, then sleep; an idle pool
// uses no CPU. One thread at a time calls ParallelFor; loops do not nest.
//
//   pool.ParallelFor(rows, [&](int64_t row, int thread) { ... scratch[thread] ... });
#ifndef LOCKSTEP_WORKER_THREAD_POOL_H_
#define LOCKSTEP_WORKER_THREAD_POOL_H_

#include <cstdint>
#include <memory>

#include "absl/functional/function_ref.h"

namespace lockstep {

class ThreadPool {
 public:
  // `size` threads in all, the caller of ParallelFor included; at least 1.
  explicit ThreadPool(int size);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return size_; }

  // Calls fn(index, thread) for every index in [0, count), thread in
  // [0, size()), and returns when all calls have.
  void ParallelFor(int64_t count, absl::FunctionRef<void(int64_t index, int thread)> fn);

 private:
  struct Shared;
  void Help(int thread);

  const int size_;
  std::unique_ptr<Shared> shared_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_WORKER_THREAD_POOL_H_
