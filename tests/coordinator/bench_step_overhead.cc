// What the private plane adds to a step: from GrpcWorkerGroup::Send of an empty
// plan to its GroupStep, with workers that answer at once. Prints microseconds.
//
//   bench_step_overhead [steps]
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
#include <variant>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/log.h"
#include "coordinator/group/grpc_worker_group.h"
#include "tests/fakes/fake_worker.h"
#include "wire/plan_digest.h"

namespace lockstep {
namespace {

using Clock = std::chrono::steady_clock;

bool Measure(const char* name, const std::string& address, uint32_t tp_size, int steps) {
  GroupOptions options;
  options.tp_size = tp_size;
  options.configure.set_block_size(16);
  options.size = [](const std::vector<WorkerMemory>&) { return GroupSizes{64, 8}; };
  auto group = GrpcWorkerGroup::Listen(address, options);
  if (!group.ok()) {
    std::fprintf(stderr, "%s\n", std::string(group.status().message()).c_str());
    return false;
  }
  std::mutex mutex;
  std::condition_variable changed;
  bool formed = false;
  uint64_t done = 0;
  (*group)->Start([&](const GroupEvent& event) {
    const std::lock_guard lock(mutex);
    formed = formed || std::holds_alternative<GroupFormed>(event);
    if (const auto* step = std::get_if<GroupStep>(&event)) done = step->result.step;
    changed.notify_one();
  });
  std::vector<std::unique_ptr<FakeWorker>> workers;
  FakeWorkerOptions worker;
  worker.address = (*group)->address();
  for (uint32_t i = 0; i < tp_size; ++i) workers.push_back(std::make_unique<FakeWorker>(worker));
  std::unique_lock lock(mutex);
  const auto wait = [&](auto condition) {
    return changed.wait_for(lock, std::chrono::seconds(20), condition);
  };
  if (!wait([&] { return formed; })) return false;
  std::vector<double> micros;
  for (uint64_t step = 1; step <= static_cast<uint64_t>(steps); ++step) {
    StepPlan plan;
    plan.epoch = 1;
    plan.step = step;
    plan.digest = PlanDigest(1, step).value();
    const auto start = Clock::now();
    lock.unlock();
    (*group)->Send(plan);
    lock.lock();
    if (!wait([&] { return done == step; })) return false;
    micros.push_back(std::chrono::duration<double, std::micro>(Clock::now() - start).count());
  }
  lock.unlock();
  (*group)->Shutdown();
  std::sort(micros.begin(), micros.end());
  std::printf("%-24s tp %u  p50 %6.1f us  p99 %6.1f us  (%d steps)\n", name, tp_size,
              micros[micros.size() / 2], micros[micros.size() * 99 / 100], steps);
  return true;
}

}  // namespace
}  // namespace lockstep

int main(int argc, char** argv) {
  const int steps = argc > 1 ? std::atoi(argv[1]) : 5'000;
  lockstep::InitLog({lockstep::LogLevel::kError, false, ""});
  bool ok = true;
  for (const uint32_t tp_size : {1u, 2u}) {
    ok &= lockstep::Measure("unix socket", absl::StrCat("unix:bench-", getpid(), ".sock"), tp_size,
                            steps);
    ok &= lockstep::Measure("loopback", "127.0.0.1:0", tp_size, steps);
  }
  return ok ? 0 : 1;
}
