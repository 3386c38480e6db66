// The worker group over gRPC: the group machine (which decides), the attach
// server (which speaks) and a clock, under one mutex. Thread-safe as
// WorkerGroup says. The private plane's only clock is here.
#ifndef LOCKSTEP_COORDINATOR_GROUP_GRPC_WORKER_GROUP_H_
#define LOCKSTEP_COORDINATOR_GROUP_GRPC_WORKER_GROUP_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "common/tls_files.h"
#include "coordinator/group/group_options.h"
#include "coordinator/group_watch.h"
#include "coordinator/worker_group.h"

namespace lockstep {

class GrpcWorkerGroup final : public WorkerGroup, public GroupWatch {
 public:
  // Listens on `address` (HOST:PORT or unix:PATH) at once; events wait for Start.
  // With `tls` (wire/plane_tls.h) both sides show certificates.
  static absl::StatusOr<std::unique_ptr<GrpcWorkerGroup>> Listen(const std::string& address,
                                                                 GroupOptions options,
                                                                 const TlsFiles& tls = {});
  ~GrpcWorkerGroup() override;

  // What workers dial, with the real port.
  const std::string& address() const;

  void Start(EventSink sink) override;
  void Send(const StepPlan& plan) override;
  void FailEpoch(uint64_t epoch, const absl::Status& reason) override;
  void Shutdown() override;

  std::vector<DeviceFigures> Devices() override;
  absl::StatusOr<std::string> Profile(uint32_t steps, int64_t timeout_ms,
                                      const std::function<bool()>& cancelled) override;

 private:
  struct Impl;
  explicit GrpcWorkerGroup(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_GROUP_GRPC_WORKER_GROUP_H_
