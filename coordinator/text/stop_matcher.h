// Finds stop strings in text that arrives in pieces, cuts the text exactly
// there, and holds back only what may still turn out to be (part of) a match.
//
// The match is the occurrence that begins first in the whole text; of stops
// that begin at the same place, the one complete first, i.e. the shortest. So
// the result depends on the text alone, never on where the pieces were cut.
// One consequence: where a stop lies inside a longer one ("bc" in "abcd"), text
// that may still become the longer one is awaited before the shorter counts.
//
//   StopMatcher matcher({"\n\n", "User:"}, /*include_stop_string=*/false);
//   auto out = matcher.Push(delta);   // emit out.text; out.matched ends the answer
//   ...
//   out = matcher.Flush();            // the answer ended another way
//
// Empty stops never match. One per sequence; not thread-safe.
#ifndef LOCKSTEP_COORDINATOR_TEXT_STOP_MATCHER_H_
#define LOCKSTEP_COORDINATOR_TEXT_STOP_MATCHER_H_

#include <bitset>
#include <cstddef>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace lockstep {

class StopMatcher {
 public:
  struct Output {
    std::string text;               // to emit, already cut
    std::optional<size_t> matched;  // index into stops
  };

  // With include_stop_string the text is cut after the match, else before it.
  StopMatcher(std::vector<std::string> stops, bool include_stop_string);

  // After a match the answer is over: further calls emit nothing and repeat
  // `matched`.
  Output Push(std::string_view delta);
  // No more text follows: what was held back is emitted, or matches now.
  Output Flush();

  size_t held_bytes() const { return held_.size(); }

 private:
  Output Scan(bool at_end);

  std::vector<std::string> stops_;
  bool include_stop_string_;
  std::bitset<256> first_bytes_;
  // Seen and not emitted; begins with a proper prefix of a stop, or is empty.
  std::string held_;
  std::optional<size_t> matched_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_TEXT_STOP_MATCHER_H_
