// The one limits table, read by every door. docs/api.md has it for people.
// A value at a limit is accepted, one beyond it is refused before anything of
// its size is allocated.
#ifndef LOCKSTEP_COORDINATOR_API_LIMITS_H_
#define LOCKSTEP_COORDINATOR_API_LIMITS_H_

#include <cstddef>
#include <cstdint>

namespace lockstep::limits {

// Transport.
inline constexpr size_t kHttpHeaderBytes = 16 * 1024;  // 431 beyond
inline constexpr size_t kBodyBytes = 8 * 1024 * 1024;  // 413 beyond; gRPC messages likewise
inline constexpr size_t kBodyBytesInFlight = 16 * 1024 * 1024;  // of all connections; 503 beyond
inline constexpr uint32_t kHttpConnections = 2048;              // for one more an idle one goes
inline constexpr int kHttpHeaderSeconds = 10;                   // from a request's first byte
inline constexpr int kHttpBodySeconds = 60;                     // from the end of its header
inline constexpr int kHttpIdleSeconds = 75;                     // between requests
inline constexpr int kHttpWriteSeconds = 60;  // a client that reads nothing for so long is gone
inline constexpr int kSsePingSeconds = 15;   // a stream without a token for so long shows a comment
inline constexpr int kGrpcPingSeconds = 60;  // a gRPC connection silent for so long is asked
inline constexpr int kGrpcAnswerSeconds = 20;  // ... and is gone when it does not answer in this
// gRPC clients may ping an idle connection so often, and twice oftener; then
// ENHANCE_YOUR_CALM. Half of the shortest interval in use, so that no jitter counts.
inline constexpr int kGrpcClientPingSeconds = 5;
inline constexpr int kJsonDepth = 64;
inline constexpr size_t kJsonValues = 1 << 19;

// A request.
inline constexpr size_t kIdentifierBytes = 128;  // printable ASCII
inline constexpr size_t kPromptsPerBatch = 128;
inline constexpr uint32_t kMaxN = 16;
inline constexpr size_t kBatchTimesN = 256;
inline constexpr int32_t kLogprobs = 20;  // logprobs, top_logprobs, prompt_logprobs
// Log-probabilities of prompts, alternatives counted. An entry takes most of a KiB on its way.
inline constexpr uint64_t kPromptLogprobs = 1 << 20;          // of a request's prompts together
inline constexpr uint64_t kPromptLogprobsInFlight = 1 << 21;  // of all requests; 429 beyond
inline constexpr size_t kStopStrings = 16;
inline constexpr size_t kStopStringBytes = 256;
inline constexpr size_t kStopTokenIds = 64;
inline constexpr size_t kLogitBiasEntries = 1024;
inline constexpr float kLogitBias = 100.0f;        // [-100, 100]
inline constexpr float kTemperature = 2.0f;        // [0, 2]
inline constexpr float kTopP = 1.0f;               // (0, 1]
inline constexpr float kMinP = 1.0f;               // [0, 1]
inline constexpr float kPenalty = 2.0f;            // presence, frequency [-2, 2]
inline constexpr float kRepetitionPenalty = 2.0f;  // (0, 2]
inline constexpr size_t kChatMessages = 1024;
inline constexpr size_t kTools = 128;
inline constexpr size_t kToolValues =
    16 * 1024;                                // JSON values in all tools; a template's variables
inline constexpr size_t kToolNameBytes = 64;  // [A-Za-z0-9_-]
// Of a Tokenize call, where twice max-model-len is not more.
inline constexpr size_t kTokenizeTokens = 32 * 1024;

// An echoed value is cut here.
inline constexpr size_t kEchoedCharacters = 64;

}  // namespace lockstep::limits

#endif  // LOCKSTEP_COORDINATOR_API_LIMITS_H_
