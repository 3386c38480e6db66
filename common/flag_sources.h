// Where a program's flags come from: file < environment < command line, for every
// program alike. The variable of --some-flag is LOCKSTEP_SOME_FLAG.
#ifndef LOCKSTEP_COMMON_FLAG_SOURCES_H_
#define LOCKSTEP_COMMON_FLAG_SOURCES_H_

#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"

namespace CLI {
class App;
}

namespace lockstep {

// Parses `args` (without the program's name) over the environment and the file
// of --config. `app` must have a --config option or none of the file is read.
// NotFound with the text to print: --help or --version was asked for.
absl::Status ParseWithSources(CLI::App& app, const std::vector<std::string>& args);

// InvalidArgument of one line that a terminal shows, whatever bytes a file, a
// variable or an argument put into `message`.
absl::Status FlagError(std::string_view message);

// What CLI11 says (the text of a ParseError) in our words, on one line:
// "--max-tokens 'abc': expected a whole number". `command` has the flags.
std::string FlagErrorLine(const CLI::App& command, const std::string& what);

// `args` with "--name=" as "--name" and "": CLI11 would take the argument after it for
// the value. `app`, or the subcommand of it that was named by then, has the flags.
// InvalidArgument where the flag is a switch.
absl::Status SetEmptyValuesApart(const CLI::App& app, const std::vector<std::string>& args,
                                 std::vector<std::string>* apart);

// After a parse: InvalidArgument where a number is empty, which CLI11 reads as 0.
// ParseWithSources does both.
absl::Status CheckNumbers(const CLI::App& app);

// The configuration as a file that --config reads.
std::string PrintConfig(const CLI::App& app);

}  // namespace lockstep

#endif  // LOCKSTEP_COMMON_FLAG_SOURCES_H_
