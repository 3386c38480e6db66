#include "cli/batch_job.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <map>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "common/log.h"
#include "nlohmann/json.hpp"

namespace lockstep {
namespace {

using nlohmann::json;

absl::Status Bad(const std::string& field, const std::string& expected) {
  return absl::InvalidArgumentError(absl::StrCat(field, ": expected ", expected));
}

absl::Status ReadUint(const json& value, const std::string& field, uint32_t* out) {
  if (!value.is_number_unsigned() || value.get<uint64_t>() > std::numeric_limits<uint32_t>::max()) {
    return Bad(field, "a whole number of 0 or more");
  }
  *out = value.get<uint32_t>();
  return absl::OkStatus();
}

absl::Status ReadPrompt(const json& value, v1::GenerateRequest* request) {
  if (value.is_string()) {
    request->set_text(value.get<std::string>());
    return absl::OkStatus();
  }
  if (!value.is_array()) return Bad("prompt", "a string or a list of token ids");
  request->mutable_token_ids();
  for (const json& id : value) {
    uint32_t token = 0;
    if (absl::Status status = ReadUint(id, "prompt", &token); !status.ok()) return status;
    request->mutable_token_ids()->add_ids(token);
  }
  return absl::OkStatus();
}

absl::Status ReadMessages(const json& value, v1::GenerateRequest* request) {
  const char* expected = "a list of {\"role\", \"content\"} with text in both";
  if (!value.is_array()) return Bad("messages", expected);
  for (const json& message : value) {
    if (!message.is_object() || message.size() != 2 || !message.contains("role") ||
        !message["role"].is_string() || !message.contains("content") ||
        !message["content"].is_string()) {
      return Bad("messages", expected);
    }
    v1::ChatMessage* out = request->mutable_chat()->add_messages();
    out->set_role(message["role"].get<std::string>());
    out->set_content(message["content"].get<std::string>());
  }
  return absl::OkStatus();
}

absl::Status ReadStop(const json& value, v1::SamplingParams* params) {
  const json list = value.is_string() ? json::array({value}) : value;
  if (!list.is_array()) return Bad("stop", "a string or a list of strings");
  for (const json& stop : list) {
    if (!stop.is_string()) return Bad("stop", "a string or a list of strings");
    params->add_stop(stop.get<std::string>());
  }
  return absl::OkStatus();
}

absl::Status ReadLogitBias(const json& value, v1::SamplingParams* params) {
  if (!value.is_object()) return Bad("logit_bias", "an object of token id to number");
  for (const auto& [key, bias] : value.items()) {
    uint32_t id;
    if (!absl::SimpleAtoi(key, &id) || !bias.is_number()) {
      return Bad("logit_bias", "an object of token id to number");
    }
    (*params->mutable_logit_bias())[id] = bias.get<float>();
  }
  return absl::OkStatus();
}

using FieldReader = std::function<absl::Status(const json&, v1::GenerateRequest*)>;

FieldReader Uint(const char* name, void (v1::SamplingParams::*set)(uint32_t)) {
  return [=](const json& value, v1::GenerateRequest* request) {
    uint32_t number = 0;
    absl::Status status = ReadUint(value, name, &number);
    if (status.ok()) (request->mutable_sampling()->*set)(number);
    return status;
  };
}

FieldReader Float(const char* name, void (v1::SamplingParams::*set)(float)) {
  return [=](const json& value, v1::GenerateRequest* request) {
    if (!value.is_number()) return Bad(name, "a number");
    (request->mutable_sampling()->*set)(value.get<float>());
    return absl::OkStatus();
  };
}

FieldReader Bool(const char* name, void (v1::SamplingParams::*set)(bool)) {
  return [=](const json& value, v1::GenerateRequest* request) {
    if (!value.is_boolean()) return Bad(name, "true or false");
    (request->mutable_sampling()->*set)(value.get<bool>());
    return absl::OkStatus();
  };
}

const std::map<std::string, FieldReader>& Fields() {
  using P = v1::SamplingParams;
  static const auto* fields = new std::map<std::string, FieldReader>{
      {"prompt", ReadPrompt},
      {"messages", ReadMessages},
      {"max_tokens", Uint("max_tokens", &P::set_max_tokens)},
      {"min_tokens", Uint("min_tokens", &P::set_min_tokens)},
      {"top_k", Uint("top_k", &P::set_top_k)},
      {"n", Uint("n", &P::set_n)},
      {"logprobs", Uint("logprobs", &P::set_logprobs)},
      {"temperature", Float("temperature", &P::set_temperature)},
      {"top_p", Float("top_p", &P::set_top_p)},
      {"min_p", Float("min_p", &P::set_min_p)},
      {"repetition_penalty", Float("repetition_penalty", &P::set_repetition_penalty)},
      {"presence_penalty", Float("presence_penalty", &P::set_presence_penalty)},
      {"frequency_penalty", Float("frequency_penalty", &P::set_frequency_penalty)},
      {"ignore_eos", Bool("ignore_eos", &P::set_ignore_eos)},
      {"skip_special_tokens", Bool("skip_special_tokens", &P::set_skip_special_tokens)},
      {"include_stop_str_in_output",
       Bool("include_stop_str_in_output", &P::set_include_stop_str_in_output)},
      {"stop",
       [](const json& v, v1::GenerateRequest* r) { return ReadStop(v, r->mutable_sampling()); }},
      {"logit_bias",
       [](const json& v, v1::GenerateRequest* r) {
         return ReadLogitBias(v, r->mutable_sampling());
       }},
      {"seed",
       [](const json& v, v1::GenerateRequest* r) -> absl::Status {
         const bool fits = !v.is_number_unsigned() || v.get<uint64_t>() <= uint64_t{INT64_MAX};
         if (!v.is_number_integer() || !fits) return Bad("seed", "a whole number of 64 bits");
         r->mutable_sampling()->set_seed(v.get<int64_t>());
         return absl::OkStatus();
       }},
      {"stop_token_ids",
       [](const json& v, v1::GenerateRequest* r) -> absl::Status {
         if (!v.is_array()) return Bad("stop_token_ids", "a list of token ids");
         for (const json& id : v) {
           uint32_t token = 0;
           if (absl::Status s = ReadUint(id, "stop_token_ids", &token); !s.ok()) return s;
           r->mutable_sampling()->add_stop_token_ids(token);
         }
         return absl::OkStatus();
       }},
  };
  return *fields;
}

absl::Status FillRequest(const json& object, v1::GenerateRequest* request) {
  if (object.contains("prompt") == object.contains("messages")) {
    return absl::InvalidArgumentError("prompt, messages: exactly one of the two is needed");
  }
  for (const auto& [key, value] : object.items()) {
    if (key == "custom_id") continue;
    const auto field = Fields().find(key);
    if (field == Fields().end()) {
      return absl::InvalidArgumentError(absl::StrCat(OneLine(key, 64), ": unknown field"));
    }
    if (absl::Status status = field->second(value, request); !status.ok()) return status;
  }
  return absl::OkStatus();
}

const char* ReasonName(v1::FinishReason reason) {
  switch (reason) {
    case v1::FINISH_REASON_STOP:
      return "stop";
    case v1::FINISH_REASON_LENGTH:
      return "length";
    default:
      return "aborted";
  }
}

json Choice(const v1::Completion& completion) {
  return {{"text", completion.text()},
          {"token_ids",
           std::vector<uint32_t>(completion.token_ids().begin(), completion.token_ids().end())},
          {"finish_reason", ReasonName(completion.finish().reason())}};
}

// Text that is not UTF-8 cannot stop the job.
std::string Dump(const json& value) {
  return value.dump(-1, ' ', false, json::error_handler_t::replace);
}

// Discarded where it is none. The parser alone would take a NUL byte for the end.
json ParseLine(const std::string& line) {
  if (line.find('\0') != std::string::npos) return json(json::value_t::discarded);
  return json::parse(line, nullptr, /*allow_exceptions=*/false);
}

}  // namespace

BatchItem ParseBatchLine(const std::string& line, size_t line_number) {
  BatchItem item;
  item.custom_id = absl::StrCat("line-", line_number);
  const json object = ParseLine(line);
  if (!object.is_object()) {
    item.error =
        absl::InvalidArgumentError(absl::StrCat("line ", line_number, ": not a JSON object"));
    return item;
  }
  if (object.contains("custom_id")) {
    if (!object["custom_id"].is_string()) {
      item.error = Bad("custom_id", "a string");
      return item;
    }
    item.custom_id = object["custom_id"].get<std::string>();
  }
  item.error = FillRequest(object, &item.request);
  return item;
}

absl::StatusOr<std::vector<BatchItem>> ReadBatch(const std::string& path) {
  std::ifstream file(path);
  if (!file) return absl::NotFoundError(absl::StrCat(path, ": cannot be read"));
  std::vector<BatchItem> items;
  std::unordered_set<std::string> ids;
  std::string line;
  for (size_t number = 1; std::getline(file, line); ++number) {
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    items.push_back(ParseBatchLine(line, number));
    if (!ids.insert(items.back().custom_id).second) {
      return absl::InvalidArgumentError(absl::StrCat(path, " line ", number, ": custom_id '",
                                                     items.back().custom_id, "' stands twice"));
    }
  }
  return items;
}

absl::StatusOr<BatchOutput> ReadOutput(const std::string& path) {
  namespace fs = std::filesystem;
  BatchOutput output;
  std::error_code error;
  const fs::file_status status = fs::status(path, error);
  if (fs::is_directory(status)) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": is a folder; name a file"));
  }
  if (fs::status_known(status) && !fs::is_regular_file(status)) return output;
  std::ifstream file(path);
  if (!file) return absl::NotFoundError(absl::StrCat(path, ": cannot be read"));
  std::string line;
  for (size_t number = 0; std::getline(file, line); ++number) {
    if (file.eof()) {  // no newline: the line was cut off
      output.stale.push_back(number);
      break;
    }
    const json object = ParseLine(line);
    if (!object.is_object() || !object.contains("custom_id") || !object["custom_id"].is_string()) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": holds a line that is not an answer; name another output"));
    }
    if (object.contains("error")) {
      output.stale.push_back(number);
    } else {
      output.answered.insert(object["custom_id"].get<std::string>());
    }
  }
  return output;
}

