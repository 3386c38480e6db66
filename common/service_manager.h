// Tells a service manager how this process is doing, in systemd's notify protocol:
// one datagram to the unix socket that NOTIFY_SOCKET names, a path or an abstract
// name. Says nothing where no manager listens, and never fails a process for it.
//
// Made by a main() before other threads start: it takes NOTIFY_SOCKET, WATCHDOG_USEC
// and WATCHDOG_PID out of the environment, so that no child speaks in our name.
// Ready and Stopping are for any thread, the beats for one.
#ifndef LOCKSTEP_COMMON_SERVICE_MANAGER_H_
#define LOCKSTEP_COMMON_SERVICE_MANAGER_H_

#include <atomic>
#include <cstdint>
#include <string>
#include <string_view>

namespace lockstep {

class ServiceManager {
 public:
  ServiceManager();
  ~ServiceManager();
  ServiceManager(const ServiceManager&) = delete;
  ServiceManager& operator=(const ServiceManager&) = delete;

  // What the process is for can be had. The first call counts, later ones are dropped.
  void Ready();
  void Stopping();
  // One line for people.
  void Status(std::string_view line) const;

  // Tells the manager's watchdog that this loop still turns, when that is due.
  void Beat();
  // How long the loop may wait until the next Beat; -1: no watchdog, for ever.
  int64_t MsUntilBeat() const;

 private:
  void Send(std::string_view state) const;

  int fd_ = -1;
  std::string address_;        // as in sockaddr_un: an abstract name begins with a NUL
  int64_t beat_every_ms_ = 0;  // 0: nobody watches
  int64_t last_beat_ms_ = 0;
  std::atomic<bool> said_ready_ = false;
  std::atomic<bool> said_stopping_ = false;
};

}  // namespace lockstep

#endif  // LOCKSTEP_COMMON_SERVICE_MANAGER_H_
