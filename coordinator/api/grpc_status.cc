#include "coordinator/api/grpc_status.h"

#include <grpcpp/server_context.h>

#include <string>

#include "absl/strings/str_cat.h"
#include "coordinator/api/api_error.h"
#include "proto/error_details.pb.h"

namespace lockstep {

grpc::Status ToGrpcStatus(const absl::Status& status, grpc::CallbackServerContext* context) {
  if (status.ok()) return grpc::Status::OK;
  // The two code spaces are the same numbers.
  const auto code = static_cast<grpc::StatusCode>(status.code());
  const std::string message(status.message());
  if (code != grpc::StatusCode::RESOURCE_EXHAUSTED) return {code, message};

  const int seconds = RetrySeconds(status).value_or(1);
  google::rpc::RetryInfo retry;
  retry.mutable_retry_delay()->set_seconds(seconds);
  google::rpc::Status details;
  details.set_code(code);
  details.set_message(message);
  details.add_details()->PackFrom(retry);
  context->AddTrailingMetadata("grpc-retry-pushback-ms", absl::StrCat(seconds * 1000));
  return {code, message, details.SerializeAsString()};
}

}  // namespace lockstep
