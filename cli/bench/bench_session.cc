#include "cli/bench/bench_session.h"

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "cli/bench/statistics.h"

namespace lockstep {
namespace {

constexpr int64_t kConnectTimeoutMs = 10'000;
// Enough steps for caches and clocks to settle.
constexpr uint32_t kWarmUpTokens = 16;
constexpr int kLogLines = 12;

}  // namespace

double Round::last_first_token_s() const {
  int64_t begin = logs.front().due_ns, last = 0;
  for (const RequestLog& log : logs) {
    begin = std::min(begin, log.due_ns);
    last = std::max(last, log.arrivals.front().ns);
  }
  return static_cast<double>(last - begin) * 1e-9;
}

double Round::tokens_per_s() const {
  int64_t begin = logs.front().due_ns, last = 0;
  for (const RequestLog& log : logs) {
    begin = std::min(begin, log.due_ns);
    last = std::max(last, log.arrivals.back().ns);
  }
  return static_cast<double>(output_tokens) / (static_cast<double>(last - begin) * 1e-9);
}

ClientCost CostOf(const std::vector<Round>& rounds) {
  double cpu_s = 0, wall_s = 0, tokens = 0;
  for (const Round& round : rounds) {
    cpu_s += round.client_cpu_s;
    wall_s += round.wall_s;
    tokens += static_cast<double>(round.output_tokens);
  }
  return {cpu_s / wall_s, cpu_s * 1e6 / tokens};
}

BenchSession::BenchSession(const BenchFlags& flags, BenchTarget target)
    : flags_(flags), target_(std::move(target)), random_(target_.seed) {}

absl::StatusOr<std::unique_ptr<BenchSession>> BenchSession::Open(const BenchFlags& flags,
                                                                 const ServerNeeds& needs) {
  absl::StatusOr<BenchTarget> target = OpenBenchTarget(flags, needs);
  if (!target.ok()) return target.status();
  std::unique_ptr<BenchSession> session(new BenchSession(flags, *std::move(target)));
  session->client_ = std::make_unique<LoadClient>(
      session->target_.address, LanesFor(std::max(needs.sequences, needs.requests)),
      session->target_.access);
  if (absl::Status status = session->client_->Connect(kConnectTimeoutMs); !status.ok()) {
    return status;
  }
  session->interrupt_ =
      std::make_unique<InterruptGuard>([client = session->client_.get()] { client->Cancel(); });
  return session;
}

BenchSession::~BenchSession() {
  if (flags_.server_log.empty() || target_.local == nullptr) return;
  std::ofstream(flags_.server_log, std::ios::trunc) << target_.local->Log();
}

absl::StatusOr<Round> BenchSession::Run(int64_t count, const Lengths& lengths) {
  const std::vector<v1::GenerateRequest> requests =
      RandomRequests(count, lengths, target_.info.vocab_size(), &random_);
  Round round;
  const double cpu_begin_s = ProcessCpuSeconds();
  const int64_t begin_ns = NowNs();
  round.logs = client_->RunAll(requests);
  round.wall_s = static_cast<double>(NowNs() - begin_ns) * 1e-9;
  round.client_cpu_s = ProcessCpuSeconds() - cpu_begin_s;
  if (client_->cancelled()) return absl::CancelledError("interrupted");
  if (absl::Status failure = FirstFailure(round.logs); !failure.ok()) return failure;
  for (const RequestLog& log : round.logs) {
    round.output_tokens += log.output_tokens;
    round.cached_tokens += log.cached_tokens;
  }
  return round;
}

absl::StatusOr<std::vector<Round>> BenchSession::Measure(const std::string& name, int64_t count,
                                                         const Lengths& lengths) {
  std::fprintf(stderr, "%s: warm-up", name.c_str());
  const absl::StatusOr<Round> warm_up =
      Run(count, {lengths.prompt, std::min(lengths.output, kWarmUpTokens)});
  std::vector<Round> rounds;
  absl::Status status = warm_up.status();
  for (uint32_t run = 0; status.ok() && run < flags_.runs; ++run) {
    std::fprintf(stderr, ", run %u", run + 1);
    absl::StatusOr<Round> round = Run(count, lengths);
    status = round.status();
    if (round.ok()) rounds.push_back(*std::move(round));
  }
  std::fputc('\n', stderr);
  if (!status.ok()) {
    if (!absl::IsCancelled(status)) PrintLogTail();
    return absl::Status(status.code(), absl::StrCat(name, ": ", std::string(status.message())));
  }
  return rounds;
}

void BenchSession::PrintLogTail() const {
  if (target_.local == nullptr) return;
  const std::vector<std::string> lines =
      absl::StrSplit(target_.local->Log(), '\n', absl::SkipEmpty());
  const size_t first = lines.size() > kLogLines ? lines.size() - kLogLines : 0;
  for (size_t i = first; i < lines.size(); ++i) std::fprintf(stderr, "  %s\n", lines[i].c_str());
}

}  // namespace lockstep
