// Under a sanitizer: whatever program a test starts, however deep (the daemons
// under `lockstep serve`, a server that a command starts for itself, a process
// whose exit code nobody asks), its reports fail the test during which they came.
// And the one place that says how much slower such a build is. In other builds
// neither does anything. Called on the test's main thread.
#ifndef LOCKSTEP_TESTS_INTEGRATION_SANITIZER_REPORTS_H_
#define LOCKSTEP_TESTS_INTEGRATION_SANITIZER_REPORTS_H_

#include <chrono>
#include <string>

namespace lockstep {

// What a time bound of an ordinary build is multiplied by.
#if defined(__SANITIZE_THREAD__)
inline constexpr int kSlowdown = 6;
#elif defined(__SANITIZE_ADDRESS__)
inline constexpr int kSlowdown = 3;
#else
inline constexpr int kSlowdown = 1;
#endif

constexpr std::chrono::seconds Bound(int seconds) {
  return std::chrono::seconds(seconds) * kSlowdown;
}

// Children started from now on write their reports where the end of every test
// looks for them. Idempotent.
void WatchForSanitizerReports();

// A child started in its life may end without joining its threads: one that
// ends because a thread of it never returns.
class ThreadsMayLeak {
 public:
  ThreadsMayLeak();
  ~ThreadsMayLeak();
  ThreadsMayLeak(const ThreadsMayLeak&) = delete;
  ThreadsMayLeak& operator=(const ThreadsMayLeak&) = delete;

 private:
  std::string options_before_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_TESTS_INTEGRATION_SANITIZER_REPORTS_H_
