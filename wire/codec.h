// Between the plain values of wire/step_plan.h and their protobuf messages.
// Decoding checks everything that can be checked without state (parallel arrays
// of equal length, nothing empty that must not be) and returns InvalidArgument
// naming the field; the step executor checks the rest against its own state.
#ifndef LOCKSTEP_WIRE_CODEC_H_
#define LOCKSTEP_WIRE_CODEC_H_

#include "absl/status/statusor.h"
#include "proto/step_plan.pb.h"
#include "wire/step_plan.h"

namespace lockstep::wire {

worker::v1::StepPlan Encode(const StepPlan& plan);
worker::v1::StepResult Encode(const StepResult& result);

absl::StatusOr<StepPlan> Decode(const worker::v1::StepPlan& plan);
absl::StatusOr<StepResult> Decode(const worker::v1::StepResult& result);

}  // namespace lockstep::wire

#endif  // LOCKSTEP_WIRE_CODEC_H_
