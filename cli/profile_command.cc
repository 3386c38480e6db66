// lockstep profile: a trace of the next steps of a running server.
#include <grpcpp/grpcpp.h>

#include <chrono>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <memory>
#include <string>
#include <system_error>

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

absl::Status Ask(const ProfileFlags& flags, std::ostream* out, size_t* bytes) {
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
    out->write(reply.json().data(), static_cast<std::streamsize>(reply.json().size()));
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

int Fail(const std::string& what) {
  std::fprintf(stderr, "lockstep profile: %s\n", what.c_str());
  return 1;
}

int ProfileToStdout(const ProfileFlags& flags) {
  size_t bytes = 0;
  const absl::Status asked = Ask(flags, &std::cout, &bytes);
  return asked.ok() ? 0 : Fail(std::string(asked.message()));
}

// A file appears whole or not at all; a device or a pipe is written to as it is.
int ProfileToFile(const ProfileFlags& flags) {
  std::error_code none;
  const auto status = std::filesystem::status(flags.output, none);
  const bool in_place =
      std::filesystem::exists(status) && !std::filesystem::is_regular_file(status);
  const std::string path = in_place ? flags.output : absl::StrCat(flags.output, ".partial");
  const auto fail = [&](const std::string& what) {
    if (!in_place) std::remove(path.c_str());
    return Fail(what);
  };
  std::ofstream file(path, std::ios::trunc | std::ios::binary);
  if (!file) return fail(absl::StrCat("--output: cannot write ", path));
  size_t bytes = 0;
  if (const absl::Status asked = Ask(flags, &file, &bytes); !asked.ok()) {
    return fail(std::string(asked.message()));
  }
  file.close();
  if (!file || (!in_place && std::rename(path.c_str(), flags.output.c_str()) != 0)) {
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
  command->add_option("--output", flags->output, "Trace file to write (JSON); -: stdout")
      ->required();
  command->add_option("--timeout", flags->timeout_s, "Seconds for the steps to run; then fewer do")
      ->capture_default_str()
      ->check(CLI::Range(0.001, 600.0));
  command->callback([=] {
    *chosen = [=] {
      return flags->output == "-" ? ProfileToStdout(*flags) : ProfileToFile(*flags);
    };
  });
}

}  // namespace lockstep
