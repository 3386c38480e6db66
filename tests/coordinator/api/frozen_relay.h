// A TCP relay between a client and a door that can stop in the middle of a
// stream, with every socket still open: no FIN and no reset tell of it.
//
//   FrozenRelay relay(server_->http_port());
//   RawClient client(relay.port());  ...
//   relay.Freeze();   // its host still acknowledges; nobody reads or answers
//   relay.Vanish();   // its host is silent: not even an acknowledgement comes
#ifndef LOCKSTEP_TESTS_COORDINATOR_API_FROZEN_RELAY_H_
#define LOCKSTEP_TESTS_COORDINATOR_API_FROZEN_RELAY_H_

#include <atomic>
#include <cstddef>
#include <map>
#include <thread>

namespace lockstep {

class FrozenRelay {
 public:
  explicit FrozenRelay(int target_port);
  ~FrozenRelay();
  FrozenRelay(const FrozenRelay&) = delete;
  FrozenRelay& operator=(const FrozenRelay&) = delete;

  int port() const { return port_; }
  void Freeze();
  void Vanish();

  // Of all connections so far. The waits are bounded, and false is a failure.
  size_t from_server() const { return from_server_; }
  size_t from_client() const { return from_client_; }
  bool WaitFromServer(size_t bytes) const;
  bool WaitFromClient(size_t bytes) const;

 private:
  void Run();
  void Accept();
  // False when either side has ended.
  bool Forward(int from);
  void Stop();  // ends Run, which may be over

  const int target_port_;
  int listener_ = -1;
  int wake_[2] = {-1, -1};
  int port_ = 0;
  std::map<int, int> peer_;     // both directions; of Run, then of whoever stopped it
  std::map<int, bool> server_;  // whether a socket is the door's side
  std::atomic<size_t> from_server_ = 0, from_client_ = 0;
  std::thread thread_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_TESTS_COORDINATOR_API_FROZEN_RELAY_H_
