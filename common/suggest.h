// "did you mean": the known word nearest to a mistyped one.
#ifndef LOCKSTEP_COMMON_SUGGEST_H_
#define LOCKSTEP_COMMON_SUGGEST_H_

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace lockstep {

// Edits (insert, delete, replace, swap of neighbours) between two words.
int EditDistance(std::string_view a, std::string_view b);

// Nothing when no word is within a third of the typed word's length (at least 1).
std::optional<std::string> NearestWord(std::string_view typed,
                                       const std::vector<std::string>& words);

}  // namespace lockstep

#endif  // LOCKSTEP_COMMON_SUGGEST_H_
