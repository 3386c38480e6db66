// The file of --config: what it makes of the coordinator's flags is what the
// printed configuration makes of them again.
#include <CLI/CLI.hpp>
#include <string>

#include "common/check.h"
#include "common/flag_sources.h"
#include "coordinator/options.h"
#include "tests/fuzz/fuzz_input.h"

namespace lockstep::fuzz {
namespace {

// The status, and the configuration as it is printed.
absl::Status Read(const std::string& path, std::string* printed) {
  CoordinatorOptions options;
  CLI::App app("fuzz");
  AddCoordinatorFlags(app, &options);
  absl::Status parsed = ParseWithSources(app, {"--config", path});
  if (!parsed.ok()) return parsed;
  *printed = PrintConfig(app);
  return ValidateOptions(options);
}

}  // namespace
}  // namespace lockstep::fuzz

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace lockstep::fuzz;
  static const ScratchDir dir;
  Input input(data, size);
  std::string printed, again;
  const absl::Status first = Read(dir.Write("config", input.Rest()), &printed);
  if (!first.ok()) RequireRefusal(first);
  if (printed.empty()) return 0;
  const absl::Status second = Read(dir.Write("config", printed), &again);
  LOCKSTEP_CHECK(first == second && printed == again);
  return 0;
}
