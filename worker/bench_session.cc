// Microseconds from writing a plan to reading its result, through the worker's
// real session and gRPC over a unix socket, with a step that computes nothing.
//
//   bench_session [steps]        default: 5000
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "tests/fakes/fake_coordinator.h"
#include "tests/fakes/fake_host.h"
#include "wire/codec.h"
#include "worker/comm/gloo_communicator.h"
#include "worker/grpc_plane.h"
#include "worker/session.h"

namespace lockstep {
namespace {

using worker::v1::CoordinatorMessage;
using worker::v1::WorkerMessage;

CoordinatorMessage Configure() {
  CoordinatorMessage message;
  worker::v1::Configure& c = *message.mutable_configure();
  c.set_epoch(1);
  c.set_tp_size(1);
  c.set_model_path("/none");
  c.set_load_format("dummy");
  c.set_block_size(16);
  c.set_num_kv_blocks(1);
  c.set_max_num_seqs(256);
  c.set_max_batched_tokens(256);
  c.set_max_model_len(16);
  c.set_communicator("bench");
  return message;
}

int Main(int argc, char** argv) {
  const int steps = argc > 1 ? std::max(1, std::atoi(argv[1])) : 5'000;
  const std::string socket = "/tmp/bench_session." + std::to_string(getpid());
  fakes::FakeCoordinator coordinator("unix:" + socket);
  SessionOptions options;
  options.runner.make_communicator = MakeGlooCommunicator;
  Session session(options, MakeGrpcPlane(coordinator.address(), false),
                  std::make_unique<fakes::FakeHost>(std::make_shared<fakes::HostControl>()));
  std::thread running([&] { session.Run(); });
  coordinator.Send(0, Configure());
  bool good = coordinator.AwaitCase(0, WorkerMessage::kReady).has_value();
  std::vector<double> times;
  for (int step = 1; good && step <= steps; ++step) {
    StepPlan plan;
    plan.epoch = 1;
    plan.step = static_cast<uint64_t>(step);
    for (uint32_t slot = 0; slot < 256; ++slot) plan.spans.push_back({Slot(slot), 1});
    const auto start = std::chrono::steady_clock::now();
    CoordinatorMessage message;
    *message.mutable_plan() = wire::Encode(plan);
    coordinator.Send(0, message);
    good = coordinator.AwaitCase(0, WorkerMessage::kResult).has_value();
    times.push_back(
        std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start)
            .count());
  }
  session.Stop();
  running.join();
  unlink(socket.c_str());
  if (!good) {
    std::fprintf(stderr, "bench_session: the worker did not answer\n");
    return 1;
  }
  std::sort(times.begin(), times.end());
  std::printf("an empty step of 256 sequences, plan to result: median %.0f us, p99 %.0f us\n",
              times[times.size() / 2], times[times.size() * 99 / 100]);
  return 0;
}

}  // namespace
}  // namespace lockstep

int main(int argc, char** argv) { return lockstep::Main(argc, argv); }
