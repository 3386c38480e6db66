#include "cli/bench/serve_bench.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "cli/bench/bench_session.h"
#include "cli/bench/serve_report.h"
#include "cli/bench/statistics.h"

namespace lockstep {
namespace {

using Json = nlohmann::ordered_json;

constexpr uint32_t kWarmUpRequests = 8;
constexpr uint32_t kWarmUpTokens = 16;    // of a prompt and of its answer, where they fit
constexpr int64_t kSleepNs = 50'000'000;  // between two looks at an interruption
constexpr uint32_t kChatTokens = 2048;    // of the longest conversation
constexpr uint32_t kRequests = 200;       // a point
constexpr uint32_t kRounds = 4;           // of a closed loop: most of it is not its ends

// Sends one point's requests and gathers their logs.
class Generator {
 public:
  Generator(LoadClient* client, std::vector<v1::GenerateRequest> requests)
      : client_(client), requests_(std::move(requests)), logs_(requests_.size()) {}

  std::vector<RequestLog> Open(double rate, std::mt19937_64* random) {
    std::exponential_distribution<double> gap_s(rate);
    int64_t due_ns = NowNs();
    for (size_t i = 0; i < requests_.size() && !client_->cancelled(); ++i) {
      SleepUntil(due_ns);
      Send(i, due_ns, /*follow=*/false);
      due_ns += static_cast<int64_t>(gap_s(*random) * 1e9);
    }
    return Wait(next_);
  }

  std::vector<RequestLog> Closed(size_t under_way) {
    const size_t first = std::min(under_way, requests_.size());
    next_ = first;
    for (size_t i = 0; i < first; ++i) Send(i, 0, /*follow=*/true);
    return Wait(requests_.size());
  }

 private:
  void SleepUntil(int64_t due_ns) const {
    for (int64_t now = NowNs(); now < due_ns && !client_->cancelled(); now = NowNs()) {
      std::this_thread::sleep_for(std::chrono::nanoseconds(std::min(due_ns - now, kSleepNs)));
    }
  }

  void Send(size_t i, int64_t due_ns, bool follow) {
    if (!follow) next_ = i + 1;
    client_->Send(requests_[i], due_ns,
                  [this, i, follow](RequestLog log) { Keep(i, std::move(log), follow); });
  }

  // On a lane's thread.
  void Keep(size_t i, RequestLog log, bool follow) {
    // A place that is free is taken before this answer is counted, so that the
    // last count is the last call.
    if (follow) {
      const size_t next = next_++;
      if (next < requests_.size()) Send(next, 0, true);
    }
    std::lock_guard lock(mutex_);
    logs_[i] = std::move(log);
    ++ended_;
    changed_.notify_one();
  }

  std::vector<RequestLog> Wait(size_t count) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return ended_ == count; });
    return std::move(logs_);
  }

  LoadClient* const client_;
  const std::vector<v1::GenerateRequest> requests_;
  std::atomic<size_t> next_ = 0;
  std::mutex mutex_;
  std::condition_variable changed_;
  size_t ended_ = 0;              // guarded by mutex_
  std::vector<RequestLog> logs_;  // guarded by mutex_
};

uint32_t Requests(const ServeBenchFlags& flags) {
  uint32_t most = 0;
  for (const uint32_t n : flags.concurrency) most = std::max(most, n);
  return flags.requests.value_or(std::max(kRequests, kRounds * most));
}

absl::Status CheckFlags(const ServeBenchFlags& flags) {
  if (flags.rates.empty() && flags.concurrency.empty()) {
    return absl::InvalidArgumentError(
        "--request-rate: give one or more (open loop), or --concurrency (closed loop)");
  }
  for (const double rate : flags.rates) {
    if (!(rate > 0)) {
      return absl::InvalidArgumentError(
          absl::StrCat("--request-rate ", rate, ": expected requests a second, above 0"));
    }
  }
  for (const uint32_t n : flags.concurrency) {
    if (n <= Requests(flags)) continue;
    return absl::InvalidArgumentError(absl::StrCat("--concurrency ", n, ": above --requests ",
                                                   Requests(flags), ", never so many at once"));
  }
  return absl::OkStatus();
}

bool LikePeople(const ServeBenchFlags& flags) { return flags.lengths == "sharegpt"; }

