// What a person sees: progress on one line of a terminal, whole lines elsewhere;
// and Ctrl-C turned into a call.
#ifndef LOCKSTEP_CLI_TERMINAL_H_
#define LOCKSTEP_CLI_TERMINAL_H_

#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <thread>

namespace lockstep {

bool StderrIsTerminal();

// "1.50 GiB", "512 B".
std::string HumanBytes(uint64_t bytes);

// Redrawn at most ten times a second on a terminal; elsewhere one line a tenth
// of the way. Thread-safe.
class ProgressBar {
 public:
  ProgressBar(std::string label, uint64_t total);
  ~ProgressBar();  // ends the line
  void Set(uint64_t done, const std::string& note = "");

 private:
  void Draw(uint64_t done, const std::string& note);

  const std::string label_;
  const uint64_t total_;
  const bool terminal_;
  std::mutex mutex_;
  int64_t last_draw_ms_ = -1'000;
  int last_tenth_ = -1;
  bool drawn_ = false;
};

// While alive, SIGINT calls on_interrupt from a thread of its own instead of
// ending the process. One at a time.
class InterruptGuard {
 public:
  explicit InterruptGuard(std::function<void()> on_interrupt);
  ~InterruptGuard();

 private:
  std::function<void()> on_interrupt_;
  int pipe_[2];
  std::thread thread_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_CLI_TERMINAL_H_
