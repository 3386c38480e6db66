#include "common/log.h"

#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace lockstep {
namespace {

struct State {
  std::mutex mutex;
  bool json = false;  // guarded by mutex, as everything here
  std::string source;
  int rank = -1;  // none
  std::shared_ptr<spdlog::logger> logger;
};

// Never destroyed: threads may log while the process ends.
State& TheState() {
  static State* state = [] {
    auto* s = new State;
    s->logger =
        std::make_shared<spdlog::logger>("", std::make_shared<spdlog::sinks::stderr_sink_mt>());
    s->logger->set_pattern("%Y-%m-%dT%H:%M:%S.%e %l %v");
    s->logger->flush_on(spdlog::level::trace);
    return s;
  }();
  return *state;
}

spdlog::level::level_enum ToSpdlog(LogLevel level) {
  switch (level) {
    case LogLevel::kDebug:
      return spdlog::level::debug;
    case LogLevel::kInfo:
      return spdlog::level::info;
    case LogLevel::kWarning:
      return spdlog::level::warn;
    case LogLevel::kError:
      return spdlog::level::err;
  }
  return spdlog::level::info;
}

std::string JsonString(std::string_view text) {
  static constexpr char kHex[] = "0123456789abcdef";
  std::string out = "\"";
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (byte < 0x20 || byte == 0x7f) {
      out += "\\u00";
      out += kHex[byte >> 4];
      out += kHex[byte & 15];
    } else {
      out += c;
    }
  }
  return out + "\"";
}

}  // namespace

std::string EscapeControl(std::string_view text) {
  static constexpr char kHex[] = "0123456789abcdef";
  std::string out;
  out.reserve(text.size());
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20 || byte == 0x7f) {
      out += "\\x";
      out += kHex[byte >> 4];
      out += kHex[byte & 15];
    } else {
      out += c;
    }
  }
  return out;
}

std::string OneLine(std::string_view text, size_t most_bytes) {
  size_t end = std::min(text.size(), most_bytes);
  while (end > 0 && end < text.size() && (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) {
    --end;
  }
  return EscapeControl(text.substr(0, end)) + (end < text.size() ? "..." : "");
}

absl::StatusOr<LogLevel> ParseLogLevel(std::string_view name) {
  if (name == "debug") return LogLevel::kDebug;
  if (name == "info") return LogLevel::kInfo;
  if (name == "warning") return LogLevel::kWarning;
  if (name == "error") return LogLevel::kError;
  return absl::InvalidArgumentError(
      absl::StrCat("log level '", std::string(name), "': expected debug, info, warning or error"));
}

void InitLog(const LogOptions& options) {
  State& state = TheState();
  const std::lock_guard lock(state.mutex);
  state.json = options.json;
  state.source = options.source;
  state.logger->set_level(ToSpdlog(options.level));
  state.logger->set_pattern(options.json ? R"({"time":"%Y-%m-%dT%H:%M:%S.%e%z","level":"%l",%v})"
                                         : "%Y-%m-%dT%H:%M:%S.%e %l %v");
}

void SetLogRank(int rank) {
  State& state = TheState();
  const std::lock_guard lock(state.mutex);
  state.rank = rank;
  state.source = absl::StrCat("rank ", rank);
}

bool LogsJson() {
  State& state = TheState();
  const std::lock_guard lock(state.mutex);
  return state.json;
}

void Log(LogLevel level, std::string_view message, std::initializer_list<LogField> fields) {
  State& state = TheState();
  const std::lock_guard lock(state.mutex);
  if (!state.logger->should_log(ToSpdlog(level))) return;
  std::string line;
  if (state.json) {
    if (!state.source.empty()) {
      line = absl::StrCat("\"source\":", JsonString(state.source), ",");
    }
    if (state.rank >= 0) absl::StrAppend(&line, "\"rank\":", state.rank, ",");
    for (const LogField& field : fields) {
      absl::StrAppend(&line, JsonString(field.name), ":", JsonString(field.value), ",");
    }
    absl::StrAppend(&line, "\"message\":", JsonString(message));
  } else {
    if (!state.source.empty()) line = absl::StrCat("[", EscapeControl(state.source), "] ");
    line += EscapeControl(message);
    for (const LogField& field : fields) {
      line += " " + std::string(field.name) + "=" + EscapeControl(field.value);
    }
  }
  state.logger->log(ToSpdlog(level), "{}", line);
}

}  // namespace lockstep
