#include "worker/load_progress.h"

#include <algorithm>
#include <cstdio>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/log.h"

namespace lockstep {
namespace {

constexpr std::chrono::milliseconds kSendEvery{200};
constexpr std::chrono::seconds kLineEvery{2};
constexpr int kBarWidth = 30;

std::string Size(uint64_t bytes) {
  if (bytes >= uint64_t{1} << 30) return absl::StrFormat("%.2f GiB", bytes / 1073741824.0);
  return absl::StrFormat("%.1f MiB", bytes / 1048576.0);
}

}  // namespace

LoadProgressReport::LoadProgressReport(uint32_t rank, bool terminal, Send send)
    : rank_(rank), terminal_(terminal), send_(std::move(send)), start_(Clock::now()) {
  sent_ = shown_ = start_;
}

std::string LoadProgressReport::Line(uint32_t rank, uint64_t bytes_done, uint64_t bytes_total,
                                     double seconds, bool bar) {
  std::string line = absl::StrCat("rank ", rank, " ");
  if (bar) {
    const double part = bytes_total == 0 ? 1.0 : static_cast<double>(bytes_done) / bytes_total;
    const int filled = static_cast<int>(std::clamp(part, 0.0, 1.0) * kBarWidth);
    absl::StrAppend(&line, "[", std::string(filled, '#'), std::string(kBarWidth - filled, ' '),
                    "] ");
  }
  absl::StrAppend(&line, Size(bytes_done), " of ", Size(bytes_total));
  if (seconds > 0) absl::StrAppendFormat(&line, ", %.1f GB/s", 1e-9 * bytes_done / seconds);
  return line;
}

void LoadProgressReport::Update(uint64_t bytes_done, uint64_t bytes_total) {
  const Clock::time_point now = Clock::now();
  const bool last =
      bytes_done >= bytes_total && !std::exchange(finished_, bytes_done >= bytes_total);
  if (last || now - sent_ >= kSendEvery) {
    send_(bytes_done, bytes_total);
    sent_ = now;
  }
  const double seconds = std::chrono::duration<double>(now - start_).count();
  if (terminal_) {
    if (!last && now - shown_ < kSendEvery) return;
    // The cursor returns to the start of the line, so that a line of the log takes the
    // bar's place; the last state stays.
    std::fprintf(stderr, "\r%s\033[K%s",
                 Line(rank_, bytes_done, bytes_total, seconds, true).c_str(), last ? "\n" : "\r");
    std::fflush(stderr);
    shown_ = now;
  } else if (now - shown_ >= kLineEvery) {
    LogInfo(absl::StrCat("loading: ", Line(rank_, bytes_done, bytes_total, seconds, false)));
    shown_ = now;
  }
}

}  // namespace lockstep
