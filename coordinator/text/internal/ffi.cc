#include "coordinator/text/internal/ffi.h"

#if defined(__SANITIZE_THREAD__)
extern "C" void __tsan_ignore_thread_begin();
extern "C" void __tsan_ignore_thread_end();
#endif

namespace lockstep::ffi {

#if defined(__SANITIZE_THREAD__)
Call::Call() { __tsan_ignore_thread_begin(); }
Call::~Call() { __tsan_ignore_thread_end(); }
#endif

absl::Status ToStatus(LockstepTextStatus status, std::string_view context, const Text& error) {
  std::string message(context);
  if (!message.empty()) message += ": ";
  message += error.view();
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
