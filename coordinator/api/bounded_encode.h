// Text to token ids in bounded memory. A tokenizer spends some 250 bytes a byte of
// text, so one body of 8 MiB would cost 2 GB before anybody could say that it is
// too long. Here a long text is first counted piece by piece and given up as soon
// as it is beyond doubt too long; only what may fit is tokenised whole, one long
// text at a time.
#ifndef LOCKSTEP_COORDINATOR_API_BOUNDED_ENCODE_H_
#define LOCKSTEP_COORDINATOR_API_BOUNDED_ENCODE_H_

#include <cstddef>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "common/ids.h"
#include "coordinator/text/tokenizer.h"

namespace lockstep {

// Texts up to this size are simply tokenised.
inline constexpr size_t kShortTextBytes = 64 * 1024;

// The ids of `text`, exactly as Tokenizer::Encode gives them. OutOfRange, with a
// message that says how long it is at least, for a text of clearly more than
// `max_tokens`; one that is a little longer may be returned whole, so the caller
// checks the size. Thread-safe.
absl::StatusOr<std::vector<TokenId>> BoundedEncode(const Tokenizer& tokenizer,
                                                   std::string_view text, bool add_special_tokens,
                                                   size_t max_tokens);

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_API_BOUNDED_ENCODE_H_
