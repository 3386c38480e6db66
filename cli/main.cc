// lockstep: serve a model, ask it, plan for it, look at the host.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <optional>
#include <string>
#include <vector>

#include "CLI/CLI.hpp"
#include "cli/commands.h"
#include "common/flag_sources.h"
#include "common/suggest.h"
#include "common/variables.h"
#include "common/version.h"

namespace {

// The subcommand the user got as far as; the app itself when none was named.
CLI::App* Chosen(CLI::App* app) {
  const std::vector<CLI::App*> commands = app->get_subcommands();
  return commands.empty() ? app : Chosen(commands.front());
}

std::vector<std::string> KnownWords(CLI::App* app, bool flags) {
  std::vector<std::string> words;
  if (!flags) {
    for (const CLI::App* command : app->get_subcommands([](CLI::App*) { return true; })) {
      words.push_back(command->get_name());
    }
    return words;
  }
  for (const CLI::Option* option : app->get_options()) {
    for (const std::string& name : option->get_lnames()) words.push_back("--" + name);
  }
  return words;
}

// "lockstep serve: --modle: unknown flag; did you mean --model?"
std::string ExplainUnknown(CLI::App* command, std::string word) {
  const bool flag = word.rfind('-', 0) == 0;
  if (flag) word = word.substr(0, word.find('='));
  const std::string kind = flag ? "unknown flag" : "unknown word";
  std::string text = word + ": " + kind;
  if (const auto near = lockstep::NearestWord(word, KnownWords(command, flag))) {
    return text + "; did you mean " + *near + "?";
  }
  return text + "; see --help";
}

std::string Where(CLI::App* app, CLI::App* command) {
  return command == app ? "lockstep"
                        : Where(app, command->get_parent()) + " " + command->get_name();
}

// `code`, unless what went to stdout is lost.
int AfterStdout(int code) {
  std::cout.flush();
  if (std::fflush(stdout) == 0 && std::ferror(stdout) == 0 && std::cout) return code;
  std::fputs("lockstep: stdout: writing failed\n", stderr);
  return code == 0 ? 1 : code;
}

}  // namespace

int main(int argc, char** argv) {
  // gRPC's own lines would come between ours; what it has to say is in our errors.
  setenv("GRPC_VERBOSITY", "NONE", /*overwrite=*/0);
  CLI::App app{"Serves large language models split over several workers.", "lockstep"};
  app.set_version_flag("--version", std::string("lockstep ") + lockstep::kVersion);
  app.require_subcommand(0, 1);
  app.get_formatter()->column_width(34);
  lockstep::Command chosen;
  std::vector<std::string> words(argv + std::min(argc, 1), argv + argc);
  lockstep::AddServeCommand(&app, words, &chosen);
  lockstep::AddWorkerGroupCommand(&app, &words, &chosen);
  lockstep::AddGenerateCommand(&app, &chosen);
  lockstep::AddChatCommand(&app, &chosen);
  lockstep::AddBatchCommand(&app, &chosen);
  lockstep::AddPlanCommand(&app, &chosen);
  lockstep::AddBenchCommand(&app, &chosen);
  lockstep::AddCompareCommand(&app, &chosen);
  lockstep::AddTopCommand(&app, &chosen);
  lockstep::AddProfileCommand(&app, &chosen);
  lockstep::AddDoctorCommand(&app, &chosen);
  const auto refuse = [&](const std::string& text) {
    std::fprintf(stderr, "%s: %s\n", Where(&app, Chosen(&app)).c_str(), text.c_str());
    return 2;
  };
  std::vector<std::string> args;
  const absl::Status apart = lockstep::SetEmptyValuesApart(app, words, &args);
  if (!apart.ok()) return refuse(std::string(apart.message()));
  std::reverse(args.begin(), args.end());  // as CLI11 wants it
  try {
    app.parse(args);
  } catch (const CLI::Success& wanted) {  // --help, --version
    return AfterStdout(app.exit(wanted));
  } catch (const CLI::ParseError& error) {
    CLI::App* command = Chosen(&app);
    std::vector<std::string> extras = app.remaining(/*recurse=*/true);
    std::erase(extras, "--");  // among them without being one
    const std::string text = extras.empty() ? lockstep::FlagErrorLine(*command, error.what())
                                            : ExplainUnknown(command, extras[0]);
    return refuse(text);
  }
  if (const absl::Status numbers = lockstep::CheckNumbers(*Chosen(&app)); !numbers.ok()) {
    return refuse(std::string(numbers.message()));
  }
  if (!chosen) {
    std::fputs(app.help().c_str(), stdout);
    return AfterStdout(0);
  }
  // Who starts daemons says them in the format of their log.
  if (!app.got_subcommand("serve") && !app.got_subcommand("worker-group")) {
    for (const std::string& line : lockstep::TakeUnknownVariables()) {
      std::fprintf(stderr, "lockstep: %s\n", line.c_str());
    }
  }
  return AfterStdout(chosen());
}
