// lockstep generate: one prompt, streamed to stdout.
#include <unistd.h>

#include <cstdio>
#include <iostream>
#include <iterator>
#include <memory>
#include <string>

#include "CLI/CLI.hpp"
#include "absl/status/status.h"
#include "cli/commands.h"
#include "cli/connection_flags.h"
#include "cli/sampling_flags.h"
#include "cli/terminal.h"
#include "coordinator/text/utf8.h"

namespace lockstep {
namespace {

struct GenerateFlags {
  ConnectionFlags connection;
  SamplingFlags sampling;
  std::string prompt;
  bool chat = false;
  bool verbose = false;
};

int Fail(const absl::Status& status) {
  std::fprintf(stderr, "lockstep generate: %s\n", std::string(status.message()).c_str());
  return 1;
}

void PrintLogprobs(const v1::Chunk& chunk) {
  for (const v1::TokenLogprobs& token : chunk.logprobs()) {
    std::fprintf(stderr, "%8.4f  '%s'", token.chosen().logprob(), token.chosen().token().c_str());
    for (const v1::Logprob& top : token.top()) {
      std::fprintf(stderr, "  %s %.4f", top.token().c_str(), top.logprob());
    }
    std::fputc('\n', stderr);
  }
}

// Several answers arrive interleaved; they are printed one after the other.
class Printer {
 public:
  void Take(const v1::GenerateEvent& event) {
    if (event.has_chunk()) {
      const v1::Chunk& chunk = event.chunk();
      if (chunk.index() == 0) {
        std::fwrite(chunk.text().data(), 1, chunk.text().size(), stdout);
        std::fflush(stdout);
      } else {
        if (later_.size() < chunk.index()) later_.resize(chunk.index());
        later_[chunk.index() - 1] += chunk.text();
      }
      PrintLogprobs(chunk);
    }
    if (event.has_finish()) completion_tokens_ += event.finish().completion_tokens();
    if (event.has_prompt()) prompt_ = event.prompt();
  }

  void Finish(bool verbose) const {
    std::fputc('\n', stdout);
    for (const std::string& answer : later_) std::printf("---\n%s\n", answer.c_str());
    if (!verbose) return;
    std::fflush(stdout);  // both may go to one file
    std::fprintf(stderr, "%u prompt tokens (%u cached), %u generated\n", prompt_.prompt_tokens(),
                 prompt_.cached_tokens(), completion_tokens_);
  }

 private:
  std::vector<std::string> later_;
  v1::PromptInfo prompt_;
  uint32_t completion_tokens_ = 0;
};

int RunGenerate(const GenerateFlags& flags) {
  v1::GenerateRequest request;
  absl::StatusOr<v1::SamplingParams> sampling = ToProto(flags.sampling);
  if (!sampling.ok()) return Fail(sampling.status());
  *request.mutable_sampling() = *sampling;
  std::string prompt = flags.prompt;
  if (prompt.empty() && isatty(STDIN_FILENO) == 0) {
    prompt.assign(std::istreambuf_iterator<char>(std::cin), {});
  }
  if (prompt.empty()) {
    return Fail(absl::InvalidArgumentError("PROMPT: empty; give it as an argument or on stdin"));
  }
  if (!IsValidUtf8(prompt)) return Fail(absl::InvalidArgumentError("PROMPT: not UTF-8"));
  if (flags.chat) {
    v1::ChatMessage* message = request.mutable_chat()->add_messages();
    message->set_role("user");
    message->set_content(prompt);
  } else {
    request.set_text(prompt);
  }
  absl::StatusOr<Connection> connection = Connect(flags.connection);
  if (!connection.ok()) return Fail(connection.status());
  if (flags.verbose) PrintModelInfo(connection->info);

  CallHandle call;
  InterruptGuard interrupt([&] { call.Cancel(); });
  Printer printer;
  const absl::Status status = connection->client->GenerateStream(
      request, [&](const v1::GenerateEvent& event) { printer.Take(event); }, &call);
  printer.Finish(flags.verbose);
  return status.ok() ? 0 : Fail(status);
}

}  // namespace

void AddGenerateCommand(CLI::App* app, Command* chosen) {
  auto flags = std::make_shared<GenerateFlags>();
  CLI::App* command = app->add_subcommand("generate", "Answer one prompt, streaming");
  command->group("Ask");
  command->add_option("prompt", flags->prompt, "The prompt; from stdin when absent");
  command->add_flag("--chat", flags->chat, "Put the prompt through the model's chat template");
  command->add_flag("-v,--verbose", flags->verbose,
                    "Also say which rank holds what, where start-up went, and token counts");
  AddConnectionFlags(command, &flags->connection);
  AddSamplingFlags(command, &flags->sampling);
  command->callback([=] { *chosen = [=] { return RunGenerate(*flags); }; });
}

}  // namespace lockstep
