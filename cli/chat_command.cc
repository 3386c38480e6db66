// lockstep chat: a conversation at the terminal.
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <iostream>
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

struct ChatFlags {
  ConnectionFlags connection;
  SamplingFlags sampling;
  std::string system;
};

void AddMessage(v1::ChatMessages* chat, const char* role, const std::string& content) {
  v1::ChatMessage* message = chat->add_messages();
  message->set_role(role);
  message->set_content(content);
}

// Streams one answer and adds it to the conversation; Ctrl-C cuts it short.
absl::Status Answer(Client* client, const v1::SamplingParams& sampling, v1::ChatMessages* chat) {
  if (!IsValidUtf8(chat->messages().rbegin()->content())) {
    return absl::InvalidArgumentError("the message is not UTF-8");
  }
  v1::GenerateRequest request;
  *request.mutable_chat() = *chat;
  *request.mutable_sampling() = sampling;
  std::string answer;
  CallHandle call;
  std::atomic<bool> interrupted = false;
  InterruptGuard interrupt([&] {
    interrupted = true;
    call.Cancel();
  });
  absl::Status status = client->GenerateStream(
      request,
      [&](const v1::GenerateEvent& event) {
        if (!event.has_chunk()) return;
        answer += event.chunk().text();
        std::fwrite(event.chunk().text().data(), 1, event.chunk().text().size(), stdout);
        std::fflush(stdout);
      },
      &call);
  std::fputc('\n', stdout);
  if (!status.ok() && !interrupted) return status;
  AddMessage(chat, "assistant", answer);
  return absl::OkStatus();
}

int RunChat(const ChatFlags& flags) {
  auto fail = [](const absl::Status& status) {
    std::fprintf(stderr, "lockstep chat: %s\n", std::string(status.message()).c_str());
    return 1;
  };
  absl::StatusOr<v1::SamplingParams> sampling = ToProto(flags.sampling);
  if (!sampling.ok()) return fail(sampling.status());
  if (sampling->has_n() && sampling->n() > 1) {
    return fail(absl::InvalidArgumentError("--n: a conversation has one answer at a time"));
  }
  if (!IsValidUtf8(flags.system)) {
    return fail(absl::InvalidArgumentError("--system: not UTF-8"));
  }
  absl::StatusOr<Connection> connection = Connect(flags.connection);
  if (!connection.ok()) return fail(connection.status());
  const bool terminal = isatty(STDIN_FILENO) == 1;
  if (terminal) {
    std::printf(
        "%s. An empty line or Ctrl-D ends; Ctrl-C cuts an answer short; /new starts over.\n",
        connection->info.model().c_str());
  }
  v1::ChatMessages fresh;
  if (!flags.system.empty()) AddMessage(&fresh, "system", flags.system);
  v1::ChatMessages chat = fresh;
  std::string line;
  for (;;) {
    if (terminal) std::printf("> "), std::fflush(stdout);
    if (!std::getline(std::cin, line) || line.empty()) return 0;
    if (line == "/new") {
      chat = fresh;
      continue;
    }
    AddMessage(&chat, "user", line);
    const absl::Status status = Answer(connection->client.get(), *sampling, &chat);
    if (status.ok()) continue;
    // The conversation goes on without the turn that failed.
    chat.mutable_messages()->RemoveLast();
    if (!terminal) return fail(status);
    fail(status);
  }
}

}  // namespace

void AddChatCommand(CLI::App* app, Command* chosen) {
  auto flags = std::make_shared<ChatFlags>();
  CLI::App* command = app->add_subcommand("chat", "Talk with the model at the terminal");
  command->group("Ask");
  command->add_option("--system", flags->system, "A system message to begin with");
  AddConnectionFlags(command, &flags->connection);
  AddSamplingFlags(command, &flags->sampling);
  command->callback([=] { *chosen = [=] { return RunChat(*flags); }; });
}

}  // namespace lockstep
