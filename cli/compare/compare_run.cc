#include "cli/compare/compare_run.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "cli/batch_job.h"
#include "cli/bench/prompts.h"
#include "cli/client.h"
#include "cli/compare/compare_figures.h"
#include "cli/local_server.h"

namespace lockstep {
namespace {

using Json = nlohmann::ordered_json;

constexpr int64_t kConnectTimeoutMs = 10'000;
constexpr int kThreads = 8;  // requests under way

// One configuration while it is asked.
struct OpenSide {
  std::unique_ptr<LocalServer> local;
  std::unique_ptr<Client> client;
  v1::GetModelInfoResponse info;
};

absl::Status Prefix(const std::string& where, const absl::Status& status) {
  return absl::Status(status.code(), absl::StrCat(where, ": ", std::string(status.message())));
}

absl::StatusOr<OpenSide> Open(const CompareSide& side, const CompareFlags& flags) {
  OpenSide open;
  std::string address = side.server;
  if (address.empty()) {
    std::vector<std::string> args = CLI::detail::split_up(side.flags);
    if (!flags.model.empty())
      args.insert(args.begin(), {"--model", flags.model});  // the side's own comes later
    absl::StatusOr<std::unique_ptr<LocalServer>> local = LocalServer::Start(args);
    if (!local.ok()) return local.status();
    open.local = *std::move(local);
    address = open.local->address();
  }
  open.client =
      std::make_unique<Client>(address, open.local == nullptr ? flags.access : ServerAccess{});
  absl::StatusOr<v1::GetModelInfoResponse> info = open.client->WaitReady(kConnectTimeoutMs);
  if (!info.ok()) return Prefix(address, info.status());
  open.info = *std::move(info);
  return open;
}

// Runs work(0) .. work(count - 1) on a few threads; the first error.
absl::Status ForEach(size_t count, const std::function<absl::Status(size_t)>& work) {
  std::atomic<size_t> next = 0;
  std::mutex mutex;
  absl::Status first;
  std::vector<std::thread> threads;
  threads.reserve(kThreads);
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&] {
      for (size_t i = next++; i < count; i = next++) {
        const absl::Status status = work(i);
        if (status.ok()) continue;
        std::lock_guard lock(mutex);
        if (first.ok()) first = status;
        next = count;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return first;
}

// A server that is full says when to come again.
absl::StatusOr<v1::GenerateResponse> Ask(Client* client, const v1::GenerateRequest& request) {
  for (;;) {
    absl::StatusOr<v1::GenerateResponse> answer = client->Generate(request);
    const std::optional<int64_t> delay_ms = Client::RetryDelayMs(answer.status());
    if (!delay_ms) return answer;
    std::this_thread::sleep_for(std::chrono::milliseconds(*delay_ms));
  }
}

PositionView View(const v1::TokenLogprobs& logprobs) {
  PositionView view;
  view.chosen = logprobs.chosen().logprob();
  for (const v1::Logprob& top : logprobs.top()) {
    view.top.emplace_back(top.token_id(), top.logprob());
  }
  return view;
}

// A set of prompts and what has been learnt of each so far.
class Comparison {
 public:
  explicit Comparison(const CompareFlags& flags) : flags_(flags) {}

  absl::Status ReadPrompts() {
    if (flags_.prompts.empty()) return absl::OkStatus();
    absl::StatusOr<std::vector<BatchItem>> items = ReadBatch(flags_.prompts);
    if (!items.ok()) return items.status();
    for (BatchItem& item : *items) {
      if (!item.error.ok()) return Prefix(flags_.prompts, item.error);
      requests_.push_back(std::move(item.request));
      names_.push_back(item.custom_id);
    }
    if (!requests_.empty()) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrCat("--prompts ", flags_.prompts, ": no prompts"));
  }

  // The prompts as both sides are asked them: the token ids that A makes of them.
  absl::Status Tokenize(const OpenSide& a) {
    if (requests_.empty()) MakeRandom(a.info.vocab_size());
    prompts_.resize(requests_.size());
    return ForEach(requests_.size(), [&](size_t i) -> absl::Status {
      prompts_[i].name = names_[i];
      v1::GenerateRequest& request = requests_[i];
      if (request.has_token_ids()) return absl::OkStatus();
      v1::TokenizeRequest ask;
      if (request.has_chat()) {
        *ask.mutable_chat() = request.chat();
      } else {
        ask.set_text(request.text());
      }
      const absl::StatusOr<v1::TokenizeResponse> ids = a.client->Tokenize(ask);
      if (!ids.ok()) return Prefix(names_[i], ids.status());
      *request.mutable_token_ids()->mutable_ids() = ids->token_ids();
      return absl::OkStatus();
    });
  }

  // B is asked to score prompt and answer as a prompt, which may not fill the context:
  // to be found before A has done its work.
  absl::Status CheckRoom(const OpenSide& side) const {
    const int64_t room = int64_t{side.info.max_model_len()} - 1;
    const auto shorter = [](const v1::GenerateRequest& a, const v1::GenerateRequest& b) {
      return a.token_ids().ids_size() < b.token_ids().ids_size();
    };
    const auto longest = std::max_element(requests_.begin(), requests_.end(), shorter);
    const int64_t tokens = longest->token_ids().ids_size();
    if (tokens + flags_.max_tokens <= room) return absl::OkStatus();
    const std::string what = absl::StrFormat(
        "%s: a prompt of %d tokens and its answer are scored together, at most %d tokens with "
        "max_model_len %d",
        names_[static_cast<size_t>(longest - requests_.begin())], tokens, room, room + 1);
    if (tokens >= room) return absl::InvalidArgumentError(what + "; it leaves no room for one");
    return absl::InvalidArgumentError(absl::StrFormat("--max-tokens %u: %s; at most %d would work",
                                                      flags_.max_tokens, what, room - tokens));
  }

  // A's answers, with its view of every token.
  absl::Status AskA(const OpenSide& a) {
    return ForEach(requests_.size(), [&](size_t i) -> absl::Status {
      v1::GenerateRequest request = requests_[i];
      SetGreedy(&request);
      request.mutable_sampling()->set_logprobs(flags_.top);
      const absl::StatusOr<v1::GenerateResponse> response = Ask(a.client.get(), request);
      if (!response.ok()) return Prefix(names_[i], response.status());
      const v1::Completion& answer = response->completions(0);
      prompts_[i].tokens_a.assign(answer.token_ids().begin(), answer.token_ids().end());
      for (const v1::TokenLogprobs& each : answer.logprobs()) {
        prompts_[i].view_a.push_back(View(each));
      }
      return absl::OkStatus();
    });
  }

  // B's answers to the same prompts, then its view of A's answers.
  absl::Status AskB(const OpenSide& b) {
    return ForEach(prompts_.size(), [&](size_t i) -> absl::Status {
      ComparedPrompt& prompt = prompts_[i];
      v1::GenerateRequest request = requests_[i];
      SetGreedy(&request);
      const absl::StatusOr<v1::GenerateResponse> answer = Ask(b.client.get(), request);
      if (!answer.ok()) return Prefix(prompt.name, answer.status());
      const auto& ids = answer->completions(0).token_ids();
      prompt.tokens_b.assign(ids.begin(), ids.end());

      v1::GenerateRequest score;
      *score.mutable_token_ids() = requests_[i].token_ids();
      auto* whole = score.mutable_token_ids()->mutable_ids();
      whole->Add(prompt.tokens_a.begin(), prompt.tokens_a.end());
      score.mutable_sampling()->set_max_tokens(0);
      score.mutable_sampling()->set_prompt_logprobs(flags_.top);
      const absl::StatusOr<v1::GenerateResponse> scored = Ask(b.client.get(), score);
      if (!scored.ok()) return Prefix(prompt.name, scored.status());
      const auto& views = scored->prompt().prompt_logprobs();
      if (views.size() != whole->size()) {
        return absl::DataLossError(absl::StrCat(prompt.name, ": B scored ", views.size(), " of ",
                                                whole->size(), " tokens"));
      }
      for (int at = requests_[i].token_ids().ids_size(); at < views.size(); ++at) {
        prompt.view_b.push_back(View(views[at]));
      }
      return absl::OkStatus();
    });
  }

  const std::vector<ComparedPrompt>& prompts() const { return prompts_; }

 private:
  void MakeRandom(uint32_t vocab_size) {
    std::mt19937_64 random(flags_.seed);
    for (uint32_t i = 0; i < flags_.random_prompts; ++i) {
      requests_.push_back(
          RandomRequest({flags_.random_tokens, flags_.max_tokens}, vocab_size, &random));
      names_.push_back(absl::StrCat("random ", i));
    }
  }

  // Of a file's own sampling fields, those that change what is greedy are dropped.
  void SetGreedy(v1::GenerateRequest* request) const {
    v1::SamplingParams sampling;
    sampling.set_temperature(0);
    sampling.set_max_tokens(flags_.max_tokens);
    sampling.set_ignore_eos(request->sampling().ignore_eos());
    *request->mutable_sampling() = sampling;
  }

  const CompareFlags& flags_;
  std::vector<v1::GenerateRequest> requests_;
  std::vector<std::string> names_;
  std::vector<ComparedPrompt> prompts_;
};

std::string Describe(const CompareSide& side, const v1::GetModelInfoResponse& info) {
  return absl::StrFormat("%s, %s, tp %u, %s (%s)", info.model(), info.dtype(), info.tp_size(),
                         info.ranks_size() > 0 ? info.ranks(0).device() : "?",
                         side.server.empty() ? side.flags : side.server);
}

absl::Status Report(const CompareFlags& flags, const std::string& a, const std::string& b,
                    const CompareFigures& figures) {
  Json json = {{"a", a}, {"b", b}, {"max_tokens", flags.max_tokens}, {"top", flags.top}};
  json.update(ToJson(figures));
  const std::string text =
      json.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
  const std::string table = absl::StrCat("A  ", a, "\nB  ", b, "\n\n", ToTable(figures));
  std::fputs(flags.json ? text.c_str() : table.c_str(), stdout);
  std::fflush(stdout);
  if (!flags.output.empty()) {
    std::ofstream file(flags.output, std::ios::trunc);
    file << text << std::flush;
    if (!file) {
      return absl::UnavailableError(absl::StrCat("--output ", flags.output, ": cannot be written"));
    }
  }
  if (flags.max_error && !(figures.max_error <= *flags.max_error)) {
    return absl::FailedPreconditionError(
        absl::StrFormat("the largest log-probability error is %.4g, above --max-error %g",
                        figures.max_error, *flags.max_error));
  }
  return absl::OkStatus();
}

absl::Status CheckSide(const char* name, const CompareSide& side, const std::string& model) {
  if (!side.server.empty() && !side.flags.empty()) {
    return absl::InvalidArgumentError(
        absl::StrFormat("--flags-%s: a server that runs already takes no flags", name));
  }
  if (side.server.empty() && model.empty() && side.flags.find("--model") == std::string::npos) {
    return absl::InvalidArgumentError(
        absl::StrFormat("--server-%s: give an address, or --model DIR to start one", name));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status RunCompare(const CompareFlags& flags) {
  for (const absl::Status& status :
       {CheckSide("a", flags.a, flags.model), CheckSide("b", flags.b, flags.model)}) {
    if (!status.ok()) return status;
  }
  Comparison comparison(flags);
  if (absl::Status status = comparison.ReadPrompts(); !status.ok()) return status;
  // One that runs already is met before A does its work, which may be for nothing.
  OpenSide b;
  const auto open_b = [&]() -> absl::Status {
    absl::StatusOr<OpenSide> side = Open(flags.b, flags);
    if (!side.ok()) return Prefix("B", side.status());
    b = *std::move(side);
    return absl::OkStatus();
  };
  if (!flags.b.server.empty()) {
    if (absl::Status status = open_b(); !status.ok()) return status;
  }
  std::string described_a;
  {
    std::fprintf(stderr, "A: answering\n");
    absl::StatusOr<OpenSide> a = Open(flags.a, flags);
    if (!a.ok()) return Prefix("A", a.status());
    described_a = Describe(flags.a, a->info);
    if (absl::Status status = comparison.Tokenize(*a); !status.ok()) return Prefix("A", status);
    // Where B is yet to be started, A's limit stands for its own.
    const OpenSide& scorer = b.client != nullptr ? b : *a;
    if (absl::Status status = comparison.CheckRoom(scorer); !status.ok()) return status;
    if (absl::Status status = comparison.AskA(*a); !status.ok()) return Prefix("A", status);
  }
  std::fprintf(stderr, "B: answering, and scoring A's answers\n");
  if (b.client == nullptr) {
    if (absl::Status status = open_b(); !status.ok()) return status;
  }
  if (absl::Status status = comparison.CheckRoom(b); !status.ok()) return Prefix("B", status);
  if (absl::Status status = comparison.AskB(b); !status.ok()) return Prefix("B", status);
  return Report(flags, described_a, Describe(flags.b, b.info), Compare(comparison.prompts()));
}

}  // namespace lockstep
