// What the fuzz targets share: taking an input apart, a file to put it in, and
// what every refusal owes to whoever is refused.
//
// A target is one LLVMFuzzerTestOneInput. It calls a parser with bytes that
// nobody vouches for and ends the process (LOCKSTEP_CHECK) when the parser breaks
// a promise: what it accepts is within its limits, what it refuses it refuses in
// one short line. Crashes and reports of sanitizers need no such check.
#ifndef LOCKSTEP_TESTS_FUZZ_FUZZ_INPUT_H_
#define LOCKSTEP_TESTS_FUZZ_FUZZ_INPUT_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/status.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace lockstep::fuzz {

// The input, taken from the front. Reads past the end give zeros and nothing.
class Input {
 public:
  Input(const uint8_t* data, size_t size) : rest_(reinterpret_cast<const char*>(data), size) {}

  bool empty() const { return rest_.empty(); }
  uint8_t Byte();
  std::string_view Take(size_t bytes);
  // A record: two bytes of length, little endian, and as many bytes or what is left.
  std::string_view Record();
  // Up to the next `end` or all; `end` itself is passed over.
  std::string_view Until(char end);
  std::string_view Rest();

 private:
  std::string_view rest_;
};

// InvalidArgument, Unimplemented, NotFound, OutOfRange, ResourceExhausted or
// FailedPrecondition, with one line of valid UTF-8 below 4 KiB.
void RequireRefusal(const absl::Status& status);

// A directory of this process in memory, gone at its end.
class ScratchDir {
 public:
  ScratchDir();
  ~ScratchDir();
  ScratchDir(const ScratchDir&) = delete;
  ScratchDir& operator=(const ScratchDir&) = delete;

  const std::string& path() const { return path_; }
  std::string Write(const std::string& name, std::string_view bytes) const;  // its whole path
  void Remove(const std::string& name) const;

 private:
  std::string path_;
};

}  // namespace lockstep::fuzz

#endif  // LOCKSTEP_TESTS_FUZZ_FUZZ_INPUT_H_
