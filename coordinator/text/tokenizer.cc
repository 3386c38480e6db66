#include "coordinator/text/tokenizer.h"

#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/check.h"
#include "coordinator/text/ffi/lockstep_text.h"
#include "coordinator/text/internal/ffi.h"

namespace lockstep {
namespace {

constexpr size_t kMaxTokenizerBytes = size_t{512} << 20;

}  // namespace

absl::StatusOr<std::shared_ptr<const Tokenizer>> Tokenizer::Load(const std::string& model_dir) {
  LOCKSTEP_CHECK(lockstep_text_abi() == LOCKSTEP_TEXT_ABI);
  const std::string path = absl::StrCat(model_dir, "/tokenizer.json");
  absl::StatusOr<std::string> json = ReadModelFile(path, kMaxTokenizerBytes);
  if (absl::IsNotFound(json.status())) {
    return absl::NotFoundError(absl::StrCat(
        std::string(json.status().message()),
        " (the model needs a Hugging Face tokenizer.json; tokenizer.model and vocab.json are not "
        "read)"));
  }
  if (!json.ok()) return json.status();
  absl::StatusOr<TokenizerConfig> config = TokenizerConfig::Load(model_dir);
  if (!config.ok()) return config.status();

  std::shared_ptr<Tokenizer> tokenizer(new Tokenizer);
  tokenizer->config_ = *std::move(config);
  const std::string& added = tokenizer->config_.added_tokens_json;
  ffi::Text error;
  ffi::Call call;
  LockstepTextStatus status = lockstep_tokenizer_new(
      json->data(), json->size(), added.data(), added.size(), &tokenizer->handle_, error.out());
  if (status != LOCKSTEP_TEXT_OK) {
    // Whatever the file made the library do, the file is what is wrong.
    return ffi::ToStatus(LOCKSTEP_TEXT_INVALID, path, error);
  }
  LockstepTokenTable table;
  status = lockstep_tokenizer_table(tokenizer->handle_, &table, error.out());
  LOCKSTEP_CHECK(status == LOCKSTEP_TEXT_OK);
  tokenizer->bytes_ = table.bytes;
  tokenizer->offsets_ = table.offsets;
  tokenizer->special_ = table.special;
  tokenizer->vocab_size_ = table.size;
  tokenizer->replacement_ =
      table.replace_per_byte ? Utf8Replacement::kPerByte : Utf8Replacement::kPerSubpart;
  if (std::optional<TokenId> eos = tokenizer->TokenToId(tokenizer->eos_token())) {
    tokenizer->eos_token_ids_.push_back(*eos);
  }
  return tokenizer;
}

Tokenizer::~Tokenizer() {
  ffi::Call call;
  lockstep_tokenizer_free(handle_);
}

absl::StatusOr<std::vector<TokenId>> Tokenizer::Encode(std::string_view text,
                                                       bool add_special_tokens) const {
  LockstepIds ids;
  ffi::Text error;
  ffi::Call call;
  const LockstepTextStatus status = lockstep_tokenizer_encode(
      handle_, text.data(), text.size(), add_special_tokens, &ids, error.out());
  if (status != LOCKSTEP_TEXT_OK) return ffi::ToStatus(status, "text", error);
  std::vector<TokenId> result(ids.data, ids.data + ids.size);
  lockstep_ids_free(ids);
  return result;
}

std::string Tokenizer::Decode(absl::Span<const TokenId> ids, bool skip_special_tokens) const {
  ffi::Text text, error;
  ffi::Call call;
  // A decoder that fails on these ids has no text for them.
  lockstep_tokenizer_decode(handle_, ids.data(), ids.size(), skip_special_tokens, text.out(),
                            error.out());
  return text.str();
}

std::string Tokenizer::DecodeAnswer(absl::Span<const TokenId> ids, bool skip_special_tokens) const {
  std::string text;
  Utf8Stream stream(replacement_);
  for (const TokenId id : ids) {
    if (skip_special_tokens && IsSpecial(id)) continue;
    stream.Push(TokenBytes(id), &text);
  }
  stream.Finish(&text);
  return text;
}

std::string Tokenizer::TokenText(TokenId id) const {
  return DecodeAnswer({id}, /*skip_special_tokens=*/false);
}

std::string_view Tokenizer::TokenBytes(TokenId id) const {
  if (id >= vocab_size_) return {};
  return {reinterpret_cast<const char*>(bytes_) + offsets_[id], offsets_[id + 1] - offsets_[id]};
}

std::optional<TokenId> Tokenizer::TokenToId(std::string_view token) const {
  TokenId id = 0;
  ffi::Call call;
  if (lockstep_tokenizer_token_to_id(handle_, token.data(), token.size(), &id) !=
      LOCKSTEP_TEXT_OK) {
    return std::nullopt;
  }
  return id;
}

bool Tokenizer::IsSpecial(TokenId id) const { return id < vocab_size_ && special_[id] != 0; }

}  // namespace lockstep
