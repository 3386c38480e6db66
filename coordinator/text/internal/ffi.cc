#include "coordinator/text/internal/ffi.h"

#include <string>

#include "absl/strings/str_cat.h"

#if defined(__SANITIZE_THREAD__)
extern "C" void __tsan_ignore_thread_begin();
extern "C" void __tsan_ignore_thread_end();
#endif

namespace lockstep::ffi {
namespace {

// One line of bounded length, whatever a file or a template's raise_exception
// put into it. `text` is UTF-8 and stays so.
std::string OneLine(std::string_view text) {
  constexpr size_t kLongest = 1024;
  size_t end = text.size();
  if (end > kLongest) {
    end = kLongest;
    while ((static_cast<unsigned char>(text[end]) & 0xc0) == 0x80) --end;
  }
  std::string line;
  for (const char c : text.substr(0, end)) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte >= 0x20 && byte != 0x7f) {
      line += c;
    } else {
      absl::StrAppend(&line, "\\x", absl::Hex(byte, absl::kZeroPad2));
    }
  }
  return end < text.size() ? line + "..." : line;
}

}  // namespace

#if defined(__SANITIZE_THREAD__)
Call::Call() { __tsan_ignore_thread_begin(); }
Call::~Call() { __tsan_ignore_thread_end(); }
#endif

absl::Status ToStatus(LockstepTextStatus status, std::string_view context, const Text& error) {
  std::string message(context);
  if (!message.empty()) message += ": ";
  message += OneLine(error.view());
  switch (status) {
    case LOCKSTEP_TEXT_OK:
      return absl::OkStatus();
    case LOCKSTEP_TEXT_LIMIT:
      return absl::ResourceExhaustedError(message);
    case LOCKSTEP_TEXT_BUG:
      return absl::InternalError(message);
    default:
      return absl::InvalidArgumentError(message);
  }
}

}  // namespace lockstep::ffi
