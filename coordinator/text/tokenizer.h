// A model's tokenizer: Hugging Face `tokenizers` behind lockstep_text.h, plus a
// table of every token's bytes, made once at Load. Everything that turns a
// running answer into text (Detokenizer, TokenText) reads that table and never
// crosses the C ABI.
//
// There are two ways from ids to text, because an answer is not a document:
//   Decode        what Hugging Face's decode gives: many sentencepiece-style
//                 decoders drop the space of the first token ("▁Hello" -> "Hello").
//                 For ids that stand for a whole text, such as a prompt.
//   DecodeAnswer  the bytes of the tokens joined, first space kept. For ids that
//                 continue a prompt; equals what a Detokenizer emits in all.
// They differ in nothing else, except for byte-fallback tokens whose bytes are
// not valid UTF-8: Hugging Face discards the whole run of byte tokens around a
// bad one; DecodeAnswer, which cannot wait for a run to end, only the bad bytes.
//
//   auto tokenizer = Tokenizer::Load("/models/demo");
//   auto ids = (*tokenizer)->Encode("Hello", /*add_special_tokens=*/true);
//
// Thread-safe, immutable after Load. Ids are any numbers: an unknown one has no
// text.
#ifndef LOCKSTEP_COORDINATOR_TEXT_TOKENIZER_H_
#define LOCKSTEP_COORDINATOR_TEXT_TOKENIZER_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "common/ids.h"
#include "coordinator/text/tokenizer_config.h"
#include "coordinator/text/utf8.h"

struct LockstepTokenizer;

namespace lockstep {

class Tokenizer {
 public:
  // Reads tokenizer.json, and tokenizer_config.json and special_tokens_map.json
  // where present. A missing or bad file is one line that names it: NotFound or
  // InvalidArgument.
  static absl::StatusOr<std::shared_ptr<const Tokenizer>> Load(const std::string& model_dir);
  ~Tokenizer();
  Tokenizer(const Tokenizer&) = delete;
  Tokenizer& operator=(const Tokenizer&) = delete;

  // The ids of `text`, which must be UTF-8 (InvalidArgument otherwise). Never
  // truncates or pads, whatever tokenizer.json says. With add_special_tokens
  // the model's own frame (usually its bos) is added; special tokens written
  // in the text become ids either way.
  absl::StatusOr<std::vector<TokenId>> Encode(std::string_view text, bool add_special_tokens) const;
  std::string Decode(absl::Span<const TokenId> ids, bool skip_special_tokens) const;
  std::string DecodeAnswer(absl::Span<const TokenId> ids, bool skip_special_tokens) const;

  // The token's own text, for showing log-probabilities: bytes that are not
  // UTF-8 by themselves appear as U+FFFD. TokenBytes are the bytes as they are;
  // valid as long as the tokenizer.
  std::string TokenText(TokenId id) const;
  std::string_view TokenBytes(TokenId id) const;

  // By the token's name in tokenizer.json ("Ġthe", "<|im_end|>"), not its text.
  std::optional<TokenId> TokenToId(std::string_view token) const;
  bool IsSpecial(TokenId id) const;

  // One more than the largest id, added tokens included.
  uint32_t vocab_size() const { return vocab_size_; }
  // The id of eos_token(), where there is one. generation_config.json and
  // config.json, which may name more, belong to model/.
  std::vector<TokenId> eos_token_ids() const { return eos_token_ids_; }
  const std::string& bos_token() const { return config_.bos_token(); }  // "" if none
  const std::string& eos_token() const { return config_.eos_token(); }  // "" if none

  // How bytes of generated tokens that are not UTF-8 are shown.
  Utf8Replacement replacement() const { return replacement_; }

 private:
  Tokenizer() = default;

  LockstepTokenizer* handle_ = nullptr;
  TokenizerConfig config_;
  // Token id's bytes are bytes_[offsets_[id] .. offsets_[id + 1]); the arrays
  // belong to handle_.
  const uint8_t* bytes_ = nullptr;
  const uint32_t* offsets_ = nullptr;
  const uint8_t* special_ = nullptr;
  uint32_t vocab_size_ = 0;
  Utf8Replacement replacement_ = Utf8Replacement::kPerSubpart;
  std::vector<TokenId> eos_token_ids_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_TEXT_TOKENIZER_H_
