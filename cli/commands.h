// The subcommands of `lockstep`. Each Add… declares its flags on the app and
// stores what to run when it was chosen; the function returns the exit code.
#ifndef LOCKSTEP_CLI_COMMANDS_H_
#define LOCKSTEP_CLI_COMMANDS_H_

#include <functional>
#include <string>
#include <vector>

#include "CLI/App.hpp"

namespace lockstep {

using Command = std::function<int()>;

// words: the command line without the program's name.
void AddServeCommand(CLI::App* app, const std::vector<std::string>& words, Command* chosen);
// What stands behind -- is for the workers, and taken out of *words.
void AddWorkerGroupCommand(CLI::App* app, std::vector<std::string>* words, Command* chosen);
void AddGenerateCommand(CLI::App* app, Command* chosen);
void AddChatCommand(CLI::App* app, Command* chosen);
void AddBatchCommand(CLI::App* app, Command* chosen);
void AddPlanCommand(CLI::App* app, Command* chosen);
void AddBenchCommand(CLI::App* app, Command* chosen);
void AddCompareCommand(CLI::App* app, Command* chosen);
void AddTopCommand(CLI::App* app, Command* chosen);
void AddProfileCommand(CLI::App* app, Command* chosen);
void AddDoctorCommand(CLI::App* app, Command* chosen);

}  // namespace lockstep

#endif  // LOCKSTEP_CLI_COMMANDS_H_
