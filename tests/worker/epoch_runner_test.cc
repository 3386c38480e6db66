// The runner alone: what no stream is slow enough to meet.
#include "worker/epoch_runner.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>

#include "common/log.h"
#include "tests/fakes/fake_host.h"
#include "tests/worker/session_testing.h"
#include "worker/comm/gloo_communicator.h"

namespace lockstep {
namespace {

// The thread answers for an epoch that it holds, which must then be let go of in time; the
// caller, for any other. A load is not waited for: nothing is held before it.
TEST(EpochRunner, HoldsNothingOfAnEpochThatIsClosedBeforeItsLoad) {
  InitLog({.level = LogLevel::kError, .json = false, .source = ""});  // not a line for each
  const auto control = std::make_shared<fakes::HostControl>();
  const std::thread::id caller = std::this_thread::get_id();
  std::atomic<uint64_t> released{0};
  std::atomic<int> loads_before{0}, held_unloaded{0};
  EpochRunnerOptions options;
  options.release_timeout_ms = 20'000;
  options.make_communicator = MakeGlooCommunicator;
  EpochRunner runner(
      options, std::make_unique<fakes::FakeHost>(control),
      [&](EpochRunner::StreamId, const worker::v1::WorkerMessage& message) {
        if (!message.has_released()) return;
        if (std::this_thread::get_id() != caller && control->Get().loads == loads_before) {
          ++held_unloaded;
        }
        released = message.released().epoch();
        released.notify_one();
      });
  for (uint64_t epoch = 1; epoch <= 4'000; ++epoch) {
    loads_before = control->Get().loads;
    runner.OnConfigure(1, Configure(epoch, 0, 1).configure(), "127.0.0.1");
    // Closed at another point of its start each time.
    for (std::atomic<uint64_t> spent{0}; spent < 37 * epoch % 20'000;) ++spent;
    runner.OnClose(1, epoch);
    released.wait(epoch - 1);
    ASSERT_EQ(held_unloaded, 0) << epoch;
  }
}

}  // namespace
}  // namespace lockstep
