// The C ABI in C++ terms: owned values and statuses.
#ifndef LOCKSTEP_COORDINATOR_TEXT_INTERNAL_FFI_H_
#define LOCKSTEP_COORDINATOR_TEXT_INTERNAL_FFI_H_

#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "coordinator/text/ffi/lockstep_text.h"

namespace lockstep::ffi {

// Stands around each call. ThreadSanitizer sees the library's memory but not the
// atomics that guard it, because Rust code is not instrumented; it is told to
// look away until the call returns. Nothing in other builds.
class [[maybe_unused]] Call {
#if defined(__SANITIZE_THREAD__)
 public:
  Call();
  ~Call();
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;
#endif
};

// Frees what the library returned.
class Text {
 public:
  Text() = default;
  ~Text() {
    Call call;
    lockstep_text_free(raw_);
  }
  Text(const Text&) = delete;
  Text& operator=(const Text&) = delete;

  LockstepText* out() { return &raw_; }
  std::string_view view() const { return {raw_.data, raw_.size}; }
  std::string str() const { return std::string(view()); }

 private:
  LockstepText raw_ = {nullptr, 0};
};

// `status` of a call that failed, as "context: error".
absl::Status ToStatus(LockstepTextStatus status, std::string_view context, const Text& error);

}  // namespace lockstep::ffi

#endif  // LOCKSTEP_COORDINATOR_TEXT_INTERNAL_FFI_H_
