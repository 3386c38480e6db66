#include "tests/fuzz/fuzz_input.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "common/check.h"
#include "coordinator/text/utf8.h"

namespace lockstep::fuzz {

uint8_t Input::Byte() {
  const std::string_view byte = Take(1);
  return byte.empty() ? uint8_t{0} : static_cast<uint8_t>(byte.front());
}

std::string_view Input::Take(size_t bytes) {
  const std::string_view taken = rest_.substr(0, bytes);
  rest_.remove_prefix(taken.size());
  return taken;
}

std::string_view Input::Record() {
  const size_t low = Byte(), high = Byte();
  return Take(low | high << 8);
}

std::string_view Input::Until(char end) {
  const std::string_view taken = Take(std::min(rest_.find(end), rest_.size()));
  Take(1);
  return taken;
}

std::string_view Input::Rest() { return Take(rest_.size()); }

void RequireRefusal(const absl::Status& status) {
  const std::string message(status.message());
  const bool good = (absl::IsInvalidArgument(status) || absl::IsUnimplemented(status) ||
                     absl::IsNotFound(status) || absl::IsOutOfRange(status) ||
                     absl::IsResourceExhausted(status) || absl::IsFailedPrecondition(status)) &&
                    !message.empty() && message.size() < 4096 && IsValidUtf8(message) &&
                    std::none_of(message.begin(), message.end(),
                                 [](unsigned char c) { return c < 0x20 || c == 0x7f; });
  if (!good) std::fprintf(stderr, "not how to refuse: %s\n", status.ToString().c_str());
  LOCKSTEP_CHECK(good);
}

ScratchDir::ScratchDir() {
  namespace fs = std::filesystem;
  std::error_code none;
  const fs::path parent =
      fs::is_directory("/dev/shm", none) ? fs::path("/dev/shm") : fs::temp_directory_path();
  std::string pattern = (parent / "lockstep_fuzz_XXXXXX").string();
  LOCKSTEP_CHECK(mkdtemp(pattern.data()) != nullptr);
  path_ = pattern;
}

ScratchDir::~ScratchDir() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

std::string ScratchDir::Write(const std::string& name, std::string_view bytes) const {
  std::string path = path_ + "/" + name;
  std::ofstream(path, std::ios::binary) << bytes;
  return path;
}

void ScratchDir::Remove(const std::string& name) const {
  std::error_code ignored;
  std::filesystem::remove(path_ + "/" + name, ignored);
}

}  // namespace lockstep::fuzz
