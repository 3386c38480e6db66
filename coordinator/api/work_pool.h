// A few threads and one queue of work, for what must not run on the engine
// thread or on a door's threads: tokenising prompts, turning tokens into text.
// Thread-safe.
#ifndef LOCKSTEP_COORDINATOR_API_WORK_POOL_H_
#define LOCKSTEP_COORDINATOR_API_WORK_POOL_H_

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace lockstep {

class WorkPool {
 public:
  explicit WorkPool(int threads);
  ~WorkPool();  // Stop

  // For work whose amount is bounded by who posts it. After Stop: dropped.
  void Post(std::function<void()> work);
  // False when `capacity` pieces wait already, or after Stop.
  bool TryPost(std::function<void()> work, size_t capacity);
  // Runs what is queued, then joins. Not from a thread of the pool.
  void Stop();

 private:
  void Run();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> queue_;  // guarded by mutex_
  bool stopping_ = false;                    // guarded by mutex_
  std::vector<std::thread> threads_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_API_WORK_POOL_H_
