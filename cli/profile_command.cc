// lockstep profile: a trace of the next steps of a running server.
#include <grpcpp/grpcpp.h>

#include <chrono>
#include <cstdio>
#include <fstream>
#include <memory>
#include <string>

#include "CLI/CLI.hpp"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "cli/commands.h"
#include "cli/terminal.h"
#include "proto/admin.grpc.pb.h"

namespace lockstep {
namespace {

struct ProfileFlags {
  std::string address = "127.0.0.1:50053";
  std::string output;
  uint32_t steps = 50;
  double timeout_s = 30;
};

constexpr int kMaxMessageBytes = 64 << 20;
// Beyond the time for the steps: ranks send what they traced.
constexpr int kAnswerSeconds = 60;

absl::Status Ask(const ProfileFlags& flags, std::ofstream* file, size_t* bytes) {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(kMaxMessageBytes);
  const auto stub = v1::Admin::NewStub(
      grpc::CreateCustomChannel(flags.address, grpc::InsecureChannelCredentials(), arguments));
  v1::ProfileRequest request;
  request.set_steps(flags.steps);
  request.set_timeout_ms(static_cast<uint32_t>(flags.timeout_s * 1000));
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() +
                       std::chrono::milliseconds(request.timeout_ms()) +
                       std::chrono::seconds(kAnswerSeconds));
  InterruptGuard interrupt([&] { context.TryCancel(); });
  const auto reader = stub->Profile(&context, request);
  v1::ProfileReply reply;
  while (reader->Read(&reply)) {
    file->write(reply.json().data(), static_cast<std::streamsize>(reply.json().size()));
    *bytes += reply.json().size();
  }
  const grpc::Status status = reader->Finish();
  if (status.ok()) return absl::OkStatus();
  if (status.error_code() == grpc::StatusCode::UNIMPLEMENTED) {
    return absl::UnimplementedError(absl::StrCat(
        "--address ", flags.address, ": answers, but is no --admin-address of a server"));
  }
  return absl::Status(static_cast<absl::StatusCode>(status.error_code()),
                      absl::StrCat(flags.address, ": ", status.error_message()));
}

// The file appears whole or not at all.
int RunProfile(const ProfileFlags& flags) {
  const std::string partial = absl::StrCat(flags.output, ".partial");
  const auto fail = [&](const std::string& what) {
    std::remove(partial.c_str());
    std::fprintf(stderr, "lockstep profile: %s\n", what.c_str());
    return 1;
  };
  std::ofstream file(partial, std::ios::trunc | std::ios::binary);
  if (!file) return fail(absl::StrCat("--output: cannot write ", partial));
  size_t bytes = 0;
  if (const absl::Status asked = Ask(flags, &file, &bytes); !asked.ok()) {
    return fail(std::string(asked.message()));
  }
  file.close();
  if (!file || std::rename(partial.c_str(), flags.output.c_str()) != 0) {
    return fail(absl::StrCat("--output: cannot write ", flags.output));
  }
  std::printf("%s: %zu bytes; open it in https://ui.perfetto.dev or chrome://tracing\n",
              flags.output.c_str(), bytes);
  return 0;
}

}  // namespace

void AddProfileCommand(CLI::App* app, Command* chosen) {
  auto flags = std::make_shared<ProfileFlags>();
  CLI::App* command =
      app->add_subcommand("profile", "Trace the next steps of a running server, every rank's");
  command->group("Look");
  command->add_option("--address", flags->address, "Its --admin-address: HOST:PORT or unix:PATH")
      ->capture_default_str();
  command->add_option("--steps", flags->steps, "Steps to trace")
      ->capture_default_str()
      ->check(CLI::Range(1, 1'000));
  command->add_option("--output", flags->output, "Trace file to write (JSON)")->required();
  command->add_option("--timeout", flags->timeout_s, "Seconds for the steps to run; then fewer do")
      ->capture_default_str()
      ->check(CLI::Range(0.001, 600.0));
  command->callback([=] { *chosen = [=] { return RunProfile(*flags); }; });
}

}  // namespace lockstep
