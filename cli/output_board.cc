#include "cli/output_board.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "common/check.h"

namespace lockstep {
namespace {

// The cursor stands at the start of the line below the bars, always.
std::string Erase(size_t lines_above) { return absl::StrCat("\033[", lines_above, "A\033[J"); }

// A process that redraws its line erases what a longer one left there; on the
// board that is our work.
std::string Plain(const std::string& line) { return absl::StrReplaceAll(line, {{"\033[K", ""}}); }

// One row of the terminal. An escape sequence that has not come whole waits for
// its rest. The last column stays free: what a terminal does after a character
// there differs.
std::string Row(std::string line, size_t columns) {
  line.resize(std::min(line.find('\033'), line.size()));
  if (columns == 0 || line.size() < columns) return line;
  size_t end = columns - 1;
  while (end > 0 && (static_cast<unsigned char>(line[end]) & 0xc0) == 0x80) --end;
  line.resize(end);
  return line;
}

}  // namespace

void OutputBoard::Take(Source& source, std::string_view bytes, std::string* ended) {
  for (const char c : bytes) {
    if (c == '\r') {
      source.carriage = true;
      continue;
    }
    if (c == '\n') {
      absl::StrAppend(ended, Plain(source.line), "\n");
      source = Source();
      continue;
    }
    if (std::exchange(source.carriage, false)) {
      source.line.clear();
      source.redraws = true;
    } else if (source.line.size() == kMaxLineBytes) {
      absl::StrAppend(ended, Plain(source.line), "\n");
      source = Source();
    }
    source.line += c;
  }
}

std::string OutputBoard::Draw(std::string_view ended, size_t columns) {
  std::string out = Hide();
  out.append(ended);
  for (const Source& source : sources_) {
    if (!source.redraws) continue;
    absl::StrAppend(&out, Row(Plain(source.line), columns), "\n");
    ++num_standing_;
  }
  return out;
}

std::string OutputBoard::Feed(size_t source, std::string_view bytes, size_t columns) {
  LOCKSTEP_CHECK(source < sources_.size());
  std::string ended;
  Take(sources_[source], bytes, &ended);
  if (ended.empty() && !sources_[source].redraws) return "";
  return Draw(ended, columns);
}

std::string OutputBoard::Close(size_t source, size_t columns) {
  LOCKSTEP_CHECK(source < sources_.size());
  if (sources_[source].line.empty()) return "";
  return Feed(source, "\n", columns);
}

std::string OutputBoard::Hide() {
  if (num_standing_ == 0) return "";
  return Erase(std::exchange(num_standing_, 0));
}

}  // namespace lockstep
