// One terminal for the output of several processes. What a process has ended with
// a newline scrolls by as it would alone; a line that it redraws (begun again with
// a carriage return: a progress bar) stands below all that, one line a process:
//
//     2026-11-21T11:40:00.120 info [rank 1] ...
//     rank 0 [############                  ] 1.02 of 2.50 GiB, 1.1 GB/s
//     rank 1 [#######                       ] 0.61 of 2.50 GiB, 0.7 GB/s
//
// Pure: takes bytes as they come, in pieces of any size, and returns the bytes for
// the terminal. Nothing else may write there while lines stand. One thread.
#ifndef LOCKSTEP_CLI_OUTPUT_BOARD_H_
#define LOCKSTEP_CLI_OUTPUT_BOARD_H_

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace lockstep {

class OutputBoard {
 public:
  explicit OutputBoard(size_t num_sources) : sources_(num_sources) {}

  // `columns`: the terminal's width; a redrawn line is cut to fit, so that it
  // stays one line. 0: unknown, nothing is cut.
  std::string Feed(size_t source, std::string_view bytes, size_t columns);
  // The source says no more; what it had not ended becomes a line.
  std::string Close(size_t source, size_t columns);
  // Takes the bars away, so that the owner can write a line of its own; they are
  // back with the next Feed or Close.
  std::string Hide();

  // A line longer than this is passed on in pieces of it.
  static constexpr size_t kMaxLineBytes = 64 * 1024;

 private:
  struct Source {
    std::string line;       // since the last newline, or what came over it
    bool carriage = false;  // a carriage return that nothing has followed yet
    bool redraws = false;   // the line has been begun again: it stands
  };

  static void Take(Source& source, std::string_view bytes, std::string* ended);
  // Erases the lines that stand, adds `ended` and draws them again.
  std::string Draw(std::string_view ended, size_t columns);

  std::vector<Source> sources_;
  size_t num_standing_ = 0;
};

}  // namespace lockstep

#endif  // LOCKSTEP_CLI_OUTPUT_BOARD_H_
