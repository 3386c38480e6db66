#include "cli/terminal.h"

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <utility>

#include "common/check.h"

namespace lockstep {
namespace {

int64_t NowMs() {
  return std::chrono::duration_cast<std::chrono::milliseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// Where the signal handler writes; -1: nobody listens.
std::atomic<int> interrupt_fd{-1};

void OnInterrupt(int) {
  const int fd = interrupt_fd.load();
  const char byte = 'i';
  if (fd >= 0 && write(fd, &byte, 1) < 0) return;
}

}  // namespace

bool StderrIsTerminal() { return isatty(STDERR_FILENO) == 1; }

std::string HumanBytes(uint64_t bytes) {
  static constexpr const char* kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  double value = static_cast<double>(bytes);
  size_t unit = 0;
  while (value >= 1024 && unit + 1 < std::size(kUnits)) value /= 1024, ++unit;
  char text[32];
  std::snprintf(text, sizeof(text), unit == 0 ? "%.0f %s" : "%.2f %s", value, kUnits[unit]);
  return text;
}

ProgressBar::ProgressBar(std::string label, uint64_t total)
    : label_(std::move(label)),
      total_(std::max<uint64_t>(total, 1)),
      terminal_(StderrIsTerminal()) {}

ProgressBar::~ProgressBar() {
  if (terminal_ && drawn_) std::fputc('\n', stderr);
}

void ProgressBar::Set(uint64_t done, const std::string& note) {
  std::lock_guard lock(mutex_);
  const int tenth = static_cast<int>(std::min<uint64_t>(done, total_) * 10 / total_);
  const int64_t now = NowMs();
  const bool due = terminal_ ? (now - last_draw_ms_ >= 100 || done >= total_) : tenth > last_tenth_;
  if (!due) return;
  last_draw_ms_ = now;
  last_tenth_ = tenth;
  Draw(done, note);
}

void ProgressBar::Draw(uint64_t done, const std::string& note) {
  constexpr int kWidth = 30;
  const double share = static_cast<double>(std::min(done, total_)) / static_cast<double>(total_);
  const char* space = note.empty() ? "" : "  ";
  if (!terminal_) {
    std::fprintf(stderr, "%s: %llu of %llu%s%s\n", label_.c_str(),
                 static_cast<unsigned long long>(done), static_cast<unsigned long long>(total_),
                 space, note.c_str());
    return;
  }
  const int filled = static_cast<int>(share * kWidth);
  std::string bar(static_cast<size_t>(filled), '#');
  bar.append(static_cast<size_t>(kWidth - filled), '.');
  std::fprintf(stderr, "\r\033[K%s [%s] %3.0f %%%s%s", label_.c_str(), bar.c_str(), share * 100,
               space, note.c_str());
  std::fflush(stderr);
  drawn_ = true;
}

InterruptGuard::InterruptGuard(std::function<void()> on_interrupt)
    : on_interrupt_(std::move(on_interrupt)) {
  LOCKSTEP_CHECK(pipe(pipe_) == 0);
  LOCKSTEP_CHECK(interrupt_fd.exchange(pipe_[1]) == -1);
  signal(SIGINT, OnInterrupt);
  thread_ = std::thread([this] {
    char byte = 0;
    while (read(pipe_[0], &byte, 1) == 1 && byte == 'i') on_interrupt_();
  });
}

InterruptGuard::~InterruptGuard() {
  signal(SIGINT, SIG_DFL);
  interrupt_fd.store(-1);
  const char byte = 'q';
  if (write(pipe_[1], &byte, 1) == 1) thread_.join();
  close(pipe_[0]);
  close(pipe_[1]);
}

}  // namespace lockstep
