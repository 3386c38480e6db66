// `lockstep doctor --links`: how the GPUs of this host reach each other, as the
// program lockstep-links beside this one measures it (this one is free of CUDA).
#ifndef LOCKSTEP_CLI_DOCTOR_LINKS_H_
#define LOCKSTEP_CLI_DOCTOR_LINKS_H_

namespace lockstep {

// Prints; 0 when every pair of GPUs is in reach.
int RunDoctorLinks();

}  // namespace lockstep

#endif  // LOCKSTEP_CLI_DOCTOR_LINKS_H_
