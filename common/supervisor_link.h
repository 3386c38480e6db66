// What the coordinator tells the `lockstep serve` that started it, one byte each
// over an inherited pipe, so that the supervisor can tell a crash loop from a
// series of kills. Without a supervisor nothing is said.
#ifndef LOCKSTEP_COMMON_SUPERVISOR_LINK_H_
#define LOCKSTEP_COMMON_SUPERVISOR_LINK_H_

namespace lockstep {

// Names the pipe's descriptor, in the coordinator's environment.
inline constexpr char kSupervisorFdVariable[] = "LOCKSTEP_SUPERVISOR_FD";

// In the environment of a child whose stderr is a pipe to a supervisor that puts it
// on a terminal (cli/child_output.h): progress may be a bar there.
inline constexpr char kProgressBarsVariable[] = "LOCKSTEP_PROGRESS_BARS";

enum class SupervisorNote : char {
  kReady = 'r',   // every worker is part of a whole group
  kOpen = 'o',    // once: the doors answer, the port file is written
  kServed = 's',  // that group has done its first step
};

class SupervisorLink {
 public:
  // Reads the environment; the descriptor is not handed on to children.
  SupervisorLink();
  ~SupervisorLink();
  SupervisorLink(const SupervisorLink&) = delete;
  SupervisorLink& operator=(const SupervisorLink&) = delete;

  // Any thread; never blocks. A note that does not fit is dropped.
  void Tell(SupervisorNote note) const;

 private:
  int fd_ = -1;
};

}  // namespace lockstep

#endif  // LOCKSTEP_COMMON_SUPERVISOR_LINK_H_
