// lockstep top: a server's figures, live.
#include <poll.h>
#include <termios.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <memory>
#include <string>
#include <utility>

#include "CLI/CLI.hpp"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "cli/commands.h"
#include "cli/server_access.h"
#include "cli/terminal.h"
#include "cli/top/frame.h"
#include "cli/top/http_get.h"
#include "cli/top/metrics_text.h"

namespace lockstep {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kTimeoutMs = 5'000;

struct TopFlags {
  std::string server = "127.0.0.1:8000";
  ServerAccess access;
  double interval_s = 1;
  uint64_t frames = 0;  // 0: until interrupted
  bool once = false;
};

struct Scrape {
  MetricsText text;
  Clock::time_point at;
};

absl::StatusOr<Scrape> ScrapeNow(const TopFlags& flags) {
  const absl::StatusOr<std::string> body =
      HttpGet(flags.server, flags.access, "/metrics", kTimeoutMs);
  if (!body.ok()) return body.status();
  Scrape scrape{MetricsText::Parse(*body), Clock::now()};
  if (!scrape.text.Samples("lockstep_build_info").empty()) return scrape;
  return absl::UnavailableError(
      absl::StrCat(flags.server, ": its /metrics are not a Lockstep server's"));
}

// The terminal's other screen, with keys that arrive at once; as it was before
// when this is gone. On anything but a terminal frames follow one another.
class Screen {
 public:
  explicit Screen(bool in_place) : in_place_(in_place) {
    if (!in_place_) return;
    std::fputs("\x1b[?1049h\x1b[?25l", stdout);
    keys_ = isatty(STDIN_FILENO) == 1 && tcgetattr(STDIN_FILENO, &before_) == 0;
    if (!keys_) return;
    termios quick = before_;
    quick.c_lflag &= ~static_cast<tcflag_t>(ICANON | ECHO);
    tcsetattr(STDIN_FILENO, TCSANOW, &quick);
  }
  ~Screen() {
    if (keys_) tcsetattr(STDIN_FILENO, TCSANOW, &before_);
    if (in_place_) std::fputs("\x1b[?25h\x1b[?1049l", stdout);
    std::fflush(stdout);
  }

  void Show(const std::string& frame) {
    if (in_place_) {
      // Line by line over the last frame: nothing flickers.
      const std::string lines = absl::StrReplaceAll(frame, {{"\n", "\x1b[K\n"}});
      std::printf("\x1b[H%s\x1b[K\nq quits\x1b[K\x1b[J", lines.c_str());
    } else {
      std::printf("%s%s", std::exchange(first_, false) ? "" : "\n", frame.c_str());
    }
    std::fflush(stdout);
  }

  // Waits for the time or a key; true when the key was q.
  bool Wait(std::chrono::milliseconds time) const {
    pollfd keyboard{keys_ ? STDIN_FILENO : -1, POLLIN, 0};
    char key = 0;
    if (poll(&keyboard, 1, static_cast<int>(time.count())) <= 0) return false;
    return read(STDIN_FILENO, &key, 1) == 1 && key == 'q';
  }

 private:
  const bool in_place_;
  bool keys_ = false, first_ = true;
  termios before_{};
};

// Waits out the interval in short looks at what may end it.
bool WaitFor(double seconds, const Screen& screen, const std::atomic<bool>& stop) {
  const auto until = Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                        std::chrono::duration<double>(seconds));
  while (!stop) {
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(until - Clock::now());
    if (left.count() <= 0) return true;
    if (screen.Wait(std::min(left, std::chrono::milliseconds(100)))) return false;
  }
  return false;
}

int RunTop(const TopFlags& flags) {
  absl::StatusOr<Scrape> before = ScrapeNow(flags);
  if (!before.ok()) {
    std::fprintf(stderr, "lockstep top: --server %s\n",
                 std::string(before.status().message()).c_str());
    return 1;
  }
  std::atomic<bool> stop = false;
  const InterruptGuard interrupt([&] { stop = true; });
  const uint64_t frames = flags.once ? 1 : flags.frames;
  Screen screen(isatty(STDOUT_FILENO) == 1 && frames != 1);
  for (uint64_t shown = 0; frames == 0 || shown < frames; ++shown) {
    if (!WaitFor(flags.interval_s, screen, stop)) return 0;
    absl::StatusOr<Scrape> now = ScrapeNow(flags);
    if (!now.ok()) {
      // It may come back: what was seen before stays the base.
      screen.Show(absl::StrCat("lockstep top   ", std::string(now.status().message()), "\n"));
      continue;
    }
    const double seconds = std::chrono::duration<double>(now->at - before->at).count();
    screen.Show(RenderFrame(flags.server, before->text, now->text, seconds));
    before = std::move(now);
  }
  return 0;
}

}  // namespace

void AddTopCommand(CLI::App* app, Command* chosen) {
  auto flags = std::make_shared<TopFlags>();
  CLI::App* command = app->add_subcommand("top", "Watch a server: load, latency, ranks, KV");
  command->group("Look");
  command->add_option("--server,--address", flags->server, "HTTP door: host:port")
      ->capture_default_str();
  AddAccessFlags(command, &flags->access);
  command->add_option("--interval", flags->interval_s, "Seconds a frame covers")
      ->check(CLI::Range(0.05, 3600.0))
      ->capture_default_str();
  command->add_option("--frames", flags->frames, "End after this many; 0: when interrupted")
      ->capture_default_str();
  command->add_flag("--once", flags->once, "Print one frame and end");
  command->callback([=] { *chosen = [=] { return RunTop(*flags); }; });
}

}  // namespace lockstep
