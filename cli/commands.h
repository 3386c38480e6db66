// The subcommands of `lockstep`. Each Add… declares its flags on the app and
// stores what to run when it was chosen; the function returns the exit code.
#ifndef LOCKSTEP_CLI_COMMANDS_H_
#define LOCKSTEP_CLI_COMMANDS_H_

#include <functional>

#include "CLI/App.hpp"

namespace lockstep {

using Command = std::function<int()>;

void AddServeCommand(CLI::App* app, Command* chosen);
void AddGenerateCommand(CLI::App* app, Command* chosen);
void AddChatCommand(CLI::App* app, Command* chosen);
void AddBatchCommand(CLI::App* app, Command* chosen);
void AddPlanCommand(CLI::App* app, Command* chosen);
void AddDoctorCommand(CLI::App* app, Command* chosen);

}  // namespace lockstep

#endif  // LOCKSTEP_CLI_COMMANDS_H_
