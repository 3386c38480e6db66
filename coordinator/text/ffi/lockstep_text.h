// The C ABI of the Rust crate `lockstep-text`: a tokenizer (Hugging Face
// `tokenizers`) and chat templates (minijinja). Called by coordinator/text
// alone; everybody else uses its C++ classes.
//
// Rules that hold for every function:
//   - It may be called from any thread; a handle may be used by many at once.
//   - No input makes it unwind into the caller or read outside the given
//     ranges; text is (pointer, length), any bytes, NULL allowed where length is 0.
//   - LOCKSTEP_TEXT_OK, and the result is in *out, to be freed by the caller; or
//     another status, *out is empty and *error, if `error` is not NULL, is one
//     line of UTF-8, to be freed by the caller.
//   - A *_free function accepts NULL and empty values.
// New abilities (grammars, say) come as new functions and handle types; a change
// to an existing one raises LOCKSTEP_TEXT_ABI.
#ifndef LOCKSTEP_COORDINATOR_TEXT_FFI_LOCKSTEP_TEXT_H_
#define LOCKSTEP_COORDINATOR_TEXT_FFI_LOCKSTEP_TEXT_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define LOCKSTEP_TEXT_ABI 1u

typedef int32_t LockstepTextStatus;
enum {
  LOCKSTEP_TEXT_OK = 0,
  LOCKSTEP_TEXT_INVALID = 1,  // the input is not acceptable; *error says why
  LOCKSTEP_TEXT_RAISED = 2,   // the template called raise_exception; *error is its message
  LOCKSTEP_TEXT_LIMIT = 3,    // a bound on work or output was reached
  LOCKSTEP_TEXT_BUG = 4,      // the library failed on this input (a caught panic)
};

typedef struct LockstepTokenizer LockstepTokenizer;
typedef struct LockstepTemplate LockstepTemplate;

// Owned by the caller. `data` is not NUL-terminated.
typedef struct {
  char* data;
  size_t size;
} LockstepText;

typedef struct {
  uint32_t* data;
  size_t size;
} LockstepIds;

// Every token's bytes as they count inside an answer (see tokenizer.h). Token
// id's are bytes[offsets[id] .. offsets[id + 1]); `offsets` has size + 1 entries,
// `special` one byte (0 or 1) for each id. Owned by the tokenizer.
typedef struct {
  const uint8_t* bytes;
  const uint32_t* offsets;
  const uint8_t* special;
  uint32_t size;
  // 1: invalid UTF-8 is replaced byte by byte (byte fallback), 0: piece by piece.
  uint8_t replace_per_byte;
} LockstepTokenTable;

uint32_t lockstep_text_abi(void);
void lockstep_text_free(LockstepText text);
void lockstep_ids_free(LockstepIds ids);

// `json`: a tokenizer.json. `added`: a JSON array of added tokens that are to
// exist besides, as TokenizerConfig::added_tokens_json describes it.
LockstepTextStatus lockstep_tokenizer_new(const char* json, size_t json_size, const char* added,
                                          size_t added_size, LockstepTokenizer** out,
                                          LockstepText* error);
void lockstep_tokenizer_free(LockstepTokenizer* tokenizer);
LockstepTextStatus lockstep_tokenizer_table(const LockstepTokenizer* tokenizer,
                                            LockstepTokenTable* out, LockstepText* error);
// `text` must be UTF-8.
LockstepTextStatus lockstep_tokenizer_encode(const LockstepTokenizer* tokenizer, const char* text,
                                             size_t text_size, uint8_t add_special_tokens,
                                             LockstepIds* out, LockstepText* error);
LockstepTextStatus lockstep_tokenizer_decode(const LockstepTokenizer* tokenizer,
                                             const uint32_t* ids, size_t num_ids,
                                             uint8_t skip_special_tokens, LockstepText* out,
                                             LockstepText* error);
// LOCKSTEP_TEXT_INVALID, without an error text, when there is no such token.
LockstepTextStatus lockstep_tokenizer_token_to_id(const LockstepTokenizer* tokenizer,
                                                  const char* token, size_t token_size,
                                                  uint32_t* out);

// Compiles a chat template.
LockstepTextStatus lockstep_template_new(const char* source, size_t source_size,
                                         LockstepTemplate** out, LockstepText* error);
void lockstep_template_free(LockstepTemplate* chat_template);
// `context`: a JSON object, the template's variables. `unix_seconds`: what
// strftime_now reads, shown in the process's time zone. `max_steps`: template
// instructions, of which 500,000 is the most allowed; `max_output`: bytes.
LockstepTextStatus lockstep_template_render(const LockstepTemplate* chat_template,
                                            const char* context, size_t context_size,
                                            int64_t unix_seconds, uint64_t max_steps,
                                            size_t max_output, LockstepText* out,
                                            LockstepText* error);

#ifdef __cplusplus
}  // extern "C"
#endif

#endif  // LOCKSTEP_COORDINATOR_TEXT_FFI_LOCKSTEP_TEXT_H_
