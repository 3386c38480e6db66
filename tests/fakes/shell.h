// A command line as a person types it, run by sh. Blocks until it has ended.
#ifndef LOCKSTEP_TESTS_FAKES_SHELL_H_
#define LOCKSTEP_TESTS_FAKES_SHELL_H_

#include <sys/wait.h>

#include <cstdio>
#include <string>

namespace lockstep {

struct Shell {
  int code = -1;    // -1: it was killed, or could not start
  std::string out;  // stdout, and what the command itself sends there
};

inline Shell RunShell(const std::string& command) {
  Shell shell;
  FILE* const pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) return shell;
  char buffer[4096];
  for (size_t n; (n = fread(buffer, 1, sizeof(buffer), pipe)) > 0;) shell.out.append(buffer, n);
  const int status = pclose(pipe);
  shell.code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  return shell;
}

}  // namespace lockstep

#endif  // LOCKSTEP_TESTS_FAKES_SHELL_H_
