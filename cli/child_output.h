// The terminal of a process that has children with something to say: each child
// writes its stderr into a pipe of its own, and the owner puts all of it on the
// terminal, progress bars one below the other (output_board.h). Where stderr is no
// terminal there are no pipes: the children inherit it. One thread.
//
//   ChildOutput output(2);
//   options.stderr_fd = output.write_fd(0);    // of child 0, every life of it
//   ... poll(output.read_fds()) ...; output.Relay();
//   waitpid(...); output.Close(0);             // its last words, before ours
#ifndef LOCKSTEP_CLI_CHILD_OUTPUT_H_
#define LOCKSTEP_CLI_CHILD_OUTPUT_H_

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include "cli/output_board.h"

namespace lockstep {

class ChildOutput {
 public:
  explicit ChildOutput(size_t num_children);
  ~ChildOutput();
  ChildOutput(const ChildOutput&) = delete;
  ChildOutput& operator=(const ChildOutput&) = delete;

  int write_fd(size_t child) const { return pipes_.empty() ? -1 : pipes_[child].write; }
  std::vector<int> read_fds() const;

  // Puts what the children have written by now on the terminal; never waits for more.
  void Relay();
  // A child has ended.
  void Close(size_t child);
  // Call it before a line of one's own on stderr: what the children said earlier
  // comes first, and no bar is in the way.
  void BeforeOwnLine();

 private:
  struct Pipe {
    int read = -1, write = -1;
  };

  void Take(size_t child);

  std::vector<Pipe> pipes_;
  OutputBoard board_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_CLI_CHILD_OUTPUT_H_
