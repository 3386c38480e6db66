// A file of requests and the file of their answers.
//
// Input, a JSON object a line: exactly one of
//   "prompt": text | [token ids]      "messages": [{"role", "content"}, ...]
// and optionally "custom_id" and the sampling fields of the HTTP API. Output, a
// line each, in the order they finish:
//   {"custom_id", "text", "token_ids", "finish_reason", "prompt_tokens", "completion_tokens"}
//   {"custom_id", "error": {"code", "message"}}
// With n > 1: "choices": [{text, token_ids, finish_reason}, ...] instead of the
// three single fields.
//
// Resumable: a custom_id (default: "line-N") that stands in the output with an
// answer is not asked again; a last line that was cut off is dropped first.
#ifndef LOCKSTEP_CLI_BATCH_JOB_H_
#define LOCKSTEP_CLI_BATCH_JOB_H_

#include <string>
#include <unordered_set>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "proto/inference.pb.h"

namespace lockstep {

struct BatchItem {
  std::string custom_id;
  absl::Status error;  // when the line is not a request: why, naming the field
  v1::GenerateRequest request;
};

// One line of input. line_number counts from 1.
BatchItem ParseBatchLine(const std::string& line, size_t line_number);

// Every request of the input in order. InvalidArgument on a custom_id that stands twice.
absl::StatusOr<std::vector<BatchItem>> ReadBatch(const std::string& path);

// The ids already answered in an output file (none when it does not exist).
// Cuts off a last line without its newline, and drops lines that hold an error,
// so that those requests are tried again.
absl::StatusOr<std::unordered_set<std::string>> ResumeOutput(const std::string& path);

// Output lines, without the newline.
std::string AnswerLine(const std::string& custom_id, const v1::GenerateResponse& response);
std::string ErrorLine(const std::string& custom_id, const absl::Status& status);

}  // namespace lockstep

#endif  // LOCKSTEP_CLI_BATCH_JOB_H_
