#include "coordinator/api/work_pool.h"

#include <limits>
#include <utility>

namespace lockstep {

WorkPool::WorkPool(int threads) {
  for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { Run(); });
}

WorkPool::~WorkPool() { Stop(); }

void WorkPool::Post(std::function<void()> work) {
  TryPost(std::move(work), std::numeric_limits<size_t>::max());
}

bool WorkPool::TryPost(std::function<void()> work, size_t capacity) {
  {
    const std::lock_guard lock(mutex_);
    if (stopping_ || queue_.size() >= capacity) return false;
    queue_.push_back(std::move(work));
  }
  changed_.notify_one();
  return true;
}

void WorkPool::Stop() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  for (std::thread& thread : threads_) {
    if (thread.joinable()) thread.join();
  }
}

void WorkPool::Run() {
  for (;;) {
    std::function<void()> work;
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
      if (queue_.empty()) return;
      work = std::move(queue_.front());
      queue_.pop_front();
    }
    work();
  }
}

}  // namespace lockstep
