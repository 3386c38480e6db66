// The variables of the environment that begin with LOCKSTEP_: which of them somebody
// reads, and a word about those that nobody does, for a mistyped one would otherwise
// be no setting at all and say nothing.
//
// Every main calls TakeUnknownVariables once, before it starts a thread, and says the
// lines as it says other warnings. Known is what any program of the suite reads, for
// they share environments: a flag of another program, a variable of the tests. What
// Kubernetes puts there for Services named lockstep or lockstep-... is none of ours.
#ifndef LOCKSTEP_COMMON_VARIABLES_H_
#define LOCKSTEP_COMMON_VARIABLES_H_

#include <string>
#include <string_view>
#include <vector>

namespace lockstep {

// "max-num-seqs": LOCKSTEP_MAX_NUM_SEQS.
std::string FlagVariable(std::string_view flag);

// Whether it describes a Service (LOCKSTEP_SERVICE_HOST, LOCKSTEP_PORT_80_TCP_ADDR,
// LOCKSTEP_HTTP_PORT=tcp://10.0.0.1:80), and is no flag's value, whatever its name.
bool IsServiceLink(std::string_view name, std::string_view value);

// The variables that a setting may come from, in any program.
std::vector<std::string> SettingVariables();

// A line for each variable of `environment` ("NAME=value" strings up to a null) that
// nobody reads, with the nearest one that somebody does; never a value. At most
// kMostUnknownVariables + 1 lines, the last of which counts what is left.
inline constexpr int kMostUnknownVariables = 8;
std::vector<std::string> UnknownVariables(const char* const* environment);

// Those lines of this process's environment. None in a child of a process that took
// them: they are said once.
std::vector<std::string> TakeUnknownVariables();

}  // namespace lockstep

#endif  // LOCKSTEP_COMMON_VARIABLES_H_
