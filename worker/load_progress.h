// Reports the loading of weights: to the coordinator at most five times a
// second, and to people: a bar that redraws itself on a terminal, a line every
// two seconds elsewhere. One thread.
#ifndef LOCKSTEP_WORKER_LOAD_PROGRESS_H_
#define LOCKSTEP_WORKER_LOAD_PROGRESS_H_

#include <chrono>
#include <cstdint>
#include <functional>
#include <string>

namespace lockstep {

class LoadProgressReport {
 public:
  using Send = std::function<void(uint64_t bytes_done, uint64_t bytes_total)>;

  LoadProgressReport(uint32_t rank, bool terminal, Send send);

  void Update(uint64_t bytes_done, uint64_t bytes_total);

  // "rank 1 [#####     ] 1.25 of 2.50 GiB, 1.1 GB/s"
  static std::string Line(uint32_t rank, uint64_t bytes_done, uint64_t bytes_total, double seconds,
                          bool bar);

 private:
  using Clock = std::chrono::steady_clock;

  const uint32_t rank_;
  const bool terminal_;
  const Send send_;
  const Clock::time_point start_;
  Clock::time_point sent_, shown_;
  bool finished_ = false;
};

}  // namespace lockstep

#endif  // LOCKSTEP_WORKER_LOAD_PROGRESS_H_
