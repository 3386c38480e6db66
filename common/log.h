// The log: one line a record on stderr, plain text or JSON. Thread-safe. Every
// process calls InitLog once at the start of main; before that, lines are text
// at info level. Control characters in a message are escaped, so that nothing a
// peer or a client sends can start a line of its own.
//
// Decide, then log: nothing reads a level to change what it does. Prompts,
// tokens of a client and secrets are never logged.
#ifndef LOCKSTEP_COMMON_LOG_H_
#define LOCKSTEP_COMMON_LOG_H_

#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace lockstep {

enum class LogLevel { kDebug, kInfo, kWarning, kError };

absl::StatusOr<LogLevel> ParseLogLevel(std::string_view name);  // debug, info, warning, error

struct LogOptions {
  LogLevel level = LogLevel::kInfo;
  bool json = false;
  std::string source;  // "coordinator", "rank 1"; empty: not shown
};

void InitLog(const LogOptions& options);
// Changes the source alone: a worker learns its rank late.
void SetLogSource(std::string_view source);

void Log(LogLevel level, std::string_view message);
inline void LogDebug(std::string_view message) { Log(LogLevel::kDebug, message); }
inline void LogInfo(std::string_view message) { Log(LogLevel::kInfo, message); }
inline void LogWarning(std::string_view message) { Log(LogLevel::kWarning, message); }
inline void LogError(std::string_view message) { Log(LogLevel::kError, message); }

// `text` with control characters as \xNN.
std::string EscapeControl(std::string_view text);

}  // namespace lockstep

#endif  // LOCKSTEP_COMMON_LOG_H_
