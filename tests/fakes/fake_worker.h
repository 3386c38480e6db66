// A worker for tests of the coordinator: speaks Attach over a real gRPC stream
// and computes with FakeSlots. Can die, hang, lie and misbehave on request.
// Thread-safe; every wait is for a condition, with a bound.
#ifndef LOCKSTEP_TESTS_FAKES_FAKE_WORKER_H_
#define LOCKSTEP_TESTS_FAKES_FAKE_WORKER_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "proto/worker.pb.h"

namespace lockstep {

struct FakeWorkerOptions {
  std::string address;
  std::string backend = "cpu";
  std::string host = "host";
  std::string instance;           // empty: unique
  uint32_t pid = 0;               // 0: unique
  uint32_t protocol_version = 0;  // 0: the right one
  int preferred_rank = -1;
  bool release = true;       // answer CloseEpoch
  bool load = true;          // answer Configure; otherwise stay silent about it
  std::string load_failure;  // answer Configure with this Failure
  bool load_recoverable = false;
  uint64_t weight_bytes = 1 << 20;
};

class FakeWorker {
 public:
  explicit FakeWorker(FakeWorkerOptions options);
  ~FakeWorker();  // cuts the stream if it is still open

  // As SIGKILL would: the connection is gone.
  void Die();
  // As SIGSTOP would: no heartbeat, no answer, nothing read; the connection stays.
  void Freeze();
  void Thaw();

  // Of the steps from now on:
  void HoldResults(bool hold);  // compute, but do not answer (heartbeats go on)
  void LieAboutDigest(bool lie);
  void SkipACollective(bool skip);  // report one collective less
  void FailNextStep(int code, const std::string& message, bool recoverable);
  void SendGarbage();

  bool WaitForEpoch(uint64_t epoch);  // configured for it, or a later one
  bool WaitForClose(uint64_t epoch);  // was told to close it
  bool WaitForSteps(uint64_t steps);  // executed in the current epoch
  bool WaitForEnd();                  // the stream has ended
  bool WaitForKey(const std::string& key, std::string* value);
  void PublishKey(const std::string& key, const std::string& value);

  worker::v1::Configure configure() const;  // the last one
  std::string refusal() const;
  bool told_to_shut_down() const;
  uint32_t pid() const;
  std::vector<std::string> plans() const;  // serialised, of the current epoch
  std::string complaint() const;           // of FakeSlots

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_TESTS_FAKES_FAKE_WORKER_H_
