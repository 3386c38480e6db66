// The log: one line a record on stderr, plain text or JSON. Thread-safe. Every
// process calls InitLog once at the start of main; before that, lines are text
// at info level. Control characters in a message are escaped, so that nothing a
// peer or a client sends can start a line of its own.
//
// Decide, then log: nothing reads a level to change what it does. Prompts,
// tokens of a client and secrets are never logged.
#ifndef LOCKSTEP_COMMON_LOG_H_
#define LOCKSTEP_COMMON_LOG_H_

#include <cstddef>
#include <initializer_list>
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
// A worker learns its rank late. The source is "rank 1" from here on; in JSON there
// is also the field "rank", a number.
void SetLogRank(int rank);

// A name of our own and a value of anybody's: a member of the object in JSON, "name=value"
// after the message in text.
struct LogField {
  std::string_view name, value;
};

void Log(LogLevel level, std::string_view message, std::initializer_list<LogField> fields = {});
inline void LogDebug(std::string_view message) { Log(LogLevel::kDebug, message); }
inline void LogInfo(std::string_view message) { Log(LogLevel::kInfo, message); }
inline void LogWarning(std::string_view message) { Log(LogLevel::kWarning, message); }
inline void LogError(std::string_view message) { Log(LogLevel::kError, message); }

// Whether lines are JSON: what a main says last is then one too.
bool LogsJson();

// `text` with control characters as \xNN.
std::string EscapeControl(std::string_view text);
// The same of the first `most_bytes` of `text` and "..." for the rest; a character
// of UTF-8 is never cut.
std::string OneLine(std::string_view text, size_t most_bytes);

}  // namespace lockstep

#endif  // LOCKSTEP_COMMON_LOG_H_
