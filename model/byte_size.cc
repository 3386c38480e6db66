#include "model/byte_size.h"

#include <cctype>
#include <cmath>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "model/json.h"
#include "model/strings.h"

namespace lockstep {
namespace {

struct Unit {
  std::string_view name;  // in lower case
  double bytes;
};
constexpr Unit kUnits[] = {
    {"", 1},      {"b", 1},        {"kb", 1e3},     {"mb", 1e6},     {"gb", 1e9},
    {"tb", 1e12}, {"kib", 0x1p10}, {"mib", 0x1p20}, {"gib", 0x1p30}, {"tib", 0x1p40},
};
constexpr double kMaxBytes = 0x1p60;

}  // namespace

absl::StatusOr<int64_t> ParseByteSize(std::string_view text) {
  const auto bad = [&] {
    return absl::InvalidArgumentError(absl::StrCat("\"", Printable(text),
                                                   "\" is not a size of memory; expected a number "
                                                   "and a unit, as in 80GiB, 80GB or 512MiB"));
  };
  const size_t digits = std::min(text.find_first_not_of("0123456789."), text.size());
  const std::string unit =
      absl::AsciiStrToLower(std::string(absl::StripAsciiWhitespace(AbslView(text.substr(digits)))));
  double number = 0;
  if (digits == 0 || digits > 20 || !absl::SimpleAtod(AbslView(text.substr(0, digits)), &number)) {
    return bad();
  }
  for (const Unit& known : kUnits) {
    if (unit != known.name) continue;
    const double bytes = std::floor(number * known.bytes);
    if (!(bytes >= 1) || bytes > kMaxBytes) return bad();
    return static_cast<int64_t>(bytes);
  }
  return bad();
}

std::string FormatBytes(int64_t bytes) {
  constexpr std::string_view kNames[] = {"KiB", "MiB", "GiB", "TiB"};
  if (bytes < 1024) return absl::StrCat(bytes, " B");
  double value = static_cast<double>(bytes) / 1024;
  size_t unit = 0;
  while (value >= 1024 && unit + 1 < std::size(kNames)) {
    value /= 1024;
    ++unit;
  }
  return absl::StrFormat("%.2f %s", value, std::string(kNames[unit]));
}

}  // namespace lockstep
