// Text and token ids across the border to the tokenizer library, with every kind
// of tokenizer that the tests have; stop strings and unfinished characters.
#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "common/check.h"
#include "coordinator/api/bounded_encode.h"
#include "coordinator/text/detokenizer.h"
#include "coordinator/text/stop_matcher.h"
#include "coordinator/text/tokenizer.h"
#include "coordinator/text/utf8.h"
#include "tests/fuzz/fuzz_input.h"

namespace lockstep::fuzz {
namespace {

using Tokenizers = std::vector<std::shared_ptr<const Tokenizer>>;

const Tokenizers& All() {
  static const Tokenizers& all = *[] {
    auto* const loaded = new Tokenizers;
    for (const char* name : {"byte_level", "byte_fallback", "byte_fallback_plain", "unigram",
                             "word_level", "word_piece"}) {
      auto tokenizer =
          Tokenizer::Load(std::string(LOCKSTEP_SOURCE_DIR) + "/tests/text/data/" + name);
      LOCKSTEP_CHECK(tokenizer.ok());
      loaded->push_back(*tokenizer);
    }
    return loaded;
  }();
  return all;
}

// An answer's text is the same as a whole and token by token.
void Ids(const std::shared_ptr<const Tokenizer>& tokenizer, const std::vector<TokenId>& ids,
         bool skip_special) {
  LOCKSTEP_CHECK(IsValidUtf8(tokenizer->Decode(ids, skip_special)));
  const std::string answer = tokenizer->DecodeAnswer(ids, skip_special);
  LOCKSTEP_CHECK(IsValidUtf8(answer));
  Detokenizer detokenizer(tokenizer, skip_special);
  std::string pieces;
  for (const TokenId id : ids) {
    const std::string piece = detokenizer.Push(id);
    LOCKSTEP_CHECK(IsValidUtf8(piece) && detokenizer.held_bytes() <= 3);
    LOCKSTEP_CHECK(IsValidUtf8(tokenizer->TokenText(id)));
    pieces += piece;
  }
  LOCKSTEP_CHECK(pieces + detokenizer.Finish() == answer);
}

void Encode(const std::shared_ptr<const Tokenizer>& tokenizer, std::string_view text,
            bool add_special) {
  const auto ids = tokenizer->Encode(text, add_special);
  LOCKSTEP_CHECK(ids.ok() == IsValidUtf8(text));
  if (!ids.ok()) return RequireRefusal(ids.status());
  for (const TokenId id : *ids) LOCKSTEP_CHECK(id < tokenizer->vocab_size());
  const auto bounded = BoundedEncode(*tokenizer, text, add_special, text.size() + 16);
  LOCKSTEP_CHECK(bounded.ok() && *bounded == *ids);
  Ids(tokenizer, *ids, add_special);
}

// Whatever the pieces, the match is the same, and the text cut in the same place.
StopMatcher::Output Match(const std::vector<std::string>& stops, bool include,
                          std::string_view text, size_t piece) {
  StopMatcher matcher(stops, include);
  StopMatcher::Output all;
  for (size_t at = 0; at < text.size(); at += piece) {
    StopMatcher::Output out = matcher.Push(text.substr(at, piece));
    all.text += out.text;
  }
  StopMatcher::Output out = matcher.Flush();
  LOCKSTEP_CHECK(matcher.held_bytes() == 0);
  return {all.text + out.text, out.matched};
}

void Stops(bool include, size_t piece, std::string_view first, std::string_view second,
           std::string_view text) {
  const std::vector<std::string> stops{std::string(first), std::string(second)};
  const auto whole = Match(stops, include, text, text.size() + 1);
  const auto cut = Match(stops, include, text, piece);
  LOCKSTEP_CHECK(whole.text == cut.text && whole.matched == cut.matched);
  if (!whole.matched) LOCKSTEP_CHECK(whole.text == text);
  // Nothing of a stop in what is shown without it.
  if (include) return;
  for (const std::string& stop : stops) {
    LOCKSTEP_CHECK(stop.empty() || whole.text.find(stop) == std::string::npos);
  }
}

}  // namespace
}  // namespace lockstep::fuzz

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace lockstep;
  fuzz::Input input(data, size);
  const char what = static_cast<char>(input.Byte());
  const uint8_t choice = input.Byte();
  const auto& tokenizer = fuzz::All()[choice / 2 % fuzz::All().size()];
  if (what == 's') {
    const std::string_view first = input.Until('|'), second = input.Until('|');
    fuzz::Stops(choice % 2 == 0, choice / 2 % 16 + size_t{1}, first, second, input.Rest());
  } else if (what == 'i') {
    std::vector<TokenId> ids;
    while (!input.empty()) {
      const uint32_t low = input.Byte(), high = input.Byte();
      ids.push_back(high == 255 ? UINT32_MAX - low : low | high << 8);
    }
    fuzz::Ids(tokenizer, ids, choice % 2 == 0);
  } else {
    fuzz::Encode(tokenizer, input.Rest(), choice % 2 == 0);
  }
  return 0;
}