absl::Status DropLines(const std::string& path, const std::vector<size_t>& lines) {
  const auto failed = [&] {
    return absl::UnavailableError(absl::StrCat(path, ": cannot be rewritten: ", strerror(errno)));
  };
  std::error_code error;
  const std::string target = std::filesystem::canonical(path, error);  // of a symbolic link
  struct stat old {};
  if (error || stat(target.c_str(), &old) != 0) return failed();
  std::string kept_path = target + ".XXXXXX";
  const int fd = mkstemp(kept_path.data());
  if (fd < 0) return failed();
  close(fd);

  std::ifstream file(target);
  std::ofstream kept(kept_path);
  std::string line;
  auto next = lines.begin();
  for (size_t number = 0; std::getline(file, line); ++number) {
    if (next != lines.end() && *next == number) {
      ++next;
    } else {
      kept << line << '\n';
    }
  }
  kept.close();
  // Only root gives files away: who goes on with another's file makes it theirs.
  const bool given = chown(kept_path.c_str(), old.st_uid, old.st_gid) == 0 || errno == EPERM;
  if (!given || file.bad() || !kept || chmod(kept_path.c_str(), old.st_mode & 07777) != 0 ||
      std::rename(kept_path.c_str(), target.c_str()) != 0) {
    absl::Status status = failed();
    unlink(kept_path.c_str());
    return status;
  }
  return absl::OkStatus();
}

std::string AnswerLine(const std::string& custom_id, const v1::GenerateResponse& response) {
  json out = {{"custom_id", custom_id}, {"prompt_tokens", response.prompt().prompt_tokens()}};
  uint32_t generated = 0;
  json choices = json::array();
  for (const v1::Completion& completion : response.completions()) {
    choices.push_back(Choice(completion));
    generated += completion.finish().completion_tokens();
  }
  out["completion_tokens"] = generated;
  if (choices.size() == 1) {
    out.update(choices[0]);
  } else {
    out["choices"] = std::move(choices);
  }
  return Dump(out);
}

std::string ErrorLine(const std::string& custom_id, const absl::Status& status) {
  return Dump({{"custom_id", custom_id},
               {"error",
                {{"code", absl::StatusCodeToString(status.code())},
                 {"message", std::string(status.message())}}}});
}

}  // namespace lockstep