std::string DescribeLengths(const ServeBenchFlags& flags) {
  if (!LikePeople(flags)) {
    return absl::StrFormat("%u requests a point of %u prompt and %u output tokens", Requests(flags),
                           flags.input, flags.output);
  }
  return absl::StrFormat(
      "%u requests a point with ShareGPT-like lengths (log-normal: prompts median 110, sigma 1.2; "
      "answers median 140, sigma 0.9; 4 to 1024 tokens)",
      Requests(flags));
}

std::vector<v1::GenerateRequest> MakeRequests(const ServeBenchFlags& flags,
                                              const v1::GetModelInfoResponse& info,
                                              std::mt19937_64* random) {
  const uint32_t longest = std::min(info.max_model_len(), kChatTokens);
  std::vector<v1::GenerateRequest> requests;
  for (uint32_t i = 0; i < Requests(flags); ++i) {
    const Lengths lengths =
        LikePeople(flags) ? ChatLengths(random, longest) : Lengths{flags.input, flags.output};
    requests.push_back(RandomRequest(lengths, info.vocab_size(), random));
  }
  return requests;
}

}  // namespace

absl::Status RunServeBench(const ServeBenchFlags& flags) {
  if (absl::Status status = CheckFlags(flags); !status.ok()) return status;
  const BenchOutput output(flags.bench);
  if (absl::Status begun = output.Begin(); !begun.ok()) return begun;
  if (absl::Status empty = WriteReportFile("--html", flags.html, ""); !empty.ok()) return empty;
  ServerNeeds needs;
  // Of a server started for this: what the closed loop keeps under way.
  for (const uint32_t n : flags.concurrency) needs.sequences = std::max(needs.sequences, n);
  needs.requests =
      std::max({kWarmUpRequests, needs.sequences, flags.rates.empty() ? 0 : Requests(flags)});
  if (!LikePeople(flags)) needs.tokens = flags.input + flags.output;
  absl::StatusOr<std::unique_ptr<BenchSession>> session = BenchSession::Open(flags.bench, needs);
  if (!session.ok()) return session.status();
  const v1::GetModelInfoResponse& info = (*session)->target().info;
  if (absl::Status fits = CheckNeeds(info, {1, 1, needs.tokens}); !fits.ok()) return fits;
  LoadClient* const client = (*session)->client();
  std::mt19937_64* const random = (*session)->random();
  const uint32_t warm = std::min(kWarmUpTokens, info.max_model_len() / 2);
  if (absl::StatusOr<Round> warm_up = (*session)->Run(kWarmUpRequests, {warm, warm});
      !warm_up.ok()) {
    if (!absl::IsCancelled(warm_up.status())) (*session)->PrintLogTail();
    return warm_up.status();
  }

  std::vector<LoadPoint> points;
  for (const double rate : flags.rates) points.push_back({true, rate});
  for (const uint32_t n : flags.concurrency) points.push_back({false, double{1} * n});
  Json report = {{"bench", "serve"},
                 {"target", DescribeTarget(flags.bench, (*session)->target())},
                 {"lengths", DescribeLengths(flags)},
                 {"slo", {{"ttft_ms", flags.slo.ttft_ms}, {"tpot_ms", flags.slo.tpot_ms}}},
                 {"client_us_per_token", nullptr},
                 {"points", Json::array()}};
  absl::Status verdict;
  const double cpu_begin_s = ProcessCpuSeconds();
  int64_t tokens = 0;
  for (const LoadPoint& point : points) {
    std::fprintf(stderr, "%s: %u requests\n", point.Name().c_str(), Requests(flags));
    Generator generator(client, MakeRequests(flags, info, random));
    const std::vector<RequestLog> logs = point.open
                                             ? generator.Open(point.value, random)
                                             : generator.Closed(static_cast<size_t>(point.value));
    if (client->cancelled()) return absl::CancelledError("interrupted");
    const ServeFigures figures = Summarize(point, logs, flags.slo);
    verdict.Update(Verdict(figures));
    tokens += figures.output_tokens;
    report["points"].push_back(ToJson(figures));
    report["client_us_per_token"] = (ProcessCpuSeconds() - cpu_begin_s) * 1e6 /
                                    static_cast<double>(std::max<int64_t>(tokens, 1));
    if (absl::Status saved = output.Save(report); !saved.ok()) return saved;
  }
  output.Text(ServeTable(report));
  absl::Status status = output.Finish(report);
  // Last: the figures are out, whatever becomes of the plots.
  if (!flags.html.empty()) {
    status.Update(WriteReportFile("--html", flags.html, ServeHtml(report)));
  }
  if (verdict.ok()) return status;
  (*session)->PrintLogTail();
  return verdict;
}

}  // namespace lockstep
