// Between proto/inference.proto and the door-neutral request and events.
#ifndef LOCKSTEP_COORDINATOR_API_GRPC_CONVERT_H_
#define LOCKSTEP_COORDINATOR_API_GRPC_CONVERT_H_

#include "coordinator/api/answer.h"
#include "coordinator/api/client_request.h"
#include "coordinator/api/request_path.h"
#include "coordinator/api/served_model.h"
#include "proto/inference.pb.h"

namespace lockstep {

// The deadline is the call's, not the message's: set by the caller.
ClientRequest FromProto(const v1::GenerateRequest& request);
ClientRequest FromProto(const v1::TokenizeRequest& request);

// One event as the stream says it. The answer gives what the event refers to.
v1::GenerateEvent ToProto(const Answer& answer, const ServedModel& model, AnswerEvent event);
// The same event added to a whole response, which has a completion per index.
void AddToResponse(const Answer& answer, const ServedModel& model, AnswerEvent event,
                   v1::GenerateResponse* response);

v1::GetModelInfoResponse DescribeModel(const RequestPath& path);

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_API_GRPC_CONVERT_H_
