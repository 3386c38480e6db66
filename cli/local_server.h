// A private `lockstep serve` for commands that were given a model instead of an
// address: on loopback, ports chosen by the kernel, gone with this object (and,
// whatever happens, with this process).
#ifndef LOCKSTEP_CLI_LOCAL_SERVER_H_
#define LOCKSTEP_CLI_LOCAL_SERVER_H_

#include <sys/types.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace lockstep {

class LocalServer {
 public:
  // serve_args: flags of `lockstep serve` after the command itself. Returns once
  // requests are answered; a start that fails returns the server's own last line.
  static absl::StatusOr<std::unique_ptr<LocalServer>> Start(
      const std::vector<std::string>& serve_args);
  ~LocalServer();

  const std::string& address() const { return address_; }  // of the gRPC door
  const std::string& admin_address() const { return admin_address_; }
  int http_port() const { return http_port_; }
  pid_t pid() const { return pid_; }  // of `lockstep serve`; 0 when it ended
  std::string Log() const;            // all it has said so far

  // Asks it to drain and end, waits (at most `seconds`, then kills it), and
  // returns its wait status.
  int Stop(int seconds = 10);
  // The same without asking: somebody has.
  int AwaitEnd(int seconds);

 private:
  LocalServer() = default;
  absl::Status WaitReady();
  bool Ended();
  std::string LastLogLine() const;

  pid_t pid_ = 0;
  int status_ = 0;  // once pid_ is 0
  int http_port_ = 0;
  std::string directory_, log_path_, port_file_, address_, admin_address_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_CLI_LOCAL_SERVER_H_
