// lockstep batch IN OUT: a file of requests, answered as fast as the server takes them.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "cli/batch_job.h"
#include "cli/commands.h"
#include "cli/connection_flags.h"
#include "cli/terminal.h"

namespace lockstep {
namespace {

struct BatchFlags {
  ConnectionFlags connection;
  std::string input, output;
  uint32_t concurrency = 32;
};

// Refusals for want of room are waited out; a server that is away may come back.
constexpr int kMaxUnavailableTries = 30;
constexpr int64_t kUnavailablePauseMs = 1'000;

class BatchRun {
 public:
  BatchRun(std::vector<BatchItem> items, uint32_t concurrency, Client* client, std::ofstream* out)
      : items_(std::move(items)),
        client_(client),
        out_(out),
        calls_(concurrency),
        bar_("requests", items_.size()) {}

  void Run() {
    InterruptGuard interrupt([this] { Interrupt(); });
    std::vector<std::thread> threads;
    for (CallHandle& call : calls_) threads.emplace_back([this, &call] { Work(&call); });
    for (std::thread& thread : threads) thread.join();
  }

  size_t failed() const { return failed_; }
  bool complete() const { return written_ == items_.size(); }
  size_t written() const { return written_; }

 private:
  // The first time ends what has not begun, the second what is under way.
  void Interrupt() {
    if (!stopping_.exchange(true)) {
      std::fprintf(stderr, "%sfinishing the requests under way; Ctrl-C again ends at once\n",
                   StderrIsTerminal() ? "\n" : "");  // a bar stands on the line
      return;
    }
    for (CallHandle& call : calls_) call.Cancel();
  }

  void Work(CallHandle* call) {
    for (;;) {
      const size_t i = next_++;
      if (i >= items_.size() || stopping_) return;
      const BatchItem& item = items_[i];
      if (!item.error.ok()) {
        Write(ErrorLine(item.custom_id, item.error), true);
        continue;
      }
      absl::StatusOr<v1::GenerateResponse> response = Ask(item.request, call);
      if (stopping_ && !response.ok()) return;
      if (response.ok()) {
        Write(AnswerLine(item.custom_id, *response), false);
      } else {
        Write(ErrorLine(item.custom_id, response.status()), true);
      }
    }
  }

  absl::StatusOr<v1::GenerateResponse> Ask(const v1::GenerateRequest& request, CallHandle* call) {
    for (int away = 0;;) {
      absl::StatusOr<v1::GenerateResponse> response = client_->Generate(request, call);
      int64_t pause_ms = kUnavailablePauseMs;
      // Lockstep's own refusals say when to come back; gRPC's (a message too large) are for good.
      if (const auto asked = Client::RetryDelayMs(response.status())) {
        pause_ms = *asked;
      } else if (!absl::IsUnavailable(response.status()) || ++away > kMaxUnavailableTries) {
        return response;
      }
      for (int64_t waited = 0; waited < pause_ms && !stopping_; waited += 50) {
        std::this_thread::sleep_for(std::chrono::milliseconds(50));
      }
      if (stopping_) return response;
    }
  }

  void Write(const std::string& line, bool failed) {
    std::lock_guard lock(mutex_);
    *out_ << line << '\n' << std::flush;
    ++written_;
    if (failed) ++failed_;
    bar_.Set(written_, failed_ > 0 ? absl::StrCat(failed_, " failed") : "");
    if (*out_) return;
    // Answers that cannot be kept are not asked for.
    stopping_ = true;
    for (CallHandle& call : calls_) call.Cancel();
  }

  const std::vector<BatchItem> items_;
  Client* const client_;
  std::ofstream* const out_;
  std::vector<CallHandle> calls_;  // one a thread
  std::atomic<size_t> next_ = 0;
  std::atomic<bool> stopping_ = false;
  std::mutex mutex_;  // guards the output and the counts below
  ProgressBar bar_;
  size_t written_ = 0;
  size_t failed_ = 0;
};

int RunBatch(const BatchFlags& flags) {
  auto fail = [](const absl::Status& status) {
    std::fprintf(stderr, "lockstep batch: %s\n", std::string(status.message()).c_str());
    return 1;
  };
  absl::StatusOr<std::vector<BatchItem>> items = ReadBatch(flags.input);
  if (!items.ok()) return fail(items.status());
  absl::StatusOr<BatchOutput> output = ReadOutput(flags.output);
  if (!output.ok()) return fail(output.status());
  const size_t total = items->size();
  std::erase_if(*items,
                [&](const BatchItem& item) { return output->answered.contains(item.custom_id); });
  if (items->size() < total) {
    std::fprintf(stderr, "%zu of %zu requests are answered already\n", total - items->size(),
                 total);
  }
  if (items->empty()) return 0;
  const absl::Status unwritable =
      absl::UnavailableError(absl::StrCat(flags.output, ": cannot be written"));
  std::ofstream out(flags.output, std::ios::app);
  if (!out) return fail(unwritable);
  absl::StatusOr<Connection> connection = Connect(flags.connection);
  if (!connection.ok()) return fail(connection.status());
  if (!output->stale.empty()) {
    absl::Status dropped = DropLines(flags.output, output->stale);
    if (!dropped.ok()) return fail(dropped);
    out = std::ofstream(flags.output, std::ios::app);  // the name is another file's now
    if (!out) return fail(unwritable);
  }

  BatchRun run(*std::move(items), flags.concurrency, connection->client.get(), &out);
  run.Run();
  if (!out) return fail(absl::DataLossError(absl::StrCat(flags.output, ": writing failed")));
  if (!run.complete()) {
    std::fprintf(stderr, "stopped; the same command goes on from here\n");
    return 130;
  }
  if (run.failed() > 0) {
    return fail(absl::UnknownError(absl::StrCat(
        run.failed(), " of ", run.written(), " requests failed; their lines hold an \"error\"")));
  }
  return 0;
}

}  // namespace

void AddBatchCommand(CLI::App* app, Command* chosen) {
  auto flags = std::make_shared<BatchFlags>();
  CLI::App* command =
      app->add_subcommand("batch", "Answer a file of requests; run again to resume");
  command->group("Ask");
  command->add_option("input", flags->input, "JSON lines: prompt or messages, sampling fields")
      ->required();
  command->add_option("output", flags->output, "JSON lines, one an answer")->required();
  command->add_option("--concurrency", flags->concurrency, "Requests under way at once")
      ->check(CLI::Range(1u, 1024u))
      ->capture_default_str();
  AddConnectionFlags(command, &flags->connection);
  command->callback([=] { *chosen = [=] { return RunBatch(*flags); }; });
}

}  // namespace lockstep
