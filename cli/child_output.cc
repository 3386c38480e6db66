#include "cli/child_output.h"

#include <fcntl.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <cerrno>

#include "cli/terminal.h"

namespace lockstep {
namespace {

size_t TerminalColumns() {
  winsize size = {};
  return ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 ? size.ws_col : 0;
}

// A terminal that is gone takes nothing, and its owner is told by SIGHUP.
void WriteAll(std::string_view text) {
  while (!text.empty()) {
    const ssize_t written = write(STDERR_FILENO, text.data(), text.size());
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) return;
    text.remove_prefix(static_cast<size_t>(written));
  }
}

}  // namespace

ChildOutput::ChildOutput(size_t num_children) : board_(num_children) {
  if (!StderrIsTerminal()) return;
  for (size_t i = 0; i < num_children; ++i) {
    int fds[2];
    if (pipe2(fds, O_CLOEXEC) != 0) break;
    // Only our end: a child that writes faster than the terminal takes waits, as it
    // would at the terminal.
    fcntl(fds[0], F_SETFL, O_NONBLOCK);
    pipes_.push_back({fds[0], fds[1]});
  }
  if (pipes_.size() == num_children) return;
  // Without the descriptors for all, the children share the terminal as it is.
  for (const Pipe& pipe : pipes_) close(pipe.read), close(pipe.write);
  pipes_.clear();
}

ChildOutput::~ChildOutput() {
  Relay();
  for (const Pipe& pipe : pipes_) close(pipe.read), close(pipe.write);
}

std::vector<int> ChildOutput::read_fds() const {
  std::vector<int> fds;
  fds.reserve(pipes_.size());
  for (const Pipe& pipe : pipes_) fds.push_back(pipe.read);
  return fds;
}

void ChildOutput::Take(size_t child) {
  char bytes[4096];
  // No more than a pipe holds: a child that never stops does not keep us here.
  for (int i = 0; i < 16; ++i) {
    const ssize_t size = read(pipes_[child].read, bytes, sizeof(bytes));
    if (size < 0 && errno == EINTR) continue;
    if (size <= 0) return;
    WriteAll(board_.Feed(child, {bytes, static_cast<size_t>(size)}, TerminalColumns()));
  }
}

void ChildOutput::Relay() {
  for (size_t child = 0; child < pipes_.size(); ++child) Take(child);
}

void ChildOutput::Close(size_t child) {
  if (pipes_.empty()) return;
  Take(child);
  WriteAll(board_.Close(child, TerminalColumns()));
}

void ChildOutput::BeforeOwnLine() {
  Relay();
  WriteAll(board_.Hide());
}

}  // namespace lockstep
