// The border between std::string_view, which our interfaces use, and
// absl::string_view, which is another type in distribution builds of Abseil.
#ifndef LOCKSTEP_MODEL_STRINGS_H_
#define LOCKSTEP_MODEL_STRINGS_H_

#include <string_view>

#include "absl/strings/string_view.h"

namespace lockstep {

inline absl::string_view AbslView(std::string_view text) { return {text.data(), text.size()}; }

}  // namespace lockstep

#endif  // LOCKSTEP_MODEL_STRINGS_H_
