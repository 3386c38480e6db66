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
// answer is not asked again; lines with an error and a last line that was cut off
// are dropped first.
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

// What stands in an output file already.
struct BatchOutput {
  std::unordered_set<std::string> answered;
  // Lines that a job which goes on does without, counted from 0, ascending.
  std::vector<size_t> stale;
};

// Changes nothing. Empty when nothing stands there, and for what is no regular
// file: a device or a pipe is written to as it is.
absl::StatusOr<BatchOutput> ReadOutput(const std::string& path);

// Drops those lines of a regular file, or leaves it as it is and says why. A
// symbolic link stays one, the mode stays, and so does the owner where we may.
absl::Status DropLines(const std::string& path, const std::vector<size_t>& lines);

// Output lines, without the newline.
std::string AnswerLine(const std::string& custom_id, const v1::GenerateResponse& response);
std::string ErrorLine(const std::string& custom_id, const absl::Status& status);

}  // namespace lockstep

#endif  // LOCKSTEP_CLI_BATCH_JOB_H_
