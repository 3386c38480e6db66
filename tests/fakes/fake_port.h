// The world as the group machine sees it, recorded: what each stream was sent,
// which were ended, what was posted. One thread.
#ifndef LOCKSTEP_TESTS_FAKES_FAKE_PORT_H_
#define LOCKSTEP_TESTS_FAKES_FAKE_PORT_H_

#include <map>
#include <set>
#include <utility>
#include <variant>
#include <vector>

#include "coordinator/group/group_port.h"

namespace lockstep {

class FakePort final : public GroupPort {
 public:
  void Send(absl::Span<const StreamId> to, const worker::v1::CoordinatorMessage& message) override {
    for (const StreamId stream : to) sent[stream].push_back(message);
  }
  void Close(StreamId stream) override { closed.insert(stream); }
  void Abort(StreamId stream) override { aborted.insert(stream); }
  void Post(GroupEvent event) override { posted.push_back(std::move(event)); }

  // The last message of a kind sent to a stream; null: none.
  const worker::v1::CoordinatorMessage* Last(
      StreamId stream, worker::v1::CoordinatorMessage::MessageCase kind) const {
    const worker::v1::CoordinatorMessage* last = nullptr;
    const auto it = sent.find(stream);
    if (it == sent.end()) return nullptr;
    for (const auto& message : it->second) {
      if (message.message_case() == kind) last = &message;
    }
    return last;
  }
  size_t Count(StreamId stream, worker::v1::CoordinatorMessage::MessageCase kind) const {
    size_t count = 0;
    const auto it = sent.find(stream);
    if (it == sent.end()) return 0;
    for (const auto& message : it->second) count += message.message_case() == kind ? 1 : 0;
    return count;
  }
  template <typename Event>
  std::vector<Event> Posted() const {
    std::vector<Event> events;
    for (const GroupEvent& event : posted) {
      if (const Event* e = std::get_if<Event>(&event)) events.push_back(*e);
    }
    return events;
  }

  std::map<StreamId, std::vector<worker::v1::CoordinatorMessage>> sent;
  std::set<StreamId> closed, aborted;
  std::vector<GroupEvent> posted;
};

}  // namespace lockstep

#endif  // LOCKSTEP_TESTS_FAKES_FAKE_PORT_H_
