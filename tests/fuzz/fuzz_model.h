// The demo model as the doors see it, and what holds of every request that they
// let through to the engine.
#ifndef LOCKSTEP_TESTS_FUZZ_FUZZ_MODEL_H_
#define LOCKSTEP_TESTS_FUZZ_FUZZ_MODEL_H_

#include "coordinator/api/served_model.h"
#include "coordinator/request.h"

namespace lockstep::fuzz {

// Read once. 64 tokens of context, so that short inputs reach its end.
const ServedModel& Model();

// Prompt, lengths and sampling are within the model and the limits table.
void RequireServable(const Request& request);

}  // namespace lockstep::fuzz

#endif  // LOCKSTEP_TESTS_FUZZ_FUZZ_MODEL_H_
