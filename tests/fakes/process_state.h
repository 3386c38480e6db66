// What the kernel says of a process.
#ifndef LOCKSTEP_TESTS_FAKES_PROCESS_STATE_H_
#define LOCKSTEP_TESTS_FAKES_PROCESS_STATE_H_

#include <sys/types.h>

#include <fstream>
#include <string>

namespace lockstep {

// 'R', 'S' or another letter of proc(5), of a process or a thread of any; 0: there is none.
inline char ProcessState(pid_t id) {
  std::ifstream file("/proc/" + std::to_string(id) + "/stat");
  std::string stat;
  std::getline(file, stat);
  const size_t name_end = stat.rfind(") ");  // a name may have anything in it
  return name_end == std::string::npos ? 0 : stat[name_end + 2];
}

// Ended. Orphans are reaped by init, which in a bare container may leave zombies: those hold
// nothing.
inline bool ProcessGone(pid_t pid) {
  const char state = ProcessState(pid);
  return state == 0 || state == 'Z';
}

}  // namespace lockstep

#endif  // LOCKSTEP_TESTS_FAKES_PROCESS_STATE_H_
