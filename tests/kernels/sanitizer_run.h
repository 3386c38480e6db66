// compute-sanitizer slows kernels a hundredfold: fewer and smaller shapes then.
#ifndef LOCKSTEP_TESTS_KERNELS_SANITIZER_RUN_H_
#define LOCKSTEP_TESTS_KERNELS_SANITIZER_RUN_H_

#include <cstdlib>

namespace lockstep::kernels {

inline bool SanitizerRun() { return std::getenv("LOCKSTEP_SANITIZER_RUN") != nullptr; }

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_TESTS_KERNELS_SANITIZER_RUN_H_
