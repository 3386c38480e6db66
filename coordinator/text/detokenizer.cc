#include "coordinator/text/detokenizer.h"

#include <utility>

namespace lockstep {

Detokenizer::Detokenizer(std::shared_ptr<const Tokenizer> tokenizer, bool skip_special_tokens)
    : tokenizer_(std::move(tokenizer)),
      skip_special_tokens_(skip_special_tokens),
      stream_(tokenizer_->replacement()) {}

std::string Detokenizer::Push(TokenId id) {
  std::string text;
  if (skip_special_tokens_ && tokenizer_->IsSpecial(id)) return text;
  stream_.Push(tokenizer_->TokenBytes(id), &text);
  return text;
}

std::string Detokenizer::Finish() {
  std::string text;
  stream_.Finish(&text);
  return text;
}

}  // namespace lockstep
