// Turns the generated tokens of one sequence into text as they come.
//
// Each token has its bytes, whatever stands around it (Tokenizer::TokenBytes),
// so a Push costs the length of one token and the state is at most three bytes
// of an unfinished character: there is no window of earlier ids to decode again.
//
//   Detokenizer detokenizer(tokenizer, /*skip_special_tokens=*/true);
//   for (TokenId id : generated) Emit(detokenizer.Push(id));
//   Emit(detokenizer.Finish());
//
// All Push and Finish joined equal Tokenizer::DecodeAnswer of the ids. One per
// sequence; not thread-safe.
#ifndef LOCKSTEP_COORDINATOR_TEXT_DETOKENIZER_H_
#define LOCKSTEP_COORDINATOR_TEXT_DETOKENIZER_H_

#include <cstddef>
#include <memory>
#include <string>

#include "common/ids.h"
#include "coordinator/text/tokenizer.h"
#include "coordinator/text/utf8.h"

namespace lockstep {

class Detokenizer {
 public:
  Detokenizer(std::shared_ptr<const Tokenizer> tokenizer, bool skip_special_tokens);

  // The text that this token makes certain: whole UTF-8 characters, the space
  // before the first word kept. Often "" inside a character or for a special
  // token that is skipped; an unknown id is "".
  std::string Push(TokenId id);
  // The answer ends: U+FFFD if it ends inside a character, else "". (Decoders
  // with byte fallback show one U+FFFD for each byte of the unfinished character.)
  std::string Finish();

  // Bytes held back for a character not yet whole, at most 3.
  size_t held_bytes() const { return stream_.held_bytes(); }

 private:
  std::shared_ptr<const Tokenizer> tokenizer_;
  bool skip_special_tokens_;
  Utf8Stream stream_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_TEXT_DETOKENIZER_H_
