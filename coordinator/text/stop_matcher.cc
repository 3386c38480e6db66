#include "coordinator/text/stop_matcher.h"

#include <cstdint>
#include <utility>

namespace lockstep {

StopMatcher::StopMatcher(std::vector<std::string> stops, bool include_stop_string)
    : stops_(std::move(stops)), include_stop_string_(include_stop_string) {
  for (const std::string& stop : stops_) {
    if (!stop.empty()) first_bytes_.set(static_cast<uint8_t>(stop[0]));
  }
}

StopMatcher::Output StopMatcher::Push(std::string_view delta) {
  if (matched_) return {"", matched_};
  if (first_bytes_.none()) return {std::string(delta), std::nullopt};
  held_ += delta;
  return Scan(/*at_end=*/false);
}

StopMatcher::Output StopMatcher::Flush() {
  if (matched_) return {"", matched_};
  return Scan(/*at_end=*/true);
}

StopMatcher::Output StopMatcher::Scan(bool at_end) {
  const std::string_view seen = held_;
  size_t begin = 0;
  for (; begin < seen.size(); ++begin) {
    if (!first_bytes_[static_cast<uint8_t>(seen[begin])]) continue;
    const std::string_view rest = seen.substr(begin);
    bool may_match = false;
    for (size_t i = 0; i < stops_.size(); ++i) {
      const std::string& stop = stops_[i];
      if (stop.empty()) continue;
      if (rest.size() < stop.size()) {
        may_match |= stop.compare(0, rest.size(), rest) == 0;
      } else if (rest.compare(0, stop.size(), stop) == 0 &&
                 (!matched_ || stop.size() < stops_[*matched_].size())) {
        matched_ = i;
      }
    }
    if (matched_) {
      const size_t end = begin + (include_stop_string_ ? stops_[*matched_].size() : 0);
      Output out{held_.substr(0, end), matched_};
      held_.clear();
      return out;
    }
    if (may_match && !at_end) break;
  }
  Output out{held_.substr(0, begin), std::nullopt};
  held_.erase(0, begin);
  return out;
}

}  // namespace lockstep
