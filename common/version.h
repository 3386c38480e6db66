// The version every program reports; CMakeLists.txt is where it is set.
#ifndef LOCKSTEP_COMMON_VERSION_H_
#define LOCKSTEP_COMMON_VERSION_H_

namespace lockstep {

inline constexpr char kVersion[] = LOCKSTEP_VERSION;

}  // namespace lockstep

#endif  // LOCKSTEP_COMMON_VERSION_H_
