#include "coordinator/api/bounded_encode.h"

#include <malloc.h>

#include <algorithm>
#include <mutex>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace lockstep {
namespace {

constexpr size_t kPieceBytes = 16 * 1024;
// What one cut may add: a token parted in two, a word's mark at a piece's begin.
constexpr size_t kTokensPerCut = 4;

// Where a piece of `text` ends: before a space where there is one near, so that
// few tokens are parted, and never within a character.
size_t PieceEnd(std::string_view text) {
  if (text.size() <= kPieceBytes) return text.size();
  const size_t space = text.rfind(' ', kPieceBytes);
  if (space != text.npos && space > kPieceBytes / 2) return space;
  size_t end = kPieceBytes;
  while (end > 1 && (static_cast<unsigned char>(text[end]) & 0xc0) == 0x80) --end;
  return end;
}

// OutOfRange as soon as the text has more than `max_tokens` whatever the cuts did.
absl::Status CheckLength(const Tokenizer& tokenizer, std::string_view text, size_t max_tokens) {
  size_t tokens = 0, allowance = 0;
  const size_t whole = text.size();
  while (!text.empty()) {
    const size_t end = PieceEnd(text);
    absl::StatusOr<std::vector<TokenId>> ids = tokenizer.Encode(text.substr(0, end), false);
    if (!ids.ok()) return ids.status();
    tokens += ids->size();
    allowance += kTokensPerCut;
    text.remove_prefix(end);
    if (tokens > max_tokens + allowance) {
      return absl::OutOfRangeError(
          absl::StrCat(whole, " bytes are more than ", max_tokens, " tokens (", tokens - allowance,
                       " at least in the first ", whole - text.size(), " bytes)"));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::vector<TokenId>> BoundedEncode(const Tokenizer& tokenizer,
                                                   std::string_view text, bool add_special_tokens,
                                                   size_t max_tokens) {
  if (text.size() <= kShortTextBytes) return tokenizer.Encode(text, add_special_tokens);
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  absl::Status fits = CheckLength(tokenizer, text, max_tokens);
  if (!fits.ok()) return fits;
  absl::StatusOr<std::vector<TokenId>> ids = tokenizer.Encode(text, add_special_tokens);
  // Millions of small allocations: what is free in between goes back as well.
  malloc_trim(0);
  return ids;
}

}  // namespace lockstep
