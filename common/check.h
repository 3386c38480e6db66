// LOCKSTEP_CHECK(cond) << nothing: a broken invariant ends the process with the
// file, line and condition. On in every build. For bugs only; whatever a user, a
// file or a peer can cause is an absl::Status.
#ifndef LOCKSTEP_COMMON_CHECK_H_
#define LOCKSTEP_COMMON_CHECK_H_

namespace lockstep {

[[noreturn]] void CheckFailed(const char* file, int line, const char* what);

}  // namespace lockstep

#define LOCKSTEP_CHECK(cond)                              \
  do {                                                    \
    if (!(cond)) [[unlikely]] {                           \
      ::lockstep::CheckFailed(__FILE__, __LINE__, #cond); \
    }                                                     \
  } while (false)

#endif  // LOCKSTEP_COMMON_CHECK_H_
