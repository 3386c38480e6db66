#include "coordinator/api/http/http_error.h"

#include <nlohmann/json.hpp>
#include <optional>

#include "absl/strings/str_cat.h"
#include "coordinator/api/api_error.h"

namespace lockstep {
namespace {

using OrderedJson = nlohmann::ordered_json;

const char* TypeOf(int code) {
  switch (code) {
    case 401:
      return "authentication_error";
    case 404:
      return "not_found_error";
    case 429:
      return "rate_limit_error";
    case 503:
      return "service_unavailable_error";
    case 504:
      return "timeout_error";
    default:
      return code >= 500 ? "server_error" : "invalid_request_error";
  }
}

// OpenAI's machine-readable codes, where there is one that fits.
const char* CodeOf(int code, std::string_view param) {
  switch (code) {
    case 401:
      return "invalid_api_key";
    case 404:
      return param == "model" ? "model_not_found" : "not_found";
    case 405:
      return "method_not_allowed";
    case 408:
      return "request_timeout";
    case 413:
      return "request_too_large";
    case 415:
      return "unsupported_media_type";
    case 429:
      return "rate_limit_exceeded";
    case 431:
      return "header_too_large";
    case 503:
      return "service_unavailable";
    case 504:
      return "deadline_exceeded";
    default:
      return code >= 500 ? "internal_error" : "invalid_value";
  }
}

}  // namespace

int HttpCode(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kOk:
      return 200;
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kOutOfRange:
    case absl::StatusCode::kFailedPrecondition:
      return 400;
    case absl::StatusCode::kUnauthenticated:
      return 401;
    case absl::StatusCode::kNotFound:
      return 404;
    case absl::StatusCode::kResourceExhausted:
      return 429;
    case absl::StatusCode::kUnavailable:
      return 503;
    case absl::StatusCode::kDeadlineExceeded:
      return 504;
    default:
      return 500;
  }
}

std::string ErrorJson(int code, std::string_view message, std::string_view param) {
  OrderedJson error;
  error["message"] = message;
  error["type"] = TypeOf(code);
  error["param"] = param.empty() ? OrderedJson(nullptr) : OrderedJson(param);
  error["code"] = CodeOf(code, param);
  OrderedJson body;
  body["error"] = std::move(error);
  return body.dump(-1, ' ', false, OrderedJson::error_handler_t::replace);
}

std::string ErrorJson(const absl::Status& status) {
  const absl::string_view message = status.message();
  return ErrorJson(HttpCode(status), {message.data(), message.size()}, ErrorField(status));
}

HttpReply ErrorReply(const absl::Status& status) {
  HttpReply reply{.status = HttpCode(status), .headers = {}, .body = ErrorJson(status)};
  if (const std::optional<int> seconds = RetrySeconds(status)) {
    reply.headers.emplace_back("Retry-After", absl::StrCat(*seconds));
  }
  if (reply.status == 401) reply.headers.emplace_back("WWW-Authenticate", "Bearer");
  return reply;
}

HttpReply ErrorReply(int code, std::string_view message, std::string_view param) {
  HttpReply reply{.status = code, .headers = {}, .body = ErrorJson(code, message, param)};
  if (code == 429 || code == 503) reply.headers.emplace_back("Retry-After", "1");
  return reply;
}

}  // namespace lockstep
