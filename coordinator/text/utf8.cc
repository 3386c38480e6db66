#include "coordinator/text/utf8.h"

namespace lockstep {
namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";

struct Lead {
  uint8_t missing;  // bytes after this one; 0: cannot begin a longer character
  uint8_t next_min;
  uint8_t next_max;
};

// Table 3-7 of the Unicode standard: the second byte's range rules out overlong
// forms, surrogates and what lies above U+10FFFF.
Lead LeadOf(uint8_t byte) {
  if (byte >= 0xC2 && byte <= 0xDF) return {1, 0x80, 0xBF};
  if (byte == 0xE0) return {2, 0xA0, 0xBF};
  if (byte == 0xED) return {2, 0x80, 0x9F};
  if (byte >= 0xE1 && byte <= 0xEF) return {2, 0x80, 0xBF};
  if (byte == 0xF0) return {3, 0x90, 0xBF};
  if (byte >= 0xF1 && byte <= 0xF3) return {3, 0x80, 0xBF};
  if (byte == 0xF4) return {3, 0x80, 0x8F};
  return {0, 0, 0};
}

}  // namespace

bool IsValidUtf8(std::string_view text) {
  size_t i = 0;
  while (i < text.size()) {
    const uint8_t byte = static_cast<uint8_t>(text[i++]);
    if (byte < 0x80) continue;
    Lead lead = LeadOf(byte);
    if (lead.missing == 0 || text.size() - i < lead.missing) return false;
    for (; lead.missing > 0; --lead.missing) {
      const uint8_t next = static_cast<uint8_t>(text[i++]);
      if (next < lead.next_min || next > lead.next_max) return false;
      lead.next_min = 0x80;
      lead.next_max = 0xBF;
    }
  }
  return true;
}

void Utf8Stream::Push(std::string_view bytes, std::string* out) {
  for (const char c : bytes) {
    const uint8_t byte = static_cast<uint8_t>(c);
    if (missing_ > 0 && byte >= next_min_ && byte <= next_max_) {
      if (--missing_ > 0) {
        held_[held_size_++] = c;
        next_min_ = 0x80;
        next_max_ = 0xBF;
      } else {
        out->append(held_, held_size_);
        out->push_back(c);
        held_size_ = 0;
      }
      continue;
    }
    Replace(out);  // what was held has no continuation
    if (byte < 0x80) {
      out->push_back(c);
      continue;
    }
    const Lead lead = LeadOf(byte);
    if (lead.missing == 0) {
      out->append(kReplacement);
      continue;
    }
    held_[held_size_++] = c;
    missing_ = lead.missing;
    next_min_ = lead.next_min;
    next_max_ = lead.next_max;
  }
}

void Utf8Stream::Finish(std::string* out) { Replace(out); }

void Utf8Stream::Replace(std::string* out) {
  const size_t count = replacement_ == Utf8Replacement::kPerByte ? held_size_ : held_size_ > 0;
  for (size_t i = 0; i < count; ++i) out->append(kReplacement);
  held_size_ = 0;
  missing_ = 0;
}

}  // namespace lockstep
