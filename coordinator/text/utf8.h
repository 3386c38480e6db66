// UTF-8, whole characters at a time.
#ifndef LOCKSTEP_COORDINATOR_TEXT_UTF8_H_
#define LOCKSTEP_COORDINATOR_TEXT_UTF8_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace lockstep {

bool IsValidUtf8(std::string_view text);

// How bytes that are no character appear: one U+FFFD for each maximal piece
// that begins like a character (Unicode's practice, and what byte-level BPE
// decoders do), or one for each byte (what byte-fallback decoders do).
enum class Utf8Replacement { kPerSubpart, kPerByte };

// Turns bytes that arrive in pieces into valid UTF-8, and holds back the bytes
// of a character that may still be completed: never more than three, however
// long the input. What Push and Finish append does not depend on how the input
// was cut. Not thread-safe.
class Utf8Stream {
 public:
  explicit Utf8Stream(Utf8Replacement replacement) : replacement_(replacement) {}

  // Appends to `out` what is certain once `bytes` are known.
  void Push(std::string_view bytes, std::string* out);
  // The input ends: appends the replacement of the bytes held back. The stream
  // is then empty and may be used again.
  void Finish(std::string* out);

  size_t held_bytes() const { return held_size_; }

 private:
  void Replace(std::string* out);

  Utf8Replacement replacement_;
  char held_[3] = {};
  uint8_t held_size_ = 0;
  // Bytes the held character still lacks, and the range its next byte must be in.
  uint8_t missing_ = 0;
  uint8_t next_min_ = 0;
  uint8_t next_max_ = 0;
};

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_TEXT_UTF8_H_
